/* Root-mean-square normalisation. */

typedef struct {
    const float *x, *delta, *weight; /* delta: or NULL */
    float *sum, *y, *rstd;           /* sum = x + delta, or NULL */
    int64_t num_rows, D;
    double eps;
} RMSNormForward;

static void rmsnorm_forward_rows(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const RMSNormForward *a = state;
    const int64_t D = a->D;
    for (int64_t row = start; row < stop; row++) {
        const float *x = a->x + row * D;
        float *y = a->y + row * D;
        if (a->delta) {
            add_rows(x, a->delta + row * D, a->sum + row * D, D);
            x = a->sum + row * D;
        }
        const float rstd = 1.0f / __builtin_sqrtf(dot(x, x, D) / (float)D + (float)a->eps);
#pragma omp simd
        for (int64_t i = 0; i < D; i++) y[i] = x[i] * rstd * a->weight[i];
        a->rstd[row] = rstd;
    }
}

static void rmsnorm_forward(Pool *pool, const Argument *arguments) {
    UNPACK(RMSNormForward, a, arguments);
    pool_run(pool, rmsnorm_forward_rows, &a, a.num_rows, 16);
}

typedef struct {
    const float *grad_y, *grad_sum, *x, *weight, *rstd; /* grad_sum: or NULL */
    float *grad_x;   /* or NULL; may be grad_y */
    float *partials; /* [threads, D] zeros, or NULL: each thread's share of the gradient of weight */
    int64_t num_rows, D;
} RMSNormBackward;

static void rmsnorm_backward_row(const RMSNormBackward *a, int64_t row, float *grad_weight) {
    const int64_t D = a->D;
    const float *x = a->x + row * D, *grad_y = a->grad_y + row * D;
    const float *weight = a->weight, rstd = a->rstd[row];
    if (grad_weight) {
#pragma omp simd
        for (int64_t i = 0; i < D; i++) grad_weight[i] += grad_y[i] * x[i] * rstd;
    }
    if (!a->grad_x) return;
    float along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < D; i++) along += grad_y[i] * weight[i] * x[i];
    along *= rstd * rstd / (float)D;
    float *grad_x = a->grad_x + row * D;
#pragma omp simd
    for (int64_t i = 0; i < D; i++) grad_x[i] = (grad_y[i] * weight[i] - x[i] * along) * rstd;
    if (a->grad_sum) add_to(grad_x, a->grad_sum + row * D, D);
}

static void rmsnorm_backward_rows(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const RMSNormBackward *a = state;
    float *sums = a->partials ? pool_scratch(pool, thread, (size_t)a->D) : NULL;
    if (a->partials && !sums) return;
    for (int64_t first = start; first < stop; first += SUM_ROWS) {
        const int64_t last = first + SUM_ROWS < stop ? first + SUM_ROWS : stop;
        if (sums) memset(sums, 0, (size_t)a->D * sizeof *sums);
        for (int64_t row = first; row < last; row++) rmsnorm_backward_row(a, row, sums);
        if (sums) add_to(a->partials + thread * a->D, sums, a->D);
    }
}

static void rmsnorm_backward(Pool *pool, const Argument *arguments) {
    UNPACK(RMSNormBackward, a, arguments);
    pool_run(pool, rmsnorm_backward_rows, &a, a.num_rows, SUM_ROWS);
}
