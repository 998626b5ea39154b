// Sums over the rows of a matrix: bias gradients, and the last step of every kernel whose blocks
// leave partial sums.
//
// A block sums RUN columns for each of its 32 lanes. Its 8 warps take every eighth row each, and
// their sums are added in order. For many rows, a first launch splits them over gridDim.y blocks,
// each writing one row for the second launch.
// minillm-build: -DELEMENT=float32
// minillm-build: -DELEMENT=bfloat16
// minillm-build: -DELEMENT=float16
// minillm-sass: column_sum LDG.E.128*4 STG.E.128
#include "../gpu/include/vectors.cuh"

#define WARPS 8

// out [gridDim.y, D] = sums over the rows of x [gridDim.z, rows, D], each block summing `rows_each`
// of them. The sums of a second matrix go to `second` [gridDim.y, D].
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    column_sum(const Element* x, float* out, float* second, int64_t num_rows, int64_t rows_each,
               int D) {
    __shared__ float shared[WARPS][32 * RUN];
    const int warp = threadIdx.y, c = (blockIdx.x * 32 + threadIdx.x) * RUN;
    const int64_t first = blockIdx.y * rows_each, end = min(first + rows_each, num_rows);
    const Element* matrix = x + blockIdx.z * num_rows * D;

    float sums[RUN] = {};
    #pragma unroll 4
    for (int64_t row = first + warp; row < end; row += WARPS) {
        float v[RUN];
        load_floats(v, matrix + row * D + c, D - c);
        #pragma unroll
        for (int i = 0; i < RUN; i++) sums[i] += v[i];
    }
    #pragma unroll
    for (int i = 0; i < RUN; i++) shared[warp][i * 32 + threadIdx.x] = sums[i];
    __syncthreads();
    if (warp > 0) return;
    for (int w = 1; w < WARPS; w++) {
        #pragma unroll
        for (int i = 0; i < RUN; i++) sums[i] += shared[w][i * 32 + threadIdx.x];
    }
    store_floats((blockIdx.z ? second : out) + (int64_t)blockIdx.y * D + c, sums, D - c);
}
