/* Kernel tables, one per instruction set, each ended by an entry without a name. */
#ifndef MINILLM_TABLES_H
#define MINILLM_TABLES_H

#include "kernel.h"

extern const Kernel minillm_kernels_exact[], minillm_kernels_baseline[];
#if defined(__x86_64__)
extern const Kernel minillm_kernels_avx2[], minillm_kernels_avx512[];
#endif

#endif
