/* Matrix products. Those of a few rows have a way of their own; all others go by our blocks or through a BLAS. */

typedef struct {
    const float *a, *b, *bias; /* bias [N] or NULL */
    float *out, *sums;         /* sums [M] of the rows of a, which is then transposed and dense, or NULL */
    int64_t M, N, K, transposed_a, stride_a, transposed_b, stride_b, stride_out, accumulate, by_blas;
} MatMul;

#include "blas.c"
#include "blocked.c"
#include "column_sum.c"
#include "few_rows.c"

static void matmul(Pool *pool, const Argument *arguments) {
    UNPACK(MatMul, p, arguments);
    if (p.sums) sum_all_columns(pool, &(ColumnSum){p.a, p.sums, p.K, p.M}); /* the product finds a in the caches */
    if (p.M <= FEW_ROWS && p.transposed_b && !p.transposed_a && p.N > p.M)
        pool_run(pool, matmul_few_rows, &p, p.N, 16);
    else if (p.by_blas)
        matmul_blas(pool, &p);
    else
        matmul_blocked(pool, &p);
}
