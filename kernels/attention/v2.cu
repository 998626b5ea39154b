// Attention, variant 2: tensor cores through mma.sync, for bfloat16 and float16 on compute capability 8.0 and up. FlashAttention-2 (Dao
// 2023, arXiv:2307.08691) in spirit; the algorithm and the three kernels are those of v1.cu.
//
// What it adds, and why:
//
// * Products on tensor cores (mma.m16n8k16), with scores that never leave registers. The fragment in which a product comes out is the one
//   in which the next product takes its left side, once packed to 16 bits. So a warp owns whole rows, 16 or 32 of them, with all their
//   scores: no barrier and no shared memory between the two products, and a row's maximum is two shuffles (a row lies in 4 lanes).
//   Backward does the same with keys in the place of queries: it computes S^T, so P^T and dS^T are left sides, too.
//
//       a warp's scores, 16 rows x 8 columns a fragment:          lane l holds the pair at row l/4, columns 2(l%4), +1,
//                                                                 and the pair 8 rows further down
//                8 walked rows each                                    0 1   2 3   4 5   6 7
//           own  +----+----+----+----+                             0  l=0   l=1   l=2   l=3     e = 0, 1
//           16   |n=0 |n=1 |n=2 |n=3 |   two neighbours are        1  l=4   l=5   l=6   l=7
//           rows +----+----+----+----+   a left side 16 deep      ..
//           m=1  |    |    |    |    |                             8  l=0   l=1   l=2   l=3     e = 2, 3
//                +----+----+----+----+
//
// * Tiles in shared memory as 16-byte chunks, exchanged by xor with the row number: ldmatrix reads the same chunk of 8 rows at once, and
//   they must lie in 8 different groups of 4 banks. With 64 columns (8 chunks a row):
//
//           row 0   0 1 2 3 4 5 6 7
//           row 1   1 0 3 2 5 4 7 6        chunk c of row r lies at place c ^ (r % 8):
//           row 2   2 3 0 1 6 7 4 5        any column of this picture holds each number once
//           ..
//
// * cp.async with two buffers: the next tile travels while this one is worked on, without passing through registers. One barrier a tile.
//
// * 32 rows a warp where registers allow: what ldmatrix brings serves two products, without which shared memory, not the tensor core, is
//   the limit. Own rows stay in registers as fragments where they fit (KEEP_..), else they are read again for each tile.
//
// * The tiles that a causal mask cuts are masked, the others pay nothing; a warp passes over those that it does not see at all (at head
//   width 128, the forward pass has no registers left for that branch).
//
// Arrays are read in 16-byte pieces: pointers and strides must be multiples of 8 elements.
//
// measured: not yet
//
// minillm-sass: HMMA
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=32 -DDROPOUT=0 -DFORWARD_WARPS=4 -DFORWARD_ROWS=32 -DFORWARD_LOOP=64 -DBACKWARD_WARPS=4 -DBACKWARD_ROWS=32 -DBACKWARD_LOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=32 -DDROPOUT=1 -DFORWARD_WARPS=4 -DFORWARD_ROWS=32 -DFORWARD_LOOP=32 -DBACKWARD_WARPS=4 -DBACKWARD_ROWS=32 -DBACKWARD_LOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=64 -DDROPOUT=0 -DFORWARD_WARPS=4 -DFORWARD_ROWS=32 -DFORWARD_LOOP=64 -DBACKWARD_WARPS=4 -DBACKWARD_ROWS=32 -DBACKWARD_LOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=64 -DDROPOUT=1 -DFORWARD_WARPS=4 -DFORWARD_ROWS=32 -DFORWARD_LOOP=32 -DBACKWARD_WARPS=4 -DBACKWARD_ROWS=32 -DBACKWARD_LOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=96 -DDROPOUT=0 -DFORWARD_WARPS=4 -DFORWARD_ROWS=32 -DFORWARD_LOOP=64 -DBACKWARD_WARPS=4 -DBACKWARD_ROWS=16 -DBACKWARD_LOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=96 -DDROPOUT=1 -DFORWARD_WARPS=4 -DFORWARD_ROWS=32 -DFORWARD_LOOP=32 -DBACKWARD_WARPS=4 -DBACKWARD_ROWS=16 -DBACKWARD_LOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=128 -DDROPOUT=0 -DFORWARD_WARPS=4 -DFORWARD_ROWS=32 -DFORWARD_LOOP=48 -DBACKWARD_WARPS=8 -DBACKWARD_ROWS=16 -DBACKWARD_LOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=128 -DDROPOUT=1 -DFORWARD_WARPS=8 -DFORWARD_ROWS=16 -DFORWARD_LOOP=64 -DBACKWARD_WARPS=8 -DBACKWARD_ROWS=16 -DBACKWARD_LOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=128 -DDROPOUT=0 -DFORWARD_WARPS=4 -DFORWARD_ROWS=32 -DFORWARD_LOOP=48 -DBACKWARD_WARPS=8 -DBACKWARD_ROWS=16 -DBACKWARD_LOOP=32
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=128 -DDROPOUT=1 -DFORWARD_WARPS=8 -DFORWARD_ROWS=16 -DFORWARD_LOOP=64 -DBACKWARD_WARPS=8 -DBACKWARD_ROWS=16 -DBACKWARD_LOOP=32
// minillm-build: -DELEMENT=float16 -DHEAD_WIDTH=64 -DDROPOUT=0 -DFORWARD_WARPS=4 -DFORWARD_ROWS=32 -DFORWARD_LOOP=64 -DBACKWARD_WARPS=4 -DBACKWARD_ROWS=32 -DBACKWARD_LOOP=64
#include "../device/ampere.cuh"
#include "common.cuh"

