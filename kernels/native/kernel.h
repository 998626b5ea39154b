/* What every C kernel is: a function of a thread pool and a list of 8-byte arguments, which it copies into a struct of its own. */
#ifndef MINILLM_KERNEL_H
#define MINILLM_KERNEL_H

#include <stdint.h>
#include <string.h>

#include "pool.h"

typedef union {
    void *array;
    int64_t integer;
    double number;
} Argument;

_Static_assert(sizeof(Argument) == 8 && sizeof(void *) == 8, "an argument is 8 bytes wide");

typedef void KernelFunction(Pool *pool, const Argument *arguments);

/* `signature` has one letter an argument; module.c reads it:
   f read float32, F write float32, D write float64, q int64, u uint32, U uint64, b bool (arrays, C-contiguous);
   m read, M write a float32 matrix, h read, H write float32 heads [B, T, H, K], that may lie anyhow: such an array arrives as its address
   followed by the stride of each dim, in elements; i integer; d number. A letter followed by ? may be None, which arrives as NULL. */
typedef struct {
    const char *name;
    const char *signature;
    KernelFunction *function;
} Kernel;

/* Copy the arguments into a struct whose members are all 8 bytes wide and stand in the order of the signature. */
#define UNPACK(Struct, name, arguments) \
    Struct name; \
    _Static_assert(sizeof(Struct) % 8 == 0, "members are 8 bytes wide"); \
    memcpy(&name, arguments, sizeof name)

#endif
