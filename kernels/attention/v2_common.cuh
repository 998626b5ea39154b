// Parts shared by the kernels of v2: layout and copies of tiles in shared memory, products of a
// warp's rows with tiles, masks, and stores. v2_forward.cu gives the reasons.
#pragma once
#include "../gpu/include/ampere.cuh"
#include "common.cuh"

#ifndef HEAD_WIDTH
#define HEAD_WIDTH 64
#endif
#ifndef DROPOUT
#define DROPOUT 0
#endif
#ifndef WARPS
#define WARPS 4       // of a block
#define WARP_ROWS 32  // that a warp owns
#define LOOP 64       // rows walked over at a time
#endif

constexpr int CHUNKS = HEAD_WIDTH / 8;   // of 16 bytes in a row
constexpr int STEPS = HEAD_WIDTH / 16;   // a product takes 16 columns at a time
constexpr int BLOCKS = HEAD_WIDTH / 8;   // fragments of 8 columns in a row of sums

typedef uint32_t Fragment[4];  // 16 x 16 of a left side, or two of 16 x 8 of a right side

// Return the offset of chunk `chunk` of row `row` in a tile, in elements. Chunks are permuted in
// groups of 8. If a row is an odd multiple of 64 bytes, two neighbouring rows fill the 32 banks
// together; groups then have 4 chunks, and each pair of rows its own permutation.
constexpr int EXCHANGED = CHUNKS % 8 == 0 ? 8 : 4;
__device__ __forceinline__ int place(int row, int chunk) {
    return row * HEAD_WIDTH + 8 * (chunk ^ (EXCHANGED == 8 ? row % 8 : row / 2 % 4));
}

// Return the offset of the chunk 2 `step` after chunk 0 or 1, whose offset is `at`. 2 `step` and 0
// or 1 share no bit, so their sum is their exclusive or, which commutes with the row's. A thread
// keeps one offset a row, and the steps are constants.
__device__ __forceinline__ int further(int at, int step) {
    constexpr int STEPS_A_GROUP = EXCHANGED / 2;
    return (at ^ 16 * (step % STEPS_A_GROUP)) + 8 * EXCHANGED * (step / STEPS_A_GROUP);
}

// Start copying rows [first, first + ROWS) of a head into a tile; rows from `end` on become zero.
// EXCHANGED threads copy a row.
template <int ROWS, int THREADS>
__device__ __forceinline__ void copy_tile(Element* tile, const Element* x, int64_t stride,
                                          int first, int end) {
    // Rows at a time: a multiple of 8, so offsets differ by constants.
    constexpr int STEP = THREADS / EXCHANGED;
    static_assert(ROWS % STEP == 0 && STEP % 8 == 0, "all threads copy equally much");
    const int row = threadIdx.x / EXCHANGED, chunk = threadIdx.x % EXCHANGED;
    const Element* from = x + (first + row) * stride + 8 * chunk;
    Element* to = tile + place(row, chunk);
    #pragma unroll
    for (int r = 0; r < ROWS; r += STEP, from += STEP * stride) {
        const bool inside = first + row + r < end;
        const Element* there = inside ? from : x;
        #pragma unroll
        for (int c = 0; c < CHUNKS; c += EXCHANGED)
            cp_async_16(to + r * HEAD_WIDTH + 8 * c, there + 8 * c, inside ? 16 : 0);
    }
}

// Own rows [first, first + 16 M) of a warp as left sides, kept in registers or read each time.
template <int M, bool KEEP> struct OwnRows {
    const Element* tile;
    int first;
    Fragment kept[KEEP ? M : 1][KEEP ? STEPS : 1];

    __device__ __forceinline__ void read(Fragment& part, int m, int step) const {
        ldmatrix_x4(
            part, tile + further(place(first + LANE % 16, LANE / 16), step) + 16 * m * HEAD_WIDTH);
    }
    __device__ __forceinline__ void keep() {
        if constexpr (KEEP)
            #pragma unroll
            for (int m = 0; m < M; m++)
                #pragma unroll
                for (int step = 0; step < STEPS; step++) read(kept[m][step], m, step);
    }
    __device__ __forceinline__ void get(Fragment& part, int m, int step) const {
        if constexpr (KEEP)
            #pragma unroll
            for (int i = 0; i < 4; i++) part[i] = kept[m][step][i];
        else
            read(part, m, step);
    }
};

// Compute two products that share a left side: d0 += a b[0..1], d1 += a b[2..3].
__device__ __forceinline__ void multiply_pair(float (&d0)[4], float (&d1)[4], const Fragment& a,
                                              const Fragment& b) {
    const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma_16x8x16<Element>(d0, a, first);
    mma_16x8x16<Element>(d1, a, second);
}

