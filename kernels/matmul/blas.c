/* Matrix product through a single-threaded BLAS, called once per slice of the result. */

/* Return the leading dimension: the stride between rows, or between columns if those are
   contiguous. A BLAS requires at least their length, even for a single row. */
static int64_t leading(Matrix m, int64_t rows, int64_t columns) {
    const int64_t distance = m.column == 1 ? m.row : m.column,
                  length = m.column == 1 ? columns : rows;
    return distance < length ? (length ? length : 1) : distance;
}

static void blas_slice(
    const MatMul *p, int64_t row, int64_t num_rows, int64_t column, int64_t num_columns
) {
    const float *a = p->a.start + row * p->a.row, *b = p->b.start + column * p->b.column;
    float *out = p->out + row * p->stride_out + column;
    if (p->bias)
        for (int64_t i = 0; i < num_rows; i++)
            memcpy(out + i * p->stride_out, p->bias + column, (size_t)num_columns * sizeof(float));
    blas_sgemm(
        p->a.column != 1, p->b.column != 1, num_rows, num_columns, p->K, a,
        leading(p->a, p->M, p->K), b, leading(p->b, p->K, p->N),
        p->accumulate || p->bias ? 1.0f : 0.0f, out, p->stride_out < p->N ? p->N : p->stride_out
    );
}

static void blas_rows(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const MatMul *p = state;
    blas_slice(p, start, stop - start, 0, p->N);
}

static void blas_columns(Pool *pool, const void *state, int64_t start, int64_t stop, int thread) {
    const MatMul *p = state;
    blas_slice(p, 0, p->M, start, stop - start);
}

/* Use one slice per thread: a BLAS packs the other operand again for every slice. */
static void matmul_blas(Pool *pool, const MatMul *p) {
    const int by_rows = 4 * p->M >= p->N; /* row slices are faster than column slices */
    const int64_t length = by_rows ? p->M : p->N, slices = least(pool_size(pool), length / 16);
    pool_run_pieces(pool, by_rows ? blas_rows : blas_columns, p, length, slices, (int)slices);
}