#ifndef HEAD_WIDTH
#define HEAD_WIDTH 64
#endif
#ifndef DROPOUT
#define DROPOUT 0
#endif
#ifndef FORWARD_WARPS
#define FORWARD_WARPS 4
#define FORWARD_ROWS 32  // that a warp owns
#define FORWARD_LOOP 64  // rows walked over at a time
#define BACKWARD_WARPS 4
#define BACKWARD_ROWS 32
#define BACKWARD_LOOP 64
#endif

constexpr int CHUNKS = HEAD_WIDTH / 8;   // of 16 bytes in a row
constexpr int STEPS = HEAD_WIDTH / 16;   // a product takes 16 columns at a time
constexpr int BLOCKS = HEAD_WIDTH / 8;   // fragments of 8 columns in a row of sums

typedef uint32_t Fragment[4];  // 16 x 16 of a left side, or two of 16 x 8 of a right side

// Where chunk `chunk` of row `row` of a tile lies, in elements. Chunks change places within groups of 8. Where a row is an odd multiple of
// 64 bytes, it is two neighbours that fill the 32 banks together, so groups are of 4 and each pair of rows has its own exchange.
constexpr int EXCHANGED = CHUNKS % 8 == 0 ? 8 : 4;
__device__ __forceinline__ int place(int row, int chunk) {
    return row * HEAD_WIDTH + 8 * (chunk ^ (EXCHANGED == 8 ? row % 8 : row / 2 % 4));
}

// From the place of chunk 0 or 1 of a row to that of the chunk 2 `step` further on. As 2 `step` and that 0 or 1 have no bit in common,
// their sum is their exclusive or, which may be taken after that with the row: a thread has one place a row, and the steps are constants.
__device__ __forceinline__ int further(int at, int step) {
    constexpr int STEPS_A_GROUP = EXCHANGED / 2;
    return (at ^ 16 * (step % STEPS_A_GROUP)) + 8 * EXCHANGED * (step / STEPS_A_GROUP);
}

// Start to copy rows [first, first + ROWS) of a head into a tile; rows from `end` on become zero. EXCHANGED threads copy a row.
template <int ROWS, int THREADS>
__device__ __forceinline__ void copy_tile(Element* tile, const Element* x, int64_t stride, int first, int end) {
    constexpr int STEP = THREADS / EXCHANGED;  // rows at a time: a multiple of 8, so that the places below differ by constants
    static_assert(ROWS % STEP == 0 && STEP % 8 == 0, "all threads copy equally much");
    const int row = threadIdx.x / EXCHANGED, chunk = threadIdx.x % EXCHANGED;
    const Element* from = x + (first + row) * stride + 8 * chunk;
    Element* to = tile + place(row, chunk);
    #pragma unroll
    for (int r = 0; r < ROWS; r += STEP, from += STEP * stride) {
        const bool inside = first + row + r < end;
        const Element* there = inside ? from : x;
        #pragma unroll
        for (int c = 0; c < CHUNKS; c += EXCHANGED) cp_async_16(to + r * HEAD_WIDTH + 8 * c, there + 8 * c, inside ? 16 : 0);
    }
}

