// Sums of arrays and of squares, without float atomics or host synchronisation: a fixed number of
// blocks each write one partial sum, and a block of a second launch adds them in order. Threads add
// in float, everything above them in double.
// minillm-build: -DELEMENT=float32
// minillm-build: -DELEMENT=bfloat16
// minillm-build: -DELEMENT=float16
// minillm-sass: sum_of_squares LDG.E.128*4
// minillm-sass: sum_arrays LDG.E.128*8 STG.E.128
#include "../gpu/include/vectors.cuh"

#define THREADS 512

// Sum x over the block, for thread 0.
__device__ __forceinline__ double block_total(double x, double* shared) {
    shared[threadIdx.x] = x;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if ((int)threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    return shared[0];
}

__device__ __forceinline__ void add_squares(float& sum, const float (&v)[RUN]) {
    #pragma unroll
    for (int i = 0; i < RUN; i++) sum += v[i] * v[i];
}

// partials [gridDim.x] = each block's share of the sum of x^2.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_of_squares(const Element* x, double* partials, int64_t size) {
    __shared__ double shared[THREADS];
    float sum = 0.0f;
    #pragma unroll 4
    for (int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * RUN; i < size;
         i += (int64_t)gridDim.x * THREADS * RUN) {
        float v[RUN];
        load_floats(v, x + i, size - i);
        add_squares(sum, v);
    }
    const double total = block_total(sum, shared);
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// out = p0 + p1 + ..., added in this order; out may be any of them, and those from num_parts on are
// null. partials as above, of out.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_arrays(Element* out, const Element* p0, const Element* p1, const Element* p2,
               const Element* p3, const Element* p4, const Element* p5, const Element* p6,
               const Element* p7, int num_parts, double* partials, int64_t size) {
    __shared__ double shared[THREADS];
    const Element* parts[8] = {p0, p1, p2, p3, p4, p5, p6, p7};
    float sum = 0.0f;
    for (int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * RUN; i < size;
         i += (int64_t)gridDim.x * THREADS * RUN) {
        float total[RUN];
        load_floats(total, p0 + i, size - i);
        #pragma unroll
        for (int k = 1; k < 8; k++) {
            if (k >= num_parts) break;
            float v[RUN];
            load_floats(v, parts[k] + i, size - i);
            #pragma unroll
            for (int j = 0; j < RUN; j++) total[j] += v[j];
        }
        #pragma unroll
        for (int j = 0; j < RUN; j++) total[j] = rounded<Element>(total[j]);
        store_floats(out + i, total, size - i);
        add_squares(sum, total);
    }
    const double total = block_total(sum, shared);
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// out [1] = the sum of partials [count], by one block.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_partials(const double* partials, double* out, int count) {
    __shared__ double shared[THREADS];
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += THREADS) sum += partials[i];
    sum = block_total(sum, shared);
    if (threadIdx.x == 0) out[0] = sum;
}
