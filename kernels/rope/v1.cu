// Rotary positions: x [B, T, H, K] turned in place, channel c with channel c + K/2. A thread
// rotates one run of pairs.
// minillm-build: -DELEMENT=float32 -DTABLE=float32
// minillm-build: -DELEMENT=bfloat16 -DTABLE=bfloat16
// minillm-build: -DELEMENT=bfloat16 -DTABLE=float32
// minillm-build: -DELEMENT=float16 -DTABLE=float16
// minillm-build: -DELEMENT=float16 -DTABLE=float32
// minillm-sass: rope LDG.E.128*4 STG.E.128*2
#include "../gpu/include/vectors.cuh"

#ifndef TABLE
#define TABLE float32
#endif
#define THREADS 256

// cos, sin [T, half]; `sign` is -1 to turn back. The strides of x are in elements; its last dim is
// contiguous.
extern "C" __global__ void __launch_bounds__(THREADS)
    rope(Element* x, const TABLE* cos, const TABLE* sin, uint32_t total, int T, int H, int half,
         int64_t stride_b, int64_t stride_t, int64_t stride_h, float sign) {
    const uint32_t index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= total) return;
    const uint32_t runs = (half + RUN - 1) / RUN;
    const uint32_t head = index / runs, place = head / H;
    const int c = index % runs * RUN, h = head % H, t = place % T, b = place / T;

    Element* first = x + b * stride_b + t * stride_t + h * stride_h + c;
    const int64_t in_table = (int64_t)t * half + c;
    float u[RUN], v[RUN], cosine[RUN], sine[RUN];
    load_floats(u, first, half - c);
    load_floats(v, first + half, half - c);
    load_floats(cosine, cos + in_table, half - c);
    load_floats(sine, sin + in_table, half - c);
    #pragma unroll
    for (int i = 0; i < RUN; i++) {
        const float turned = v[i] * cosine[i] + u[i] * sign * sine[i];
        u[i] = u[i] * cosine[i] - v[i] * sign * sine[i];
        v[i] = turned;
    }
    store_floats(first, u, half - c);
    store_floats(first + half, v, half - c);
}
