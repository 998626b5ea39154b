/* Interface of the loaded BLAS: its cblas_sgemm, found at run time by blas.py. */
#ifndef MINILLM_BLAS_H
#define MINILLM_BLAS_H

#include <stdint.h>

/* cblas_sgemm with 64-bit integers. */
typedef void BlasSgemm(
    int layout, int transposed_a, int transposed_b, int64_t M, int64_t N, int64_t K, float alpha,
    const float *a, int64_t stride_a, const float *b, int64_t stride_b, float beta, float *c,
    int64_t stride_c
);

/* Set once, while the module is imported. */
extern BlasSgemm *minillm_sgemm;

/* Compute c [M, N] = op(a) [M, K] op(b) [K, N] + beta c, row-major. */
static inline void blas_sgemm(
    int64_t transposed_a, int64_t transposed_b, int64_t M, int64_t N, int64_t K, const float *a,
    int64_t stride_a, const float *b, int64_t stride_b, float beta, float *c, int64_t stride_c
) {
    enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 };
    minillm_sgemm(
        ROW_MAJOR, transposed_a ? TRANSPOSED : PLAIN, transposed_b ? TRANSPOSED : PLAIN, M, N, K,
        1.0f, a, stride_a, b, stride_b, beta, c, stride_c
    );
}

#endif