// Compute dots = own rows times rows [first, first + 8 N) of the tile.
template <int M, int N, bool KEEP>
__device__ __forceinline__ void dot_rows(float (&dots)[M][N][4], const OwnRows<M, KEEP>& own,
                                         const Element* tile, int first) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int n = 0; n < N; n++)
            #pragma unroll
            for (int e = 0; e < 4; e++) dots[m][n][e] = 0;
    // No transposition: B is stored by columns, and 8 rows of the tile are 8 columns of B.
    const int at = place(first + LANE % 8 + LANE / 16 * 8, LANE / 8 % 2);
    #pragma unroll
    for (int step = 0; step < STEPS; step++) {
        Fragment left[M];
        #pragma unroll
        for (int m = 0; m < M; m++) own.get(left[m], m, step);
        #pragma unroll
        for (int n = 0; n < N; n += 2) {
            Fragment right;
            ldmatrix_x4(right, tile + further(at, step) + 8 * n * HEAD_WIDTH);
            #pragma unroll
            for (int m = 0; m < M; m++) multiply_pair(dots[m][n], dots[m][n + 1], left[m], right);
        }
    }
}

// Pack fragments n and n + 1 of scores as a left side 16 deep.
template <int M, int N>
__device__ __forceinline__ void pack_scores(Fragment (&weights)[M], const float (&scores)[M][N][4],
                                            int n) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* pair = &scores[m][n + i / 2][i % 2 * 2];
            weights[m][i] = pack2<Element>(pair[0], pair[1]);
        }
}

// Add weights times rows [first, first + 16) of the tile to sums.
template <int M>
__device__ __forceinline__ void add_weighted_rows(float (&sums)[M][BLOCKS][4],
                                                  const Fragment (&weights)[M], const Element* tile,
                                                  int first) {
    const int at = place(first + LANE % 16, LANE / 16);
    #pragma unroll
    for (int c = 0; c < BLOCKS; c += 2) {
        Fragment right;
        ldmatrix_x4_trans(right, tile + further(at, c / 2));
        #pragma unroll
        for (int m = 0; m < M; m++) multiply_pair(sums[m][c], sums[m][c + 1], weights[m], right);
    }
}

template <int M>
__device__ __forceinline__ void clear(float (&sums)[M][BLOCKS][4]) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int c = 0; c < BLOCKS; c++)
            #pragma unroll
            for (int e = 0; e < 4; e++) sums[m][c][e] = 0;
}

// Store a warp's sums, each row scaled by its factor, to rows [row, end) of a head. They pass
// through the warp's own tile rows, which no other warp reads here: fragments are 4 bytes wide, and
// coalesced stores need 16.
template <int M>
__device__ __forceinline__ void store_rows(Element* x, int64_t stride, int row, int end,
                                           const float (&sums)[M][BLOCKS][4],
                                           const float (&factor)[M][2], Element* tile, int first) {
    __syncwarp();
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int c = 0; c < BLOCKS; c++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const float* pair = &sums[m][c][2 * half];
                Element* to = tile + place(first + 16 * m + 8 * half + LANE / 4, c) + LANE % 4 * 2;
                *reinterpret_cast<uint32_t*>(to) =
                    pack2<Element>(pair[0] * factor[m][half], pair[1] * factor[m][half]);
            }
    __syncwarp();
    for (int i = LANE; i < 16 * M * CHUNKS; i += 32) {
        const int r = i / CHUNKS, chunk = i % CHUNKS;
        if (row + r < end)
            store16(x + (row + r) * stride + 8 * chunk, load16(tile + place(first + r, chunk)));
    }
}

// Set scores of hidden keys to minus infinity. Own rows are queries from `query` on, walked rows
// keys from `key` on.
template <int M, int N>
__device__ __forceinline__ void hide_keys(float (&s)[M][N][4], const Visible& visible, int query,
                                          int key) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const Range keys = visible.keys_of(query + 16 * m + 8 * half + LANE / 4);
            const int first = keys.first - key - LANE % 4 * 2, end = keys.end - key - LANE % 4 * 2;
            #pragma unroll
            for (int n = 0; n < N; n++)
                #pragma unroll
                for (int e = 0; e < 2; e++)
                    if (8 * n + e >= end || 8 * n + e < first) s[m][n][2 * half + e] = -INFINITY;
        }
}

// Compute dropout's words of a thread's own rows, which are queries.
template <int M>
__device__ __forceinline__ void query_words(uint64_t (&words)[M][2], const Attention& a,
                                            const uint64_t* head_keys, const int64_t* query_times,
                                            int b, int h, int query) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = query + 16 * m + 8 * half + LANE / 4;
            words[m][half] = row < a.num_queries
                                 ? row_word(head_keys[b * a.num_heads + h],
                                            query_times[int64_t(b) * a.num_queries + row])
                                 : uint64_t(0);
        }
}

// Return dropout's factor of key `key` for the query of `word`.
__device__ __forceinline__ float kept(const Attention& a, uint64_t word,
                                      const uint32_t* column_words, int key) {
    return key < a.num_keys && keeps(word, column_words[key], a.threshold) ? a.keep_scale : 0.0f;
}
