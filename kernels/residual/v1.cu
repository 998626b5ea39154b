// The residual sum, and the addition of a bias.
// minillm-build: -DELEMENT=float32
// minillm-build: -DELEMENT=bfloat16
// minillm-build: -DELEMENT=float16
// minillm-sass: add LDG.E.128*2 STG.E.128
// minillm-sass: add_bias LDG.E.128*5 STG.E.128*4
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

#define WARPS (THREADS / 32)
#define ROWS 4  // of a warp, WARPS apart

// x [num_rows, D] += bias [D]. A block takes ROWS * WARPS rows of 32 runs of columns.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_bias(Element* x, const Element* bias, int64_t num_rows, int D) {
    const int c = (blockIdx.y * 32 + threadIdx.x) * RUN;
    if (c >= D) return;
    const int64_t first = (int64_t)blockIdx.x * (ROWS * WARPS) + threadIdx.y;
    float b[RUN];
    load_floats(b, bias + c, D - c);
    Run<Element, RUN> rows[ROWS];  // all loads before the first store, which might be to the same
    #pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int64_t row = first + i * WARPS;
        if (row < num_rows) rows[i] = load_run<RUN>(x + row * D + c, D - c);
    }
    #pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int64_t row = first + i * WARPS;
        if (row >= num_rows) return;
        float v[RUN];
        to_floats(v, rows[i]);
        #pragma unroll
        for (int j = 0; j < RUN; j++) v[j] += b[j];
        store_floats(x + row * D + c, v, D - c);
    }
}