// A warp's own rows [first, first + 16 M) of a tile as left sides, kept in registers or read again each time.
template <int M, bool KEEP> struct OwnRows {
    const Element* tile;
    int first;
    Fragment kept[KEEP ? M : 1][KEEP ? STEPS : 1];

    __device__ __forceinline__ void read(Fragment& part, int m, int step) const {
        ldmatrix_x4(part, tile + further(place(first + LANE % 16, LANE / 16), step) + 16 * m * HEAD_WIDTH);
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

// Two products that share a left side: d0 += a b[0..1], d1 += a b[2..3].
__device__ __forceinline__ void multiply_pair(float (&d0)[4], float (&d1)[4], const Fragment& a, const Fragment& b) {
    const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma_16x8x16<Element>(d0, a, first);
    mma_16x8x16<Element>(d1, a, second);
}

// dots = own rows times rows [first, first + 8 N) of the tile
template <int M, int N, bool KEEP>
__device__ __forceinline__ void dot_rows(float (&dots)[M][N][4], const OwnRows<M, KEEP>& own, const Element* tile, int first) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int n = 0; n < N; n++)
            #pragma unroll
            for (int e = 0; e < 4; e++) dots[m][n][e] = 0;
    // As B is stored by columns, and 8 rows of the tile are 8 columns of B, this is no transposition.
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

// Fragments n and n + 1 of scores as a left side 16 deep.
template <int M, int N>
__device__ __forceinline__ void pack_scores(Fragment (&weights)[M], const float (&scores)[M][N][4], int n) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* pair = &scores[m][n + i / 2][i % 2 * 2];
            weights[m][i] = pack2<Element>(pair[0], pair[1]);
        }
}

// sums += weights times rows [first, first + 16) of the tile
template <int M>
__device__ __forceinline__ void add_weighted_rows(float (&sums)[M][BLOCKS][4], const Fragment (&weights)[M], const Element* tile,
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

// A warp's sums, each row times its factor, through the tile rows it owns (nobody else reads them any more) to rows [row, ..) of a head:
// fragments are 4 bytes wide, and memory wants 16.
template <int M>
__device__ __forceinline__ void store_rows(Element* x, int64_t stride, int row, int end, const float (&sums)[M][BLOCKS][4],
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
                *reinterpret_cast<uint32_t*>(to) = pack2<Element>(pair[0] * factor[m][half], pair[1] * factor[m][half]);
            }
    __syncwarp();
    for (int i = LANE; i < 16 * M * CHUNKS; i += 32) {
        const int r = i / CHUNKS, chunk = i % CHUNKS;
        if (row + r < end) store16(x + (row + r) * stride + 8 * chunk, load16(tile + place(first + r, chunk)));
    }
}

// Over the 4 lanes that hold a row.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// ---- forward

constexpr int F_ROWS = FORWARD_ROWS, F_M = F_ROWS / 16, F_N = FORWARD_LOOP / 8;  // fragments of a warp: M down, N across
constexpr int F_OWN = FORWARD_WARPS * F_ROWS, F_THREADS = 32 * FORWARD_WARPS;   // of a block
constexpr bool KEEP_QUERIES = HEAD_WIDTH <= 64;

// The running softmax of a warp's rows, 2 M of them in a thread: maximum (of scaled scores, in powers of two) and this thread's share of
// the sum.
struct Softmax {
    float m[F_M][2], l[F_M][2];
};

// Scores to probabilities relative to the new maximum. What has been added up so far shrinks to it, if any of the warp's rows has a new
// one: after the first few tiles that is rare.
__device__ __forceinline__ void softmax_step(Softmax& of, float (&s)[F_M][F_N][4], float (&sums)[F_M][BLOCKS][4], float scale) {
    #pragma unroll
    for (int m = 0; m < F_M; m++) {
        float shrink[2];
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = -INFINITY;
            #pragma unroll
            for (int n = 0; n < F_N; n++) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
            top = fmaxf(of.m[m][half], row_max(top) * scale);
            const float base = top == -INFINITY ? 0.0f : top;  // a row that has seen nothing: no infinity minus infinity
            shrink[half] = exp2_(of.m[m][half] - base);
            of.m[m][half] = top;
            float sum = 0;
            #pragma unroll
            for (int n = 0; n < F_N; n++)
                #pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    s[m][n][e] = exp2_(s[m][n][e] * scale - base);
                    sum += s[m][n][e];
                }
            of.l[m][half] = of.l[m][half] * shrink[half] + sum;
        }
        if (!__any_sync(0xffffffffu, shrink[0] != 1 || shrink[1] != 1)) continue;
        #pragma unroll
        for (int c = 0; c < BLOCKS; c++)
            #pragma unroll
            for (int e = 0; e < 4; e++) sums[m][c][e] *= shrink[e / 2];
    }
}

