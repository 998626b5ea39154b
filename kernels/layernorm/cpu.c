/* Layer normalisation: a row is read from memory once and passed over in cache. */

typedef struct {
    const float *x, *delta, *weight, *bias; /* delta, bias: or NULL */
    float *sum, *y, *mean, *rstd;           /* sum = x + delta, or NULL */
    int64_t num_rows, D;
    double eps;
} LayerNormForward;

static void layernorm_forward_rows(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const LayerNormForward *a = state;
    const int64_t D = a->D;
    for (int64_t row = start; row < stop; row++) {
        const float *x = a->x + row * D;
        float *y = a->y + row * D;
        float total = 0, squares = 0;
        if (a->delta) {
            add_rows(x, a->delta + row * D, a->sum + row * D, D);
            x = a->sum + row * D;
        }
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < D; i++) total += x[i];
        const float mean = total / (float)D;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < D; i++) squares += (x[i] - mean) * (x[i] - mean);
        const float rstd = 1.0f / __builtin_sqrtf(squares / (float)D + (float)a->eps);
        if (a->bias) {
#pragma omp simd
            for (int64_t i = 0; i < D; i++) y[i] = (x[i] - mean) * rstd * a->weight[i] + a->bias[i];
        } else {
#pragma omp simd
            for (int64_t i = 0; i < D; i++) y[i] = (x[i] - mean) * rstd * a->weight[i];
        }
        a->mean[row] = mean;
        a->rstd[row] = rstd;
    }
}

static void layernorm_forward(Pool *pool, const Argument *arguments) {
    UNPACK(LayerNormForward, a, arguments);
    pool_run(pool, layernorm_forward_rows, &a, a.num_rows, 16);
}

typedef struct {
    const float *grad_y, *grad_sum, *x, *weight, *mean, *rstd; /* grad_sum: or NULL */
    float *grad_x;   /* or NULL; may be grad_y */
    float *partials; /* [threads, 2, D] zeros, or NULL: each thread's share of the gradients of weight and bias */
    int64_t num_rows, D;
} LayerNormBackward;

static void layernorm_backward_row(const LayerNormBackward *a, int64_t row, float *sums) {
    const int64_t D = a->D;
    const float *x = a->x + row * D, *grad_y = a->grad_y + row * D;
    const float *weight = a->weight, mean = a->mean[row], rstd = a->rstd[row];
    float *grad_weight = sums, *grad_bias = sums + D;
    if (sums) {
#pragma omp simd
        for (int64_t i = 0; i < D; i++) {
            grad_weight[i] += grad_y[i] * (x[i] - mean) * rstd;
            grad_bias[i] += grad_y[i];
        }
    }
    if (!a->grad_x) return;
    float average = 0, along = 0, *grad_x = a->grad_x + row * D;
#pragma omp simd reduction(+ : average, along)
    for (int64_t i = 0; i < D; i++) {
        const float g = grad_y[i] * weight[i];
        grad_x[i] = g;
        average += g;
        along += g * (x[i] - mean);
    }
    average /= (float)D;
    along *= rstd * rstd / (float)D;
#pragma omp simd
    for (int64_t i = 0; i < D; i++) grad_x[i] = (grad_x[i] - average - (x[i] - mean) * along) * rstd;
    if (a->grad_sum) add_to(grad_x, a->grad_sum + row * D, D);
}

static void layernorm_backward_rows(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const LayerNormBackward *a = state;
    const int64_t size = 2 * a->D;
    float *sums = a->partials ? pool_scratch(pool, thread, (size_t)size) : NULL;
    if (a->partials && !sums) return;
    for (int64_t first = start; first < stop; first += SUM_ROWS) {
        const int64_t last = first + SUM_ROWS < stop ? first + SUM_ROWS : stop;
        if (sums) memset(sums, 0, (size_t)size * sizeof *sums);
        for (int64_t row = first; row < last; row++) layernorm_backward_row(a, row, sums);
        if (sums) add_to(a->partials + thread * size, sums, size);
    }
}

static void layernorm_backward(Pool *pool, const Argument *arguments) {
    UNPACK(LayerNormBackward, a, arguments);
    pool_run(pool, layernorm_backward_rows, &a, a.num_rows, SUM_ROWS);
}
