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
