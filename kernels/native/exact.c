/* Kernels with the same bits on every machine: compiled once, for the baseline, without
   contraction to fused multiply-adds. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <math.h>

#include "kernel.h"
#include "tables.h"

#include "../random/cpu.c"
#include "../subwords/cpu.c"

const Kernel minillm_kernels_exact[] = {
    {"random_normal", "UDii", random_normal},
    {"merge_pairs", "IQiUuiuQi", merge_pairs},
    {NULL, NULL, NULL},
};
