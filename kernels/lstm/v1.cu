// Pointwise part of an LSTM cell, forward and backward, in place. A thread takes one run of 16
// bytes of a row in each of the four gates.
// minillm-build: -DELEMENT=float32
// minillm-build: -DELEMENT=bfloat16
// minillm-build: -DELEMENT=float16
// minillm-sass: lstm_forward LDG.E.128*5 STG.E.128*6
// minillm-sass: lstm_backward LDG.E.128*8 STG.E.128*5
#include "../gpu/include/vectors.cuh"

#define THREADS 256
#define LOG2_E 1.4426950408889634f

__device__ __forceinline__ float sigmoid(float x) {
    return __fdividef(1.0f, 1.0f + exp2_(-LOG2_E * x));
}
__device__ __forceinline__ float tanh_(float x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }

// gates [rows, 4 H] = [i | f | g | o]; c_before, c, h: [rows, H]. `tiles` blocks share a row.
extern "C" __global__ void __launch_bounds__(THREADS)
    lstm_forward(Element* gates, const Element* c_before, Element* c, Element* h, int64_t H,
                 int tiles) {
    const int64_t row = blockIdx.x / tiles;
    const int64_t column = ((int64_t)(blockIdx.x % tiles) * THREADS + threadIdx.x) * RUN;
    const int64_t left = H - column;
    if (left <= 0) return;
    Element* at = gates + row * 4 * H + column;
    const int64_t cell = row * H + column;
    float i[RUN], f[RUN], g[RUN], o[RUN], state[RUN];
    load_floats(i, at, left);
    load_floats(f, at + H, left);
    load_floats(g, at + 2 * H, left);
    load_floats(o, at + 3 * H, left);
    load_floats(state, c_before + cell, left);
    float out[RUN];
    #pragma unroll
    for (int k = 0; k < RUN; k++) {
        i[k] = sigmoid(i[k]);
        f[k] = sigmoid(f[k]);
        g[k] = tanh_(g[k]);
        o[k] = sigmoid(o[k]);
        state[k] = f[k] * state[k] + i[k] * g[k];
        out[k] = o[k] * tanh_(state[k]);
    }
    store_floats(at, i, left);
    store_floats(at + H, f, left);
    store_floats(at + 2 * H, g, left);
    store_floats(at + 3 * H, o, left);
    store_floats(c + cell, state, left);
    store_floats(h + cell, out, left);
}

// gates: i, f, g, o, overwritten by the gradient of the pre-activations; grad_c likewise by that
// of c_before.
extern "C" __global__ void __launch_bounds__(THREADS)
    lstm_backward(Element* gates, const Element* c_before, const Element* c, const Element* grad_h,
                  Element* grad_c, int64_t H, int tiles) {
    const int64_t row = blockIdx.x / tiles;
    const int64_t column = ((int64_t)(blockIdx.x % tiles) * THREADS + threadIdx.x) * RUN;
    const int64_t left = H - column;
    if (left <= 0) return;
    Element* at = gates + row * 4 * H + column;
    const int64_t cell = row * H + column;
    float i[RUN], f[RUN], g[RUN], o[RUN], before[RUN], state[RUN], dh[RUN], dc[RUN];
    load_floats(i, at, left);
    load_floats(f, at + H, left);
    load_floats(g, at + 2 * H, left);
    load_floats(o, at + 3 * H, left);
    load_floats(before, c_before + cell, left);
    load_floats(state, c + cell, left);
    load_floats(dh, grad_h + cell, left);
    load_floats(dc, grad_c + cell, left);
    #pragma unroll
    for (int k = 0; k < RUN; k++) {
        const float through = tanh_(state[k]);
        const float total = dc[k] + dh[k] * o[k] * (1.0f - through * through);
        dc[k] = total * f[k];
        const float of_i = total * g[k] * i[k] * (1.0f - i[k]);
        f[k] = total * before[k] * f[k] * (1.0f - f[k]);
        g[k] = total * i[k] * (1.0f - g[k] * g[k]);
        o[k] = dh[k] * through * o[k] * (1.0f - o[k]);
        i[k] = of_i;
    }
    store_floats(at, i, left);
    store_floats(at + H, f, left);
    store_floats(at + 2 * H, g, left);
    store_floats(at + 3 * H, o, left);
    store_floats(grad_c + cell, dc, left);
}
