/* Sum of squares: short runs in float32, which vectorise, added in float64. */

typedef struct {
    const float *x;
    double *partials; /* [threads] zeros */
    int64_t size;
} SumOfSquares;

enum { SQUARES_RUN = 512 };

static void sum_of_squares_range(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const SumOfSquares *a = state;
    double total = 0;
    for (int64_t first = start; first < stop; first += SQUARES_RUN) {
        const int64_t n = first + SQUARES_RUN < stop ? SQUARES_RUN : stop - first;
        total += (double)dot(a->x + first, a->x + first, n);
    }
    a->partials[thread] = total;
}

static void sum_of_squares(Pool *pool, const Argument *arguments) {
    UNPACK(SumOfSquares, a, arguments);
    pool_run(pool, sum_of_squares_range, &a, a.size, 1 << 14);
}
