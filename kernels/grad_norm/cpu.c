/* Sums of squares: short runs in float32, which vectorise, added in float64. */

enum { SQUARES_RUN = 512, SQUARES_GRAIN = 1 << 14, ARRAYS_GRAIN = 1 << 13 };

typedef struct {
    const float *x;
    double *total; /* [1] */
    int64_t size;
} SumOfSquares;

typedef struct {
    const void *arguments;
    Groups runs;
    float *sums; /* [runs] */
} SquaredRuns;

static void sum_of_squares_runs(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const SquaredRuns *r = state;
    const SumOfSquares *a = r->arguments;
    for (int64_t i = start; i < stop; i++) {
        const Group run = group_at(&r->runs, i);
        r->sums[i] = dot(a->x + run.start, a->x + run.start, run.stop - run.start);
    }
}

/* Run `function` over the runs of `size` elements, and return the sum of their squares. */
static double squares_of(
    Pool *pool, RangeFunction *function, const void *arguments, int64_t size, int64_t grain
) {
    SquaredRuns r = {arguments, groups_of(size, SQUARES_RUN), NULL};
    r.sums = groups_memory(pool, &r.runs, 1);
    if (!r.sums) return 0;
    pool_run(pool, function, &r, r.runs.number, grain / SQUARES_RUN);
    double total = 0;
    for (int64_t i = 0; i < r.runs.number; i++) total += (double)r.sums[i];
    free(r.sums);
    return total;
}

static void sum_of_squares(Pool *pool, const Argument *arguments) {
    UNPACK(SumOfSquares, a, arguments);
    *a.total = squares_of(pool, sum_of_squares_runs, &a, a.size, SQUARES_GRAIN);
}

typedef struct {
    float *const *parts; /* [num_arrays] arrays [size], of which out may be one */
    float *out;
    double *total; /* [1] */
    int64_t num_arrays, size;
} SumArrays;

static void sum_arrays_runs(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const SquaredRuns *r = state;
    const SumArrays *a = r->arguments;
    for (int64_t i = start; i < stop; i++) {
        const Group run = group_at(&r->runs, i);
        const int64_t first = run.start, n = run.stop - first;
        float total[SQUARES_RUN];
        memcpy(total, a->parts[0] + first, (size_t)n * sizeof *total);
        for (int64_t p = 1; p < a->num_arrays; p++) {
            const float *part = a->parts[p] + first;
#pragma omp simd
            for (int64_t j = 0; j < n; j++) total[j] += part[j];
        }
        memcpy(a->out + first, total, (size_t)n * sizeof *total);
        r->sums[i] = dot(total, total, n);
    }
}

static void sum_arrays(Pool *pool, const Argument *arguments) {
    UNPACK(SumArrays, a, arguments);
    *a.total = squares_of(pool, sum_arrays_runs, &a, a.size, ARRAYS_GRAIN);
}
