/* Softmax cross-entropy on one rank's columns of the vocabulary, in place. */

typedef struct {
    const float *logits; /* [rows, V] */
    float *row_max;
    int64_t num_rows, V, valid;
} XentMax;

static void xent_max_rows(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const XentMax *a = state;
    for (int64_t row = start; row < stop; row++)
        a->row_max[row] = maximum(a->logits + row * a->V, a->valid);
}

static void xent_max(Pool *pool, const Argument *arguments) {
    UNPACK(XentMax, a, arguments);
    pool_run(pool, xent_max_rows, &a, a.num_rows, 4);
}

typedef struct {
    float *logits; /* [rows, V], overwritten by exp(logits - row_max) */
    const float *row_max;
    const int64_t *targets;
    float *sums, *target_logit;
    int64_t num_rows, V, valid, first_class;
} XentShiftedSum;

static void xent_shifted_sum_rows(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const XentShiftedSum *a = state;
    for (int64_t row = start; row < stop; row++) {
        float *x = a->logits + row * a->V, total = 0;
        const float shift = a->row_max[row];
        const int64_t target = a->targets[row] - a->first_class;
        a->target_logit[row] = target >= 0 && target < a->valid ? x[target] - shift : 0;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < a->valid; i++) {
            const float e = exp_(x[i] - shift);
            x[i] = e;
            total += e;
        }
        for (int64_t i = a->valid; i < a->V; i++) x[i] = 0;
        a->sums[row] = total;
    }
}

static void xent_shifted_sum(Pool *pool, const Argument *arguments) {
    UNPACK(XentShiftedSum, a, arguments);
    pool_run(pool, xent_shifted_sum_rows, &a, a.num_rows, 4);
}

typedef struct {
    float *exp_logits; /* [rows, V], overwritten by the gradient */
    const float *sum_exp, *row_scale;
    const int64_t *targets;
    int64_t num_rows, V, first_class;
} XentGrad;

static void xent_grad_rows(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const XentGrad *a = state;
    for (int64_t row = start; row < stop; row++) {
        float *x = a->exp_logits + row * a->V;
        const float scale = a->row_scale[row] / a->sum_exp[row];
        const int64_t target = a->targets[row] - a->first_class;
#pragma omp simd
        for (int64_t i = 0; i < a->V; i++) x[i] *= scale;
        if (target >= 0 && target < a->V) x[target] -= a->row_scale[row];
    }
}

static void xent_grad(Pool *pool, const Argument *arguments) {
    UNPACK(XentGrad, a, arguments);
    pool_run(pool, xent_grad_rows, &a, a.num_rows, 4);
}