// Minus infinity where a key is not seen. Own rows are queries from `query` on, walked rows keys from `key` on.
template <int M, int N>
__device__ __forceinline__ void hide_later_keys(float (&s)[M][N][4], const Attention& a, const int* limits, int query, int key) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int limit = limit_of(a, limits, query + 16 * m + 8 * half + LANE / 4) - key - LANE % 4 * 2;
            #pragma unroll
            for (int n = 0; n < N; n++)
                #pragma unroll
                for (int e = 0; e < 2; e++)
                    if (8 * n + e >= limit) s[m][n][2 * half + e] = -INFINITY;
        }
}
template <int M, int N>
__device__ __forceinline__ void hide_masked_keys(float (&s)[M][N][4], const uint8_t* key_mask, int num_keys, int key) {
    #pragma unroll
    for (int n = 0; n < N; n++)
        #pragma unroll
        for (int e = 0; e < 2; e++) {
            const int column = key + 8 * n + LANE % 4 * 2 + e;
            const bool seen = column < num_keys && key_mask[column];
            #pragma unroll
            for (int m = 0; m < M; m++)
                if (!seen) s[m][n][e] = s[m][n][2 + e] = -INFINITY;
        }
}

// Dropout's words of a thread's 2 M own rows, which are queries.
template <int M>
__device__ __forceinline__ void query_words(uint64_t (&words)[M][2], const Attention& a, const uint64_t* head_keys,
                                            const int64_t* query_times, int row_of_head, int query) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = query + 16 * m + 8 * half + LANE / 4;
            words[m][half] = row < a.num_queries ? row_word(head_keys[row_of_head], query_times[row]) : uint64_t(0);
        }
}

// What dropout multiplies walked key `key` of own query (m, half) by.
__device__ __forceinline__ float kept(const Attention& a, uint64_t word, const uint32_t* column_words, int key) {
    return key < a.num_keys && keeps(word, column_words[key], a.threshold) ? a.keep_scale : 0.0f;
}

// Grid (query tiles, heads, samples). o [B, Tq, H, K]; lse [B, H, Tq].
extern "C" __global__ void __launch_bounds__(F_THREADS) attention_forward(
    const Element* q, const Element* k, const Element* v, Element* o, float* lse, const int* limits, const uint8_t* key_mask,
    const uint64_t* head_keys, const int64_t* query_times, const uint32_t* column_words, const Attention a) {
    constexpr int TILE = FORWARD_LOOP * HEAD_WIDTH;
    Element* q_tile = dynamic_shared<Element>();             // [F_OWN]
    Element* k_tiles = q_tile + F_OWN * HEAD_WIDTH;          // [2][FORWARD_LOOP]
    Element* v_tiles = k_tiles + 2 * TILE;                   // [2][FORWARD_LOOP]
    const int h = blockIdx.y, b = blockIdx.z, kv_head = h / (a.num_heads / a.num_kv_heads), row_of_head = b * a.num_heads + h;
    const int first = (gridDim.x - 1 - blockIdx.x) * F_OWN;  // under a causal mask the last queries see most: the longest work starts first
    const int own = WARP * F_ROWS;                           // this warp's rows of the tile
    k = head_start(k, a.k, b, kv_head);
    v = head_start(v, a.v, b, kv_head);
    if (key_mask) key_mask += int64_t(b) * a.num_keys;
    const Limits seen = limits_of(a, limits, first + own, F_ROWS);  // by this warp
    const int stop = limits_of(a, limits, first, F_OWN).most;       // by the block
    const float scale = a.scale * LOG2_E;

    copy_tile<F_OWN, F_THREADS>(q_tile, head_start(q, a.q, b, h), a.q.time, first, a.num_queries);
    if (stop > 0) {
        copy_tile<FORWARD_LOOP, F_THREADS>(k_tiles, k, a.k.time, 0, a.num_keys);
        copy_tile<FORWARD_LOOP, F_THREADS>(v_tiles, v, a.v.time, 0, a.num_keys);
    }
    cp_async_commit();
    OwnRows<F_M, KEEP_QUERIES> queries = {q_tile, own};
    float sums[F_M][BLOCKS][4];
    clear(sums);
    Softmax softmax;
    #pragma unroll
    for (int m = 0; m < F_M; m++) softmax.m[m][0] = softmax.m[m][1] = -INFINITY, softmax.l[m][0] = softmax.l[m][1] = 0;
#if DROPOUT
    uint64_t words[F_M][2];
    query_words(words, a, head_keys, query_times, row_of_head, first + own);
#endif

    for (int key = 0, buffer = 0; key < stop; key += FORWARD_LOOP, buffer ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile has arrived for all, and nobody reads the other buffer any more
        if (key == 0) queries.keep();
        if (key + FORWARD_LOOP < stop) {
            copy_tile<FORWARD_LOOP, F_THREADS>(k_tiles + (buffer ^ 1) * TILE, k, a.k.time, key + FORWARD_LOOP, a.num_keys);
            copy_tile<FORWARD_LOOP, F_THREADS>(v_tiles + (buffer ^ 1) * TILE, v, a.v.time, key + FORWARD_LOOP, a.num_keys);
            cp_async_commit();
        }
        if (HEAD_WIDTH < 128 && key >= seen.most) continue;  // at 128 the branch takes registers that are not there
        float s[F_M][F_N][4];
        dot_rows(s, queries, k_tiles + buffer * TILE, 0);
        if (key + FORWARD_LOOP > seen.least) hide_later_keys(s, a, limits, first + own, key);
        if (key_mask) hide_masked_keys(s, key_mask, a.num_keys, key);
        WATCH(S, s);
        softmax_step(softmax, s, sums, scale);
        WATCH(m, softmax.m);
        WATCH(l, softmax.l);
#if DROPOUT
        #pragma unroll
        for (int m = 0; m < F_M; m++)
            #pragma unroll
            for (int n = 0; n < F_N; n++)
                #pragma unroll
                for (int e = 0; e < 4; e++) s[m][n][e] *= kept(a, words[m][e / 2], column_words, key + 8 * n + LANE % 4 * 2 + e % 2);
#endif
        #pragma unroll
        for (int n = 0; n < F_N; n += 2) {
            Fragment weights[F_M];
            pack_scores(weights, s, n);
            add_weighted_rows(sums, weights, v_tiles + buffer * TILE, 8 * n);
        }
    }
    cp_async_wait<0>();  // where no key is seen, the copy of the queries is still under way
    __syncthreads();

    float factor[F_M][2];
    #pragma unroll
    for (int m = 0; m < F_M; m++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = first + own + 16 * m + 8 * half + LANE / 4;
            const float total = row_sum(softmax.l[m][half]);
            factor[m][half] = total > 0 ? 1 / total : 0.0f;
            if (LANE % 4 == 0 && query < a.num_queries)
                lse[int64_t(row_of_head) * a.num_queries + query] = (softmax.m[m][half] + log2_(total)) * LN_2;
        }
    store_rows(head_start(o, a.o, b, h), a.o.time, first + own, a.num_queries, sums, factor, q_tile, own);
}

