/* The kernels for any processor of the architecture: 16-byte vectors, which x86-64 (SSE2) and 64-bit ARM (NEON) all have. */
#include "blas.h"
#include "tables.h"

#define VARIANT minillm_kernels_baseline
#define VECTOR_BYTES 16
#include "variant.h"
