/* The product by a BLAS that has one thread, called once for a slice of the result. */

static void blas_slice(const MatMul *p, int64_t row, int64_t num_rows, int64_t column, int64_t num_columns) {
    float *out = p->out + row * p->stride_out + column;
    if (p->bias)
        for (int64_t i = 0; i < num_rows; i++) memcpy(out + i * p->stride_out, p->bias + column, (size_t)num_columns * sizeof(float));
    blas_sgemm(
        p->transposed_a, p->transposed_b, num_rows, num_columns, p->K, p->a + row * (p->transposed_a ? 1 : p->stride_a), p->stride_a,
        p->b + column * (p->transposed_b ? p->stride_b : 1), p->stride_b, p->accumulate || p->bias ? 1.0f : 0.0f, out, p->stride_out
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

static void matmul_blas(Pool *pool, const MatMul *p) {
    if (4 * p->M >= p->N) /* long slices of rows are faster than of columns */
        pool_run(pool, blas_rows, p, p->M, 16);
    else
        pool_run(pool, blas_columns, p, p->N, 16);
}
