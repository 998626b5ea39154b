// Casts between float types.
// minillm-build: -DELEMENT=float32 -DRESULT=bfloat16
// minillm-build: -DELEMENT=bfloat16 -DRESULT=float32
// minillm-build: -DELEMENT=float32 -DRESULT=float16
// minillm-build: -DELEMENT=float16 -DRESULT=float32
// minillm-build: -DELEMENT=bfloat16 -DRESULT=float16
// minillm-build: -DELEMENT=float16 -DRESULT=bfloat16
// minillm-sass: cast LDG.E.128 STG.E.128
#include "../gpu/include/vectors.cuh"

#ifndef RESULT
#define RESULT float32
#endif
#define THREADS 256
#define TAKEN 8  // elements of a thread: 16 bytes on one side at least

extern "C" __global__ void __launch_bounds__(THREADS)
    cast(const Element* x, RESULT* y, int64_t size) {
    const int64_t first = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * TAKEN;
    if (first >= size) return;
    float v[TAKEN];
    load_floats(v, x + first, size - first);
    store_floats(y + first, v, size - first);
}
