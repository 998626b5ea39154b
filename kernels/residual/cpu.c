/* The residual sum. */

typedef struct {
    const float *x, *y;
    float *sum; /* may be x or y */
    int64_t size;
} Add;

static void add_range(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const Add *a = state;
    add_rows(a->x + start, a->y + start, a->sum + start, stop - start);
}

static void add(Pool *pool, const Argument *arguments) {
    UNPACK(Add, a, arguments);
    pool_run(pool, add_range, &a, a.size, 1 << 14);
}
