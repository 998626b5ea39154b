/* Product x [M, K] times w^T, w [N, K], for a few rows of x: each row of w is read once, at the
   speed of memory. A blocked product would first pack w, which costs more than the product
   itself. Generation of one token at a time runs through this kernel. */

/* 4 x 3 sums and the columns they meet fill 16 registers; processors with AVX-512 have 32. */
enum { FEW_ROWS = 8, DOT_ROWS = 4, DOT_COLUMNS = VECTOR_BYTES == 64 ? 4 : 3 };

INLINE float sum_of_lanes(Vector v) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += v[lane];
    return total;
}

/* Compute out[r, c] (+)= x[r] . w[c]. `rows` and `columns` are constants at the call, so the
   sums stay in registers. */
INLINE void dot_tile(
    const MatMul *p, int64_t row, int64_t column, const int rows, const int columns
) {
    const float *x = p->a.start + row * p->a.row, *w = p->b.start + column * p->b.column;
    const int64_t K = p->K, stride_x = p->a.row, stride_w = p->b.column;
    Vector sums[DOT_ROWS][DOT_COLUMNS] = {{{0}}};
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) {
        Vector part[DOT_COLUMNS];
        for (int c = 0; c < columns; c++) {
            part[c] = load(w + c * stride_w + k);
            __builtin_prefetch(w + (c + DOT_COLUMNS) * stride_w + k);
        }
        for (int r = 0; r < rows; r++) {
            const Vector values = load(x + r * stride_x + k);
            for (int c = 0; c < columns; c++) sums[r][c] += values * part[c];
        }
    }
    for (int r = 0; r < rows; r++) {
        float *out = p->out + (row + r) * p->stride_out + column;
        for (int c = 0; c < columns; c++) {
            float total = sum_of_lanes(sums[r][c]);
            for (int64_t i = k; i < K; i++) total += x[r * stride_x + i] * w[c * stride_w + i];
            if (p->bias) total += p->bias[column + c];
            out[c] = p->accumulate ? out[c] + total : total;
        }
    }
}

INLINE void dot_columns(const MatMul *p, int64_t column, const int columns) {
    int64_t row = 0;
    for (; row + DOT_ROWS <= p->M; row += DOT_ROWS) dot_tile(p, row, column, DOT_ROWS, columns);
    for (; row < p->M; row++) dot_tile(p, row, column, 1, columns);
}

static void matmul_few_rows(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const MatMul *p = state;
    int64_t column = start;
    for (; column + DOT_COLUMNS <= stop; column += DOT_COLUMNS) dot_columns(p, column, DOT_COLUMNS);
    for (; column < stop; column++) dot_columns(p, column, 1);
}
