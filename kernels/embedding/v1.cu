// Embedding lookup and its backward pass without atomics.
//
// Backward is given the ids in sorted order: equal ids lie side by side, and the block at the first of them adds up their rows, each of its
// 8 warps every eighth, then the warps in order. All other blocks end at once. The sum's order is the tokens' order, so the bits repeat.
// minillm-build: -DELEMENT=float32 -DSUM=float32
// minillm-build: -DELEMENT=bfloat16 -DSUM=bfloat16
// minillm-build: -DELEMENT=bfloat16 -DSUM=float32
// minillm-build: -DELEMENT=float16 -DSUM=float16
#include "../device/vectors.cuh"

#ifndef SUM
#define SUM float32
#endif
#define WARPS 8

// out [num_ids, D] = rows ids - first_row of weight [V, D]; zeros where there is no such row. A warp copies a row.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    embedding_forward(const int64_t* ids, const Element* weight, Element* out, int64_t num_ids, int64_t V, int D, int64_t first_row) {
    const int64_t token = (int64_t)blockIdx.x * WARPS + threadIdx.y;
    if (token >= num_ids) return;
    const int64_t row = ids[token] - first_row;
    const bool known = row >= 0 && row < V;
    #pragma unroll 4
    for (int c = threadIdx.x * RUN; c < D; c += 32 * RUN) {
        float v[RUN] = {};
        if (known) load_floats(v, weight + row * D + c, D - c);
        store_floats(out + token * D + c, v, D - c);
    }
}

// Add to row ids - first_row of grad_weight [V, D] the rows of grad_y [num_ids, D] of that id. `order` sorts the ids into `sorted`.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    embedding_backward(const Element* grad_y, const int64_t* order, const int64_t* sorted, SUM* grad_weight, int64_t num_ids, int64_t V,
                       int D, int64_t first_row) {
    __shared__ float shared[WARPS][RUN][32];
    const int64_t start = blockIdx.x, id = sorted[start], row = id - first_row;
    if (row < 0 || row >= V || (start > 0 && sorted[start - 1] == id)) return;  // the whole block

    const int c = (blockIdx.y * 32 + threadIdx.x) * RUN, warp = threadIdx.y;
    float sums[RUN] = {};
    for (int64_t i = start + warp; i < num_ids && sorted[i] == id; i += WARPS) {
        float v[RUN];
        load_floats(v, grad_y + order[i] * D + c, D - c);
        #pragma unroll
        for (int k = 0; k < RUN; k++) sums[k] += v[k];
    }
    #pragma unroll
    for (int k = 0; k < RUN; k++) shared[warp][k][threadIdx.x] = sums[k];
    __syncthreads();
    if (warp > 0) return;
    for (int w = 1; w < WARPS; w++) {
        #pragma unroll
        for (int k = 0; k < RUN; k++) sums[k] += shared[w][k][threadIdx.x];
    }
    float old[RUN];
    load_floats(old, grad_weight + row * D + c, D - c);
    #pragma unroll
    for (int k = 0; k < RUN; k++) sums[k] += old[k];
    store_floats(grad_weight + row * D + c, sums, D - c);
}
