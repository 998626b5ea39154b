/* Kernels for processors with AVX2 and FMA. */
#include "blas.h"
#include "tables.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define VARIANT minillm_kernels_avx2
#define VECTOR_BYTES 32
#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
