/* Kernels for any processor of the architecture. Vectors of 16 bytes exist on all of x86-64
   (SSE2) and 64-bit ARM (NEON). */
#include "blas.h"
#include "tables.h"

#define VARIANT minillm_kernels_baseline
#define VECTOR_BYTES 16
#include "variant.h"
