/* Matrix products: a kernel for a few rows, otherwise the blocked product or a BLAS. */

typedef struct {
    Matrix a, b; /* [M, K], [K, N]; of each, the rows or the columns are contiguous */
    float *out;  /* [M, N] */
    int64_t stride_out, stride_column; /* the latter 1 */
    const float *bias; /* [N] or NULL */
    float *sums;       /* [M]: row sums of a dense column-major a; or NULL */
    float *packed;     /* b as pack_matrix writes it, or NULL */
    int64_t M, N, K, accumulate, by_blas;
} MatMul;

#include "blas.c"
#include "blocked.c"
#include "column_sum.c"
#include "few_rows.c"

static void matmul(Pool *pool, const Argument *arguments) {
    UNPACK(MatMul, p, arguments);
    /* The sums load a into the caches for the product. */
    if (p.sums) sum_all_columns(pool, &(ColumnSum){p.a.start, p.sums, p.K, p.M});
    if (p.packed)
        matmul_blocked(pool, &p);
    else if (p.M <= FEW_ROWS && p.a.column == 1 && p.b.row == 1 && p.N > p.M)
        pool_run(pool, matmul_few_rows, &p, p.N, 16);
    else if (p.by_blas)
        matmul_blas(pool, &p);
    else
        matmul_blocked(pool, &p);
}
