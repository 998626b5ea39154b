// Optimizer updates over flat buffers. Parameters and moments are float32; gradients, and the
// model's copy of the parameters, may be narrower. A thread updates four elements: 56 bytes in
// flight at float32, 28 bytes moved an element.
// minillm-build: -DELEMENT=float32 -DCOPY=float32
// minillm-build: -DELEMENT=bfloat16 -DCOPY=bfloat16
// minillm-build: -DELEMENT=float32 -DCOPY=bfloat16
// minillm-build: -DELEMENT=float16 -DCOPY=float16
// minillm-sass: adamw LDG.E.128*3 STG.E.128*3
#include "../gpu/include/vectors.cuh"

#ifndef COPY
#define COPY float32
#endif
#define THREADS 256
#define TAKEN 4

__device__ __forceinline__ int64_t first_element() {
    return ((int64_t)blockIdx.x * THREADS + threadIdx.x) * TAKEN;
}

// Apply one AdamW update: m and v follow the gradient times grad_scale times *scale_factor (null:
// 1; NaN: nothing happens), then param = keep param - rate m / (sqrt(v) inverse_root + eps), which
// is also written to `copy` unless that is null. rest1 = 1 - beta1, rest2 = 1 - beta2.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(float* param, const Element* grad, float* exp_avg, float* exp_avg_sq, COPY* copy,
          const float* scale_factor, float grad_scale, float rate, float inverse_root, float beta1,
          float rest1, float beta2, float rest2, float eps, float keep, int64_t size) {
    const int64_t first = first_element(), left = size - first;
    if (left <= 0) return;
    if (scale_factor != nullptr) grad_scale *= *scale_factor;
    if (grad_scale != grad_scale) return;
    float p[TAKEN], g[TAKEN], m[TAKEN], v[TAKEN];
    load_floats(p, param + first, left);
    load_floats(g, grad + first, left);
    load_floats(m, exp_avg + first, left);
    load_floats(v, exp_avg_sq + first, left);
    #pragma unroll
    for (int i = 0; i < TAKEN; i++) {
        g[i] *= grad_scale;
        m[i] = beta1 * m[i] + rest1 * g[i];
        v[i] = beta2 * v[i] + rest2 * g[i] * g[i];
        p[i] = keep * p[i] - rate * m[i] / (sqrtf(v[i]) * inverse_root + eps);
    }
    store_floats(param + first, p, left);
    store_floats(exp_avg + first, m, left);
    store_floats(exp_avg_sq + first, v, left);
    if (copy != nullptr) store_floats(copy + first, p, left);
}

// param -= rate *scale_factor grad (null: 1; NaN: nothing happens).
extern "C" __global__ void __launch_bounds__(THREADS)
    sgd(Element* param, const Element* grad, const float* scale_factor, float rate, int64_t size) {
    const int64_t first = first_element(), left = size - first;
    if (left <= 0) return;
    if (scale_factor != nullptr) rate *= *scale_factor;
    if (rate != rate) return;
    float p[TAKEN], g[TAKEN];
    load_floats(p, param + first, left);
    load_floats(g, grad + first, left);
    #pragma unroll
    for (int i = 0; i < TAKEN; i++) p[i] -= rate * g[i];
    store_floats(param + first, p, left);
}
