/* Activations: one pass over memory. Backward passes recompute the activation from the
   pre-activation. */

typedef struct {
    const float *x;
    float *y;
    int64_t size;
} ActivationForward;

typedef struct {
    const float *grad_y, *x;
    float *grad_x; /* may be grad_y */
    int64_t size;
} ActivationBackward;

enum { ACTIVATION_GRAIN = 4096 };

#define GELU_C0 0.7978845608028654f /* sqrt(2 / pi) */
#define GELU_C1 0.044715f

/* Return sigmoid(2 u), equal to (1 + tanh u) / 2, with u = sqrt(2/pi) (x + 0.044715 x^3). */
INLINE float gelu_gate(float x) {
    return sigmoid_((2 * GELU_C0 * GELU_C1 * x * x + 2 * GELU_C0) * x);
}

INLINE float gelu_tanh(float x) { return x * gelu_gate(x); }

INLINE float gelu_tanh_slope(float x) {
    const float s = gelu_gate(x);
    return s + s * (1 - s) * x * (6 * GELU_C0 * GELU_C1 * x * x + 2 * GELU_C0);
}

INLINE float gelu_erf(float x) { return 0.5f * x * (1 + erf_(x * 0.70710678f)); }

INLINE float gelu_erf_slope(float x) {
    return 0.5f * (1 + erf_(x * 0.70710678f)) + x * exp_(-0.5f * x * x) * 0.39894228f;
}

INLINE float relu(float x) { return x < 0 ? 0 : x; }

INLINE float relu_slope(float x) { return x > 0 ? 1.0f : 0.0f; }

INLINE float relu2(float x) { return x < 0 ? 0 : x * x; }

INLINE float relu2_slope(float x) { return x > 0 ? 2 * x : 0.0f; }

INLINE float silu(float x) { return x * sigmoid_(x); }

INLINE float silu_slope(float x) {
    const float s = sigmoid_(x), y = x * s;
    return s + y * (1 - s);
}

#define ACTIVATION(name) \
    static void name##_forward_range( \
        Pool *pool, const void *state, int64_t start, int64_t stop, int thread \
    ) { \
        const ActivationForward *a = state; \
        const float *x = a->x; \
        float *y = a->y; \
        _Pragma("omp simd") for (int64_t i = start; i < stop; i++) y[i] = name(x[i]); \
    } \
    static void name##_forward(Pool *pool, const Argument *arguments) { \
        UNPACK(ActivationForward, a, arguments); \
        pool_run(pool, name##_forward_range, &a, a.size, ACTIVATION_GRAIN); \
    } \
    static void name##_backward_range( \
        Pool *pool, const void *state, int64_t start, int64_t stop, int thread \
    ) { \
        const ActivationBackward *a = state; \
        const float *x = a->x, *grad_y = a->grad_y; \
        float *grad_x = a->grad_x; \
        _Pragma("omp simd") for (int64_t i = start; i < stop; i++) \
            grad_x[i] = grad_y[i] * name##_slope(x[i]); \
    } \
    static void name##_backward(Pool *pool, const Argument *arguments) { \
        UNPACK(ActivationBackward, a, arguments); \
        pool_run(pool, name##_backward_range, &a, a.size, ACTIVATION_GRAIN); \
    }

ACTIVATION(gelu_tanh)
ACTIVATION(gelu_erf)
ACTIVATION(relu)
ACTIVATION(relu2)
ACTIVATION(silu)

typedef struct {
    const float *gate_up; /* [rows, 2F] = [gate | up] */
    float *y;             /* [rows, F] */
    int64_t num_rows, F;
} GatedForward;

typedef struct {
    const float *grad_y, *gate_up;
    float *grad;
    int64_t num_rows, F;
} GatedBackward;

/* y = activation(gate) up, and its derivative. */
#define GATED(name, activation) \
    static void name##_forward_rows( \
        Pool *pool, const void *state, int64_t start, int64_t stop, int thread \
    ) { \
        const GatedForward *a = state; \
        const int64_t F = a->F; \
        for (int64_t row = start; row < stop; row++) { \
            const float *gate = a->gate_up + row * 2 * F, *up = gate + F; \
            float *y = a->y + row * F; \
            _Pragma("omp simd") for (int64_t i = 0; i < F; i++) \
                y[i] = activation(gate[i]) * up[i]; \
        } \
    } \
    static void name##_forward(Pool *pool, const Argument *arguments) { \
        UNPACK(GatedForward, a, arguments); \
        pool_run(pool, name##_forward_rows, &a, a.num_rows, 4); \
    } \
    static void name##_backward_rows( \
        Pool *pool, const void *state, int64_t start, int64_t stop, int thread \
    ) { \
        const GatedBackward *a = state; \
        const int64_t F = a->F; \
        for (int64_t row = start; row < stop; row++) { \
            const float *gate = a->gate_up + row * 2 * F, *up = gate + F; \
            const float *grad_y = a->grad_y + row * F; \
            float *grad_gate = a->grad + row * 2 * F, *grad_up = grad_gate + F; \
            _Pragma("omp simd") for (int64_t i = 0; i < F; i++) { \
                grad_up[i] = grad_y[i] * activation(gate[i]); \
                grad_gate[i] = grad_y[i] * up[i] * activation##_slope(gate[i]); \
            } \
        } \
    } \
    static void name##_backward(Pool *pool, const Argument *arguments) { \
        UNPACK(GatedBackward, a, arguments); \
        pool_run(pool, name##_backward_rows, &a, a.num_rows, 4); \
    }

GATED(swiglu, silu)
GATED(geglu, gelu_tanh)
