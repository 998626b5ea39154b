/* Matrix products: slices of the result over the pool, each one call of a BLAS that has one thread. Column sums. */

typedef struct {
    const float *a, *b, *bias; /* bias [N] or NULL */
    float *out;
    int64_t M, N, K, transposed_a, stride_a, transposed_b, stride_b, stride_out, accumulate;
} MatMul;

static void matmul_slice(const MatMul *p, int64_t row, int64_t num_rows, int64_t column, int64_t num_columns) {
    float *out = p->out + row * p->stride_out + column;
    if (p->bias)
        for (int64_t i = 0; i < num_rows; i++) memcpy(out + i * p->stride_out, p->bias + column, (size_t)num_columns * sizeof(float));
    blas_sgemm(
        p->transposed_a, p->transposed_b, num_rows, num_columns, p->K, p->a + row * (p->transposed_a ? 1 : p->stride_a), p->stride_a,
        p->b + column * (p->transposed_b ? p->stride_b : 1), p->stride_b, p->accumulate || p->bias ? 1.0f : 0.0f, out, p->stride_out
    );
}

static void matmul_rows(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const MatMul *p = state;
    matmul_slice(p, start, stop - start, 0, p->N);
}

static void matmul_columns(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const MatMul *p = state;
    matmul_slice(p, 0, p->M, start, stop - start);
}

static void matmul(Pool *pool, const Argument *arguments) {
    UNPACK(MatMul, p, arguments);
    if (p.M >= p.N)
        pool_run(pool, matmul_rows, &p, p.M, 16);
    else
        pool_run(pool, matmul_columns, &p, p.N, 16);
}

typedef struct {
    const float *x; /* [rows, D] */
    float *out;
    int64_t num_rows, D;
} ColumnSum;

enum { SUM_COLUMNS = 64 };

static void column_sum_columns(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const ColumnSum *a = state;
    for (int64_t part = start; part < stop; part++) {
        const int64_t column = part * SUM_COLUMNS, n = column + SUM_COLUMNS < a->D ? SUM_COLUMNS : a->D - column;
        float total[SUM_COLUMNS] = {0};
        for (int64_t first = 0; first < a->num_rows; first += SUM_ROWS) {
            const int64_t last = first + SUM_ROWS < a->num_rows ? first + SUM_ROWS : a->num_rows;
            float sums[SUM_COLUMNS] = {0};
            if (n == SUM_COLUMNS)
                for (int64_t row = first; row < last; row++) add_to(sums, a->x + row * a->D + column, SUM_COLUMNS);
            else
                for (int64_t row = first; row < last; row++) add_to(sums, a->x + row * a->D + column, n);
            add_to(total, sums, SUM_COLUMNS);
        }
        memcpy(a->out + column, total, (size_t)n * sizeof(float));
    }
}

static void column_sum(Pool *pool, const Argument *arguments) {
    UNPACK(ColumnSum, a, arguments);
    pool_run(pool, column_sum_columns, &a, (a.D + SUM_COLUMNS - 1) / SUM_COLUMNS, 1);
}
