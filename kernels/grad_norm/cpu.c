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

typedef struct {
    float *const *parts; /* [num_parts] arrays [size], of which out may be one */
    float *out;
    double *partials; /* [threads] zeros */
    int64_t num_parts, size;
} SumArrays;

static void sum_arrays_range(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const SumArrays *a = state;
    double squares = 0;
    for (int64_t first = start; first < stop; first += SQUARES_RUN) {
        const int64_t n = first + SQUARES_RUN < stop ? SQUARES_RUN : stop - first;
        float total[SQUARES_RUN];
        memcpy(total, a->parts[0] + first, n * sizeof *total);
        for (int64_t p = 1; p < a->num_parts; p++) {
            const float *part = a->parts[p] + first;
#pragma omp simd
            for (int64_t i = 0; i < n; i++) total[i] += part[i];
        }
        memcpy(a->out + first, total, n * sizeof *total);
        squares += (double)dot(total, total, n);
    }
    a->partials[thread] = squares;
}

static void sum_arrays(Pool *pool, const Argument *arguments) {
    UNPACK(SumArrays, a, arguments);
    pool_run(pool, sum_arrays_range, &a, a.size, 1 << 13);
}