// ---- backward

// Walked rows are taken in slices: their scores, of two products, share the registers with two sums.
constexpr int B_ROWS = BACKWARD_ROWS, B_M = B_ROWS / 16, B_SLICE = B_M == 1 ? 32 : 16, B_N = B_SLICE / 8;
constexpr int B_OWN = BACKWARD_WARPS * B_ROWS, B_THREADS = 32 * BACKWARD_WARPS;
constexpr bool KEEP_OWN = B_M * HEAD_WIDTH <= 64;  // both own tiles as fragments
constexpr float NEVER = INFINITY;                  // the log-sum-exp of a query that sees nothing: its probabilities are exp2(-inf) = 0

// What every entry of a row of P and dP is lowered by, padded so that it can be copied like a tile: for each sample and head a row of
// `padded` floats, lse in powers of two and delta = <grad_o, o>. Grid (padded / 8, heads, samples), a warp a query.
extern "C" __global__ void __launch_bounds__(256) attention_delta(
    const Element* grad_o, const Element* o, const float* lse, float* lse_2, float* delta, int padded, const Attention a) {
    const int h = blockIdx.y, b = blockIdx.z, query = blockIdx.x * 8 + WARP, row_of_head = b * a.num_heads + h;
    const bool inside = query < a.num_queries;
    float sum = 0;
    if (inside && LANE < CHUNKS) {
        const Pack16<Element> g = load16(head_start(grad_o, a.grad_o, b, h) + query * a.grad_o.time + 8 * LANE);
        const Pack16<Element> y = load16(head_start(o, a.o, b, h) + query * a.o.time + 8 * LANE);
        #pragma unroll
        for (int i = 0; i < 8; i++) sum += to_float(g.v[i]) * to_float(y.v[i]);
    }
    sum = warp_sum(sum);
    if (LANE) return;
    const float kept = inside ? lse[int64_t(row_of_head) * a.num_queries + query] : -INFINITY;
    lse_2[int64_t(row_of_head) * padded + query] = kept == -INFINITY ? NEVER : kept * LOG2_E;
    delta[int64_t(row_of_head) * padded + query] = sum;
}

// From the dot products q.k and grad_o.v to what multiplies grad_o (p) and what multiplies q and k (grad_s).
__device__ __forceinline__ void probability(float& p, float& grad_s, float scale, float lse_2, float delta, float factor) {
    const float before = exp2_(p * scale - lse_2);
    p = before * factor;
    grad_s = before * (grad_s * factor - delta);
}

