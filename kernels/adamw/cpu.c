/* Optimizer updates over flat buffers: one read and one write of each element. */

typedef struct {
    float *param;
    const float *grad;
    float *exp_avg, *exp_avg_sq;
    int64_t size;
    double rate, inverse_root, beta1, beta2, eps, keep, grad_scale;
} AdamW;

static void adamw_range(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const AdamW *a = state;
    float *param = a->param, *exp_avg = a->exp_avg, *exp_avg_sq = a->exp_avg_sq;
    const float *grad = a->grad;
    const float rate = (float)a->rate, inverse_root = (float)a->inverse_root, eps = (float)a->eps,
                keep = (float)a->keep;
    const float beta1 = (float)a->beta1, beta2 = (float)a->beta2, rest1 = (float)(1 - a->beta1),
                rest2 = (float)(1 - a->beta2);
    const float grad_scale = (float)a->grad_scale;
#pragma omp simd
    for (int64_t i = start; i < stop; i++) {
        const float g = grad[i] * grad_scale;
        const float m = exp_avg[i] * beta1 + g * rest1;
        const float v = exp_avg_sq[i] * beta2 + g * g * rest2;
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        param[i] = param[i] * keep - rate * (m / (__builtin_sqrtf(v) * inverse_root + eps));
    }
}

static void adamw(Pool *pool, const Argument *arguments) {
    UNPACK(AdamW, a, arguments);
    pool_run(pool, adamw_range, &a, a.size, 1 << 13);
}

typedef struct {
    float *param;
    const float *grad;
    int64_t size;
    double rate;
} SGD;

static void sgd_range(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const SGD *a = state;
    const float rate = (float)a->rate;
#pragma omp simd
    for (int64_t i = start; i < stop; i++) a->param[i] -= rate * a->grad[i];
}

static void sgd(Pool *pool, const Argument *arguments) {
    UNPACK(SGD, a, arguments);
    pool_run(pool, sgd_range, &a, a.size, 1 << 13);
}
