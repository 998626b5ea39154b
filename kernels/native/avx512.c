/* Kernels for processors with AVX-512. */
#include "blas.h"
#include "tables.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function \
)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define VARIANT minillm_kernels_avx512
#define VECTOR_BYTES 64
#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