// The same for own rows that are keys from `key` on, and walked rows that are queries from `query` on.
template <int M, int N>
__device__ __forceinline__ void hide_earlier_queries(float (&s)[M][N][4], const Attention& a, const int* limits, int key, int query) {
    #pragma unroll
    for (int n = 0; n < N; n++)
        #pragma unroll
        for (int e = 0; e < 2; e++) {
            const int limit = limit_of(a, limits, query + 8 * n + LANE % 4 * 2 + e) - key - LANE / 4;
            #pragma unroll
            for (int m = 0; m < M; m++)
                #pragma unroll
                for (int half = 0; half < 2; half++)
                    if (16 * m + 8 * half >= limit) s[m][n][2 * half + e] = -INFINITY;
        }
}

// The probabilities of a warp's own keys, from `key` on, for the walked queries of a slice, whose statistics lie in shared memory.
template <int M, int N>
__device__ __forceinline__ void probabilities_of_keys(float (&s)[M][N][4], float (&grad_s)[M][N][4], const Attention& a, float scale,
                                                      const float* lse_2, const float* delta, const uint64_t* words,
                                                      const uint32_t* column_words, int key) {
    #pragma unroll
    for (int n = 0; n < N; n++)
        #pragma unroll
        for (int e = 0; e < 2; e++) {
            const int query = 8 * n + LANE % 4 * 2 + e;
            const float lse_here = lse_2[query], delta_here = delta[query];
            #pragma unroll
            for (int m = 0; m < M; m++)
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float factor = DROPOUT ? kept(a, words[query], column_words, key + 16 * m + 8 * half + LANE / 4) : 1.0f;
                    probability(s[m][n][2 * half + e], grad_s[m][n][2 * half + e], scale, lse_here, delta_here, factor);
                }
        }
}

// A warp's own keys that the mask hides get no gradient, whatever was added up for them.
template <int M>
__device__ __forceinline__ void drop_masked_keys(float (&sums)[M][BLOCKS][4], const uint8_t* key_mask, int num_keys, int key) {
    #pragma unroll
    for (int m = 0; m < M; m++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = key + 16 * m + 8 * half + LANE / 4;
            if (row < num_keys && key_mask[row]) continue;
            #pragma unroll
            for (int c = 0; c < BLOCKS; c++) sums[m][c][2 * half] = sums[m][c][2 * half + 1] = 0;
        }
}

