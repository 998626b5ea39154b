/* Pointwise part of an LSTM cell. A row of gates is [i | f | g | o], overwritten in place. */

typedef struct {
    float *gates;          /* [rows, 4 H] */
    const float *c_before; /* [rows, H] */
    float *c, *h;          /* [rows, H] */
    int64_t num_rows, H;
} LSTMForward;

typedef struct {
    float *gates;                        /* [rows, 4 H] */
    const float *c_before, *c, *grad_h; /* [rows, H] */
    float *grad_c;                       /* [rows, H] */
    int64_t num_rows, H;
} LSTMBackward;

/* 2 rows: a step of 32 rows still feeds 16 threads. */
enum { LSTM_GRAIN = 2 };

INLINE float tanh_(float x) { return 2 * sigmoid_(2 * x) - 1; }

static void lstm_forward_rows(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const LSTMForward *a = state;
    const int64_t H = a->H;
    for (int64_t row = start; row < stop; row++) {
        float *i = a->gates + row * 4 * H, *f = i + H, *g = f + H, *o = g + H;
        const float *c_before = a->c_before + row * H;
        float *c = a->c + row * H, *h = a->h + row * H;
#pragma omp simd
        for (int64_t j = 0; j < H; j++) {
            i[j] = sigmoid_(i[j]);
            f[j] = sigmoid_(f[j]);
            g[j] = tanh_(g[j]);
            o[j] = sigmoid_(o[j]);
            c[j] = f[j] * c_before[j] + i[j] * g[j];
            h[j] = o[j] * tanh_(c[j]);
        }
    }
}

static void lstm_forward(Pool *pool, const Argument *arguments) {
    UNPACK(LSTMForward, a, arguments);
    pool_run(pool, lstm_forward_rows, &a, a.num_rows, LSTM_GRAIN);
}

static void lstm_backward_rows(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const LSTMBackward *a = state;
    const int64_t H = a->H;
    for (int64_t row = start; row < stop; row++) {
        float *gi = a->gates + row * 4 * H, *gf = gi + H, *gg = gf + H, *go = gg + H;
        const float *c_before = a->c_before + row * H, *c = a->c + row * H;
        const float *grad_h = a->grad_h + row * H;
        float *grad_c = a->grad_c + row * H;
#pragma omp simd
        for (int64_t j = 0; j < H; j++) {
            const float i = gi[j], f = gf[j], g = gg[j], o = go[j], through = tanh_(c[j]);
            const float total = grad_c[j] + grad_h[j] * o * (1 - through * through);
            gi[j] = total * g * i * (1 - i);
            gf[j] = total * c_before[j] * f * (1 - f);
            gg[j] = total * i * (1 - g * g);
            go[j] = grad_h[j] * through * o * (1 - o);
            grad_c[j] = total * f;
        }
    }
}

static void lstm_backward(Pool *pool, const Argument *arguments) {
    UNPACK(LSTMBackward, a, arguments);
    pool_run(pool, lstm_backward_rows, &a, a.num_rows, LSTM_GRAIN);
}

/* Fill gates [T, B, 4 H] with the activations and states [2, T + 1, B, H] behind their first, one
   product and one cell a step. packed: [H, 4 H] in panels. */
static void lstm_window_forward(Pool *pool, const Argument *arguments) {
    struct {
        float *gates, *packed, *states;
        int64_t T, B, H;
    } a;
    _Static_assert(sizeof a % 8 == 0, "members are 8 bytes wide");
    memcpy(&a, arguments, sizeof a);
    const int64_t state = a.B * a.H, width = 4 * a.H;
    float *h = a.states, *c = h + (a.T + 1) * state, *gates = a.gates;
    for (int64_t t = 0; t < a.T; t++, h += state, c += state, gates += a.B * width) {
        const MatMul product = {
            .a = {h, a.H, 1}, .out = gates, .stride_out = width, .packed = a.packed,
            .M = a.B, .N = width, .K = a.H, .accumulate = 1,
        };
        matmul_blocked(pool, &product);
        const LSTMForward cell = {gates, c, c + state, h + state, a.B, a.H};
        pool_run(pool, lstm_forward_rows, &cell, a.B, LSTM_GRAIN);
    }
}

/* Turn the activations into the gradients of the pre-activations. Adds to grad_h [T, B, H] what
   comes through later steps. grad_c [B, H]: behind the window, then before it. packed: [4 H, H]. */
static void lstm_window_backward(Pool *pool, const Argument *arguments) {
    struct {
        float *gates, *packed;
        const float *states;
        float *grad_h, *grad_c;
        int64_t T, B, H;
    } a;
    _Static_assert(sizeof a % 8 == 0, "members are 8 bytes wide");
    memcpy(&a, arguments, sizeof a);
    const int64_t state = a.B * a.H, width = 4 * a.H;
    for (int64_t t = a.T - 1; t >= 0; t--) {
        float *gates = a.gates + t * a.B * width, *grad_h = a.grad_h + t * state;
        const float *c = a.states + (a.T + 1 + t) * state;
        const LSTMBackward cell = {gates, c, c + state, grad_h, a.grad_c, a.B, a.H};
        pool_run(pool, lstm_backward_rows, &cell, a.B, LSTM_GRAIN);
        if (!t) break;
        const MatMul product = {
            .a = {gates, width, 1}, .out = grad_h - state, .stride_out = a.H, .packed = a.packed,
            .M = a.B, .N = a.H, .K = width, .accumulate = 1,
        };
        matmul_blocked(pool, &product);
    }
}
