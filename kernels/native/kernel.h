/* Interface of every C kernel: a function of a thread pool and a list of 8-byte arguments. The
   kernel copies the list into its own struct. */
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

/* `signature` has one letter per argument; module.c reads it:

        f read, F write  float32 array        q read, Q write  int64 array     i  integer
        m read, M write  float32 matrix       u read, I write  uint32 array    d  number
        h read, H write  float32 heads        U read           uint64 array
        D write          float64 array        b read           bool array

   Arrays are C-contiguous. Matrices and heads [B, T, H, K] have any strides: each arrives as its
   address followed by the stride of each dim, in elements. A letter followed by ? may be None,
   which arrives as NULL. */
typedef struct {
    const char *name;
    const char *signature;
    KernelFunction *function;
} Kernel;

/* Copy the arguments into a struct of 8-byte members, in the order of the signature. */
#define UNPACK(Struct, name, arguments) \
    Struct name; \
    _Static_assert(sizeof(Struct) % 8 == 0, "members are 8 bytes wide"); \
    memcpy(&name, arguments, sizeof name)

#endif
