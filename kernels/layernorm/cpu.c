/* Layer normalisation: one read of each row from memory, further passes from cache. */

typedef struct {
    const float *x, *delta, *delta_bias, *weight, *bias; /* all but x, weight: or NULL */
    float *sum, *y, *mean, *rstd;           /* sum = x + delta + delta_bias, or NULL */
    int64_t num_rows, D;
    double eps;
} LayerNormForward;

static void layernorm_forward_rows(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const LayerNormForward *a = state;
    const int64_t D = a->D;
    for (int64_t row = start; row < stop; row++) {
        const float *x = a->x + row * D;
        float *y = a->y + row * D;
        float total = 0, squares = 0;
        if (a->delta) {
            add_rows(x, a->delta + row * D, a->sum + row * D, D);
            if (a->delta_bias) add_to(a->sum + row * D, a->delta_bias, D);
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
    float *grad_params; /* [2, D]: the gradients of weight and bias, or NULL */
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
    for (int64_t i = 0; i < D; i++)
        grad_x[i] = (grad_x[i] - average - (x[i] - mean) * along) * rstd;
    if (a->grad_sum) add_to(grad_x, a->grad_sum + row * D, D);
}

typedef struct {
    const LayerNormBackward *arguments;
    Groups groups;
    float *sums; /* [groups, 2, D] or NULL */
} LayerNormBackwardGroups;

static void layernorm_backward_groups(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const LayerNormBackwardGroups *g = state;
    const LayerNormBackward *a = g->arguments;
    const int64_t width = 2 * a->D;
    for (int64_t number = start; number < stop; number++) {
        const Group rows = group_at(&g->groups, number);
        float *sums = g->sums ? g->sums + number * width : NULL;
        if (sums) memset(sums, 0, (size_t)width * sizeof *sums);
        for (int64_t row = rows.start; row < rows.stop; row++) layernorm_backward_row(a, row, sums);
    }
}

static void layernorm_backward(Pool *pool, const Argument *arguments) {
    UNPACK(LayerNormBackward, a, arguments);
    LayerNormBackwardGroups g = {&a, groups_of(a.num_rows, SUM_ROWS), NULL};
    const int64_t width = 2 * a.D;
    if (a.grad_params && !(g.sums = groups_memory(pool, &g.groups, width))) return;
    pool_run(pool, layernorm_backward_groups, &g, g.groups.number, 1);
    if (g.sums) add_groups(pool, &g.groups, g.sums, width, a.grad_params);
    free(g.sums);
}
