// The residual sum.
// minillm-build: -DELEMENT=float32
// minillm-build: -DELEMENT=bfloat16
// minillm-build: -DELEMENT=float16
// minillm-sass: add LDG.E.128*2 STG.E.128
#include "../gpu/include/vectors.cuh"

#define THREADS 256

// out = x + y; out may be either.
extern "C" __global__ void __launch_bounds__(THREADS)
    add(const Element* x, const Element* y, Element* out, int64_t size) {
    const int64_t first = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * RUN;
    if (first >= size) return;
    float a[RUN], b[RUN];
    load_floats(a, x + first, size - first);
    load_floats(b, y + first, size - first);
    #pragma unroll
    for (int i = 0; i < RUN; i++) a[i] += b[i];
    store_floats(out + first, a, size - first);
}