// Grid (key tiles, key-value heads, samples). The queries of all heads that read a key-value head come one head after another.
extern "C" __global__ void __launch_bounds__(B_THREADS) attention_grad_kv(
    const Element* grad_o, const Element* q, const Element* k, const Element* v, const float* lse_2, const float* delta, int padded,
    Element* grad_k, Element* grad_v, const int* limits, const uint8_t* key_mask, const uint64_t* head_keys, const int64_t* query_times,
    const uint32_t* column_words, const Attention a) {
    constexpr int TILE = BACKWARD_LOOP * HEAD_WIDTH;
    Element* k_tile = dynamic_shared<Element>();             // [B_OWN]
    Element* v_tile = k_tile + B_OWN * HEAD_WIDTH;           // [B_OWN]
    Element* q_tiles = v_tile + B_OWN * HEAD_WIDTH;          // [2][BACKWARD_LOOP]
    Element* grad_o_tiles = q_tiles + 2 * TILE;              // [2][BACKWARD_LOOP]
    float* lse_tiles = reinterpret_cast<float*>(grad_o_tiles + 2 * TILE);  // [2][BACKWARD_LOOP]
    float* delta_tiles = lse_tiles + 2 * BACKWARD_LOOP;      // [2][BACKWARD_LOOP]
    uint64_t* word_tiles = reinterpret_cast<uint64_t*>(delta_tiles + 2 * BACKWARD_LOOP);  // [2][BACKWARD_LOOP], if there is dropout
    const int kv_head = blockIdx.y, b = blockIdx.z, group = a.num_heads / a.num_kv_heads;
    const int first = blockIdx.x * B_OWN, own = WARP * B_ROWS;
    if (key_mask) key_mask += int64_t(b) * a.num_keys;
    const float scale = a.scale * LOG2_E;

    // Step i walks over queries [start + i % tiles * LOOP, ..) of head i / tiles of the group.
    const int start = first_query_seeing(a, limits, first, BACKWARD_LOOP);
    const int tiles = start < a.num_queries ? (a.num_queries - start + BACKWARD_LOOP - 1) / BACKWARD_LOOP : 0, steps = group * tiles;
    auto copy_step = [&](int step, int buffer) {
        const int h = kv_head * group + step / tiles, query = start + step % tiles * BACKWARD_LOOP, row_of_head = b * a.num_heads + h;
        const Element *q_head = head_start(q, a.q, b, h), *grad_o_head = head_start(grad_o, a.grad_o, b, h);
        copy_tile<BACKWARD_LOOP, B_THREADS>(q_tiles + buffer * TILE, q_head, a.q.time, query, a.num_queries);
        copy_tile<BACKWARD_LOOP, B_THREADS>(grad_o_tiles + buffer * TILE, grad_o_head, a.grad_o.time, query, a.num_queries);
        const int i = threadIdx.x;
        if (i < BACKWARD_LOOP / 4) {
            const int64_t from = int64_t(row_of_head) * padded + query + 4 * i;
            cp_async_16(lse_tiles + buffer * BACKWARD_LOOP + 4 * i, lse_2 + from);
            cp_async_16(delta_tiles + buffer * BACKWARD_LOOP + 4 * i, delta + from);
        }
        if (DROPOUT && i < BACKWARD_LOOP) {
            const bool inside = query + i < a.num_queries;
            word_tiles[buffer * BACKWARD_LOOP + i] = inside ? row_word(head_keys[row_of_head], query_times[query + i]) : uint64_t(0);
        }
    };

    copy_tile<B_OWN, B_THREADS>(k_tile, head_start(k, a.k, b, kv_head), a.k.time, first, a.num_keys);
    copy_tile<B_OWN, B_THREADS>(v_tile, head_start(v, a.v, b, kv_head), a.v.time, first, a.num_keys);
    if (steps > 0) copy_step(0, 0);
    cp_async_commit();
    OwnRows<B_M, KEEP_OWN> keys = {k_tile, own}, values = {v_tile, own};
    float k_sums[B_M][BLOCKS][4], v_sums[B_M][BLOCKS][4];
    clear(k_sums);
    clear(v_sums);

    for (int step = 0; step < steps; step++) {
        const int buffer = step % 2;
        cp_async_wait<0>();
        __syncthreads();
        if (step == 0) keys.keep(), values.keep();
        if (step + 1 < steps) {
            copy_step(step + 1, buffer ^ 1);
            cp_async_commit();
        }
        const Element *q_tile = q_tiles + buffer * TILE, *grad_o_tile = grad_o_tiles + buffer * TILE;
        const int query = start + step % tiles * BACKWARD_LOOP;
        #pragma unroll 1
        for (int slice = 0; slice < BACKWARD_LOOP; slice += B_SLICE) {
            float s[B_M][B_N][4], grad_s[B_M][B_N][4];
            const Limits seen = limits_of(a, limits, query + slice, B_SLICE);
            if (seen.most <= first + own) continue;  // none of this warp's keys
            dot_rows(s, keys, q_tile, slice);
            dot_rows(grad_s, values, grad_o_tile, slice);
            if (seen.least < first + own + B_ROWS) hide_earlier_queries(s, a, limits, first + own, query + slice);
            const int at = buffer * BACKWARD_LOOP + slice;
            const uint64_t* words = DROPOUT ? word_tiles + at : nullptr;
            probabilities_of_keys(s, grad_s, a, scale, lse_tiles + at, delta_tiles + at, words, column_words, first + own);
            WATCH(P, s);
            WATCH(dS, grad_s);
            #pragma unroll
            for (int n = 0; n < B_N; n += 2) {
                Fragment weights[B_M];
                pack_scores(weights, s, n);
                add_weighted_rows(v_sums, weights, grad_o_tile, slice + 8 * n);
                pack_scores(weights, grad_s, n);
                add_weighted_rows(k_sums, weights, q_tile, slice + 8 * n);
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();

    if (key_mask) {
        drop_masked_keys(k_sums, key_mask, a.num_keys, first + own);
        drop_masked_keys(v_sums, key_mask, a.num_keys, first + own);
    }
    float factor[B_M][2];
    #pragma unroll
    for (int m = 0; m < B_M; m++) factor[m][0] = factor[m][1] = a.scale;
    store_rows(head_start(grad_k, a.grad_k, b, kv_head), a.grad_k.time, first + own, a.num_keys, k_sums, factor, k_tile, own);
    #pragma unroll
    for (int m = 0; m < B_M; m++) factor[m][0] = factor[m][1] = 1;
    store_rows(head_start(grad_v, a.grad_v, b, kv_head), a.grad_v.time, first + own, a.num_keys, v_sums, factor, v_tile, own);
}

// Grid (query tiles, heads, samples).
extern "C" __global__ void __launch_bounds__(B_THREADS) attention_grad_q(
    const Element* grad_o, const Element* q, const Element* k, const Element* v, const float* lse_2, const float* delta, int padded,
    Element* grad_q, const int* limits, const uint8_t* key_mask, const uint64_t* head_keys, const int64_t* query_times,
    const uint32_t* column_words, const Attention a) {
    constexpr int TILE = BACKWARD_LOOP * HEAD_WIDTH;
    Element* q_tile = dynamic_shared<Element>();             // [B_OWN]
    Element* grad_o_tile = q_tile + B_OWN * HEAD_WIDTH;      // [B_OWN]
    Element* k_tiles = grad_o_tile + B_OWN * HEAD_WIDTH;     // [2][BACKWARD_LOOP]
    Element* v_tiles = k_tiles + 2 * TILE;                   // [2][BACKWARD_LOOP]
    const int h = blockIdx.y, b = blockIdx.z, kv_head = h / (a.num_heads / a.num_kv_heads), row_of_head = b * a.num_heads + h;
    const int first = (gridDim.x - 1 - blockIdx.x) * B_OWN, own = WARP * B_ROWS;
    k = head_start(k, a.k, b, kv_head);
    v = head_start(v, a.v, b, kv_head);
    if (key_mask) key_mask += int64_t(b) * a.num_keys;
    const Limits seen = limits_of(a, limits, first + own, B_ROWS);
    const int stop = limits_of(a, limits, first, B_OWN).most;
    const float scale = a.scale * LOG2_E;

    copy_tile<B_OWN, B_THREADS>(q_tile, head_start(q, a.q, b, h), a.q.time, first, a.num_queries);
    copy_tile<B_OWN, B_THREADS>(grad_o_tile, head_start(grad_o, a.grad_o, b, h), a.grad_o.time, first, a.num_queries);
    if (stop > 0) {
        copy_tile<BACKWARD_LOOP, B_THREADS>(k_tiles, k, a.k.time, 0, a.num_keys);
        copy_tile<BACKWARD_LOOP, B_THREADS>(v_tiles, v, a.v.time, 0, a.num_keys);
    }
    cp_async_commit();
    OwnRows<B_M, KEEP_OWN> queries = {q_tile, own}, grads = {grad_o_tile, own};
    float sums[B_M][BLOCKS][4], lse_here[B_M][2], delta_here[B_M][2];
    clear(sums);
    #pragma unroll
    for (int m = 0; m < B_M; m++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = first + own + 16 * m + 8 * half + LANE / 4;
            const bool inside = query < a.num_queries;
            lse_here[m][half] = inside ? lse_2[int64_t(row_of_head) * padded + query] : NEVER;
            delta_here[m][half] = inside ? delta[int64_t(row_of_head) * padded + query] : 0.0f;
        }
#if DROPOUT
    uint64_t words[B_M][2];
    query_words(words, a, head_keys, query_times, row_of_head, first + own);
#endif

    for (int key = 0, buffer = 0; key < stop; key += BACKWARD_LOOP, buffer ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        if (key == 0) queries.keep(), grads.keep();
        if (key + BACKWARD_LOOP < stop) {
            copy_tile<BACKWARD_LOOP, B_THREADS>(k_tiles + (buffer ^ 1) * TILE, k, a.k.time, key + BACKWARD_LOOP, a.num_keys);
            copy_tile<BACKWARD_LOOP, B_THREADS>(v_tiles + (buffer ^ 1) * TILE, v, a.v.time, key + BACKWARD_LOOP, a.num_keys);
            cp_async_commit();
        }
        const Element *k_tile = k_tiles + buffer * TILE, *v_tile = v_tiles + buffer * TILE;
        #pragma unroll 1
        for (int slice = 0; slice < BACKWARD_LOOP; slice += B_SLICE) {
            if (key + slice >= seen.most) break;
            float s[B_M][B_N][4], grad_s[B_M][B_N][4];
            dot_rows(s, queries, k_tile, slice);
            dot_rows(grad_s, grads, v_tile, slice);
            if (key + slice + B_SLICE > seen.least) hide_later_keys(s, a, limits, first + own, key + slice);
            if (key_mask) hide_masked_keys(s, key_mask, a.num_keys, key + slice);
            #pragma unroll
            for (int m = 0; m < B_M; m++)
                #pragma unroll
                for (int n = 0; n < B_N; n++)
                    #pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float factor = 1;
#if DROPOUT
                        factor = kept(a, words[m][e / 2], column_words, key + slice + 8 * n + LANE % 4 * 2 + e % 2);
#endif
                        probability(s[m][n][e], grad_s[m][n][e], scale, lse_here[m][e / 2], delta_here[m][e / 2], factor);
                    }
            WATCH(P, s);
            WATCH(dS, grad_s);
            #pragma unroll
            for (int n = 0; n < B_N; n += 2) {
                Fragment weights[B_M];
                pack_scores(weights, grad_s, n);
                add_weighted_rows(sums, weights, k_tile, slice + 8 * n);
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();

    float factor[B_M][2];
    #pragma unroll
    for (int m = 0; m < B_M; m++) factor[m][0] = factor[m][1] = a.scale;
    store_rows(head_start(grad_q, a.grad_q, b, h), a.grad_q.time, first + own, a.num_queries, sums, factor, q_tile, own);
}
