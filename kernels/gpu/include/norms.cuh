// Parts shared by layer norm and RMS norm. A row is held in the registers of one warp, or of one
// block of several warps if it is wide: VALUES elements a thread, in runs of 16 bytes that are a
// warp's width apart. threadIdx.x is the position within the row, threadIdx.y the row of the block.
#pragma once
#include "vectors.cuh"

#ifndef VALUES
#define VALUES 8
#endif
#define MOST_THREADS 256  // of a block

constexpr int RUNS = VALUES / RUN;

// Return the first column of run number r of this thread.
__device__ __forceinline__ int column(int r) { return (r * blockDim.x + threadIdx.x) * RUN; }

// Add the run at `from`, of which `left` elements exist, to x.
template <typename T> __device__ __forceinline__ void add_run(float (&x)[RUN], const T* from,
                                                              int left) {
    float more[RUN];
    load_floats(more, from, left);
    #pragma unroll
    for (int i = 0; i < RUN; i++) x[i] += more[i];
}

// Load the row from element `start` on of x, or of x + delta + delta_bias [D], which is then
// written to sum_out. delta, delta_bias and sum_out may be null.
__device__ __forceinline__ void load_row(float (&v)[RUNS][RUN], const Element* x,
                                         const Element* delta, const Element* delta_bias,
                                         Element* sum_out, int64_t start, int D) {
    #pragma unroll
    for (int r = 0; r < RUNS; r++) {
        const int c = column(r);
        load_floats(v[r], x + start + c, D - c);
        if (delta == nullptr) continue;
        float d[RUN];
        load_floats(d, delta + start + c, D - c);
        if (delta_bias != nullptr) add_run(d, delta_bias + c, D - c);
        // The value that backward reads.
        #pragma unroll
        for (int i = 0; i < RUN; i++) v[r][i] = rounded<Element>(v[r][i] + d[i]);
        if (sum_out != nullptr) store_floats(sum_out + start + c, v[r], D - c);
    }
}

// Store the sums over the block's rows, for each of several arrays, to partials [ARRAYS, gridDim.x,
// D]: the first row writes, each further one adds. No atomics: the bits repeat. The whole block
// calls it.
template <int ARRAYS> __device__ __forceinline__ void store_partials(
    float* partials, float (&sums)[ARRAYS][RUNS][RUN], int D) {
    for (int y = 0; y < (int)blockDim.y; y++) {
        if ((int)threadIdx.y == y) {
            #pragma unroll
            for (int array = 0; array < ARRAYS; array++) {
                float* to = partials + ((int64_t)array * gridDim.x + blockIdx.x) * D;
                #pragma unroll
                for (int r = 0; r < RUNS; r++) {
                    const int c = column(r);
                    if (y > 0) add_run(sums[array][r], to + c, D - c);
                    store_floats(to + c, sums[array][r], D - c);
                }
            }
        }
        __syncthreads();
    }
}
