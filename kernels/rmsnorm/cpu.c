/* Root-mean-square normalisation. */

typedef struct {
    const float *x, *delta, *delta_bias, *weight; /* delta, delta_bias: or NULL */
    float *sum, *y, *rstd;           /* sum = x + delta + delta_bias, or NULL */
    int64_t num_rows, D;
    double eps;
} RMSNormForward;

static void rmsnorm_forward_rows(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const RMSNormForward *a = state;
    const int64_t D = a->D;
    for (int64_t row = start; row < stop; row++) {
        const float *x = a->x + row * D;
        float *y = a->y + row * D;
        if (a->delta) {
            add_rows(x, a->delta + row * D, a->sum + row * D, D);
            if (a->delta_bias) add_to(a->sum + row * D, a->delta_bias, D);
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
    float *grad_params; /* [D]: the gradient of weight, or NULL */
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

typedef struct {
    const RMSNormBackward *arguments;
    Groups groups;
    float *sums; /* [groups, D] or NULL */
} RMSNormBackwardGroups;

static void rmsnorm_backward_groups(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const RMSNormBackwardGroups *g = state;
    const RMSNormBackward *a = g->arguments;
    const int64_t width = a->D;
    for (int64_t number = start; number < stop; number++) {
        const Group rows = group_at(&g->groups, number);
        float *sums = g->sums ? g->sums + number * width : NULL;
        if (sums) memset(sums, 0, (size_t)width * sizeof *sums);
        for (int64_t row = rows.start; row < rows.stop; row++) rmsnorm_backward_row(a, row, sums);
    }
}

static void rmsnorm_backward(Pool *pool, const Argument *arguments) {
    UNPACK(RMSNormBackward, a, arguments);
    RMSNormBackwardGroups g = {&a, groups_of(a.num_rows, SUM_ROWS), NULL};
    const int64_t width = a.D;
    if (a.grad_params && !(g.sums = groups_memory(pool, &g.groups, width))) return;
    pool_run(pool, rmsnorm_backward_groups, &g, g.groups.number, 1);
    if (g.sums) add_groups(pool, &g.groups, g.sums, width, a.grad_params);
    free(g.sums);
}
