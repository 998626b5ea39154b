// Dropout whose masks are addressed: the bits of kernels/random/hashing.py.
//
// A first launch hashes every row address (sample, time) to 64 bits and every column address to 32;
// a few 32-bit steps mix each pair, since one 64-bit hash an element would take longer than the
// memory traffic.
// minillm-build: -DELEMENT=float32
// minillm-build: -DELEMENT=bfloat16
// minillm-build: -DELEMENT=float16
// minillm-sass: dropout LDG.E.128*2 STG.E.128*2
#include "../gpu/include/hashing.cuh"
#include "../gpu/include/vectors.cuh"

#define WARPS 8

// rows [B, T]: the words of (samples[b], times[t]); columns [C]: those of channels[c].
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    dropout_words(const int64_t* samples, const int64_t* times, const int64_t* channels,
                  uint64_t* rows, uint32_t* columns, int64_t num_rows, int T, int C, uint64_t key,
                  uint64_t column_key) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < num_rows)
        rows[i] = random_bits(key, (uint64_t)samples[i / T] << 32 | (uint64_t)times[i % T]);
    if (i < C) columns[i] = (uint32_t)(random_bits(column_key, (uint64_t)channels[i]) >> 32);
}

// y = x times `scale` where the mixed word reaches `threshold`, else 0; y may be x. A lane keeps
// its columns, so that their words stay in registers.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    dropout(const Element* x, Element* y, const uint64_t* rows, const uint32_t* columns,
            int64_t num_rows, int C, uint32_t threshold, float scale) {
    const int c = (blockIdx.x * 32 + threadIdx.x) * RUN;
    if (c >= C) return;
    uint32_t words[RUN];
    #pragma unroll
    for (int i = 0; i < RUN; i++) words[i] = c + i < C ? columns[c + i] : 0;
    #pragma unroll 2
    for (int64_t row = (int64_t)blockIdx.y * WARPS + threadIdx.y; row < num_rows;
         row += (int64_t)gridDim.y * WARPS) {
        const uint64_t word = rows[row];
        float v[RUN];
        load_floats(v, x + row * C + c, C - c);
        #pragma unroll
        for (int i = 0; i < RUN; i++) v[i] = keeps(word, words[i], threshold) ? v[i] * scale : 0.0f;
        store_floats(y + row * C + c, v, C - c);
    }
}
