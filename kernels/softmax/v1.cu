// Softmax over the last dim, forward and backward. A block processes one row, which it reads from
// memory once and then from the cache.
// minillm-build: -DELEMENT=float32
// minillm-build: -DELEMENT=bfloat16
// minillm-build: -DELEMENT=float16
// minillm-sass: softmax_forward LDG.E.128*3 STG.E.128
// minillm-sass: softmax_backward LDG.E.128*4 STG.E.128
#include "../gpu/include/vectors.cuh"

#define MOST_THREADS 512
#define LOG2_E 1.4426950408889634f

// y = exp(x - max) / sum over rows of D.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    softmax_forward(const Element* x, Element* y, int D) {
    __shared__ float shared[MOST_THREADS / 32];
    const int64_t start = (int64_t)blockIdx.x * D;
    float v[RUN], largest = -INFINITY, sum = 0.0f;
    for (int c = threadIdx.x * RUN; c < D; c += blockDim.x * RUN) {
        load_floats(v, x + start + c, D - c);
        #pragma unroll
        for (int i = 0; i < RUN; i++)
            if (c + i < D) largest = fmaxf(largest, v[i]);
    }
    largest = block_max(largest, shared);
    for (int c = threadIdx.x * RUN; c < D; c += blockDim.x * RUN) {
        load_floats(v, x + start + c, D - c);
        #pragma unroll
        for (int i = 0; i < RUN; i++)
            if (c + i < D) sum += exp2_((v[i] - largest) * LOG2_E);
    }
    const float factor = 1.0f / block_sum(sum, shared);
    for (int c = threadIdx.x * RUN; c < D; c += blockDim.x * RUN) {
        load_floats(v, x + start + c, D - c);
        #pragma unroll
        for (int i = 0; i < RUN; i++) v[i] = exp2_((v[i] - largest) * LOG2_E) * factor;
        store_floats(y + start + c, v, D - c);
    }
}

// grad = (grad_y - <grad_y, y>) y over rows of D.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    softmax_backward(const Element* grad_y, const Element* y, Element* grad, int D) {
    __shared__ float shared[MOST_THREADS / 32];
    const int64_t start = (int64_t)blockIdx.x * D;
    float g[RUN], v[RUN], along = 0.0f;
    for (int c = threadIdx.x * RUN; c < D; c += blockDim.x * RUN) {
        load_floats(g, grad_y + start + c, D - c);
        load_floats(v, y + start + c, D - c);
        #pragma unroll
        for (int i = 0; i < RUN; i++) along += g[i] * v[i];  // columns from D on are zero
    }
    along = block_sum(along, shared);
    for (int c = threadIdx.x * RUN; c < D; c += blockDim.x * RUN) {
        load_floats(g, grad_y + start + c, D - c);
        load_floats(v, y + start + c, D - c);
        #pragma unroll
        for (int i = 0; i < RUN; i++) v[i] *= g[i] - along;
        store_floats(grad + start + c, v, D - c);
    }
}
