// Embedding lookup and its backward pass without atomics.
//
// Backward takes the ids in sorted order: a warp sums the rows of a run of equal ids, in the
// tokens' order. Word frequencies are very uneven, so runs are cut at every multiple of CHUNK. Runs
// within a chunk are added to the gradient; the pieces of longer runs go to `partials`, which a
// second launch adds in order. The cuts depend on the ids only: the bits repeat.
// minillm-build: -DELEMENT=float32 -DSUM=float32
// minillm-build: -DELEMENT=bfloat16 -DSUM=bfloat16
// minillm-build: -DELEMENT=bfloat16 -DSUM=float32
// minillm-build: -DELEMENT=float16 -DSUM=float16
// minillm-sass: embedding_forward LDG.E.128*5 STG.E.128*5
// minillm-sass: embedding_backward LDG.E.128*8 STG.E.128*2
// minillm-sass: embedding_backward_long LDG.E.128*6 STG.E.128
#include "../gpu/include/vectors.cuh"

#ifndef SUM
#define SUM float32
#endif
#define WARPS 8
#define CHUNK 64

// out [num_ids, D] = rows ids - first_row of weight [V, D]; zeros for ids out of range. A warp
// copies a row.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    embedding_forward(const int64_t* ids, const Element* weight, Element* out, int64_t num_ids,
                      int64_t V, int D, int64_t first_row) {
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

// grad_weight[row] += sums, for the columns of this thread.
__device__ __forceinline__ void add_to_row(SUM* grad_weight, int64_t row, int D, int c,
                                           const float (&sums)[RUN]) {
    float total[RUN];
    load_floats(total, grad_weight + row * D + c, D - c);
    #pragma unroll
    for (int k = 0; k < RUN; k++) total[k] += sums[k];
    store_floats(grad_weight + row * D + c, total, D - c);
}

// Count the equal ids from `start` on, before `end`, at most CHUNK. Uniform over the warp.
__device__ __forceinline__ int run_length(const int64_t* sorted, int64_t start, int64_t end) {
    int length = 0;
    #pragma unroll
    for (int part = 0; part < CHUNK; part += 32) {
        const int64_t i = start + part + threadIdx.x;
        length += __popc(__ballot_sync(0xffffffffu, i < end && sorted[i] == sorted[start]));
    }
    return length;
}

// Add to row id - first_row of grad_weight [V, D] the rows of grad_y [num_ids, D] of that id;
// `order` sorts the ids into `sorted`. partials [chunks, 2, D] take the pieces of runs that cross a
// cut: at 0 the piece that begins the chunk, at 1 one that begins later.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    embedding_backward(const Element* grad_y, const int64_t* order, const int64_t* sorted,
                       SUM* grad_weight, float* partials, int64_t num_ids, int64_t V, int D,
                       int64_t first_row) {
    const int64_t chunk = blockIdx.x, begin = chunk * CHUNK,
                  end = begin + CHUNK < num_ids ? begin + CHUNK : num_ids;
    const int c = (blockIdx.y * 32 + threadIdx.x) * RUN, each = CHUNK / WARPS;
    for (int64_t start = begin + threadIdx.y * each;
         start < end && start < begin + (threadIdx.y + 1) * each; start++) {
        const int64_t id = sorted[start], row = id - first_row;
        const bool first = start == 0 || sorted[start - 1] != id;
        if (row < 0 || row >= V || !(first || start == begin)) continue;
        const int length = run_length(sorted, start, end);
        float sums[RUN] = {};
        #pragma unroll 4
        for (int i = 0; i < length; i++) {
            float v[RUN];
            load_floats(v, grad_y + order[start + i] * D + c, D - c);
            #pragma unroll
            for (int k = 0; k < RUN; k++) sums[k] += v[k];
        }
        const bool last = start + length < end || end == num_ids || sorted[end] != id;
        if (first && last)
            add_to_row(grad_weight, row, D, c, sums);
        else
            store_floats(partials + (2 * chunk + (start == begin ? 0 : 1)) * D + c, sums, D - c);
    }
}

// Add the pieces of runs that cross a cut: one warp for each chunk, for the run that begins in it.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    embedding_backward_long(const int64_t* sorted, const float* partials, SUM* grad_weight,
                            int64_t num_ids, int64_t V, int D, int64_t first_row) {
    const int64_t chunk = (int64_t)blockIdx.x * WARPS + threadIdx.y, begin = chunk * CHUNK,
                  next = begin + CHUNK;
    if (next >= num_ids) return;
    const int64_t id = sorted[next], row = id - first_row;
    if (sorted[next - 1] != id || (begin > 0 && sorted[begin - 1] == id) || row < 0 || row >= V)
        return;
    const int c = (blockIdx.y * 32 + threadIdx.x) * RUN;
    float sums[RUN], v[RUN];
    load_floats(sums, partials + (2 * chunk + (sorted[begin] == id ? 0 : 1)) * D + c, D - c);
    #pragma unroll 4
    for (int64_t k = chunk + 1; k * CHUNK < num_ids && sorted[k * CHUNK] == id; k++) {
        load_floats(v, partials + 2 * k * D + c, D - c);
        #pragma unroll
        for (int i = 0; i < RUN; i++) sums[i] += v[i];
    }
    add_to_row(grad_weight, row, D, c, sums);
}
