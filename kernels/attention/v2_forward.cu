// Attention forward, variant 2: tensor cores through mma.sync, for bfloat16 and float16 on compute
// capability 8.0 and up. After FlashAttention-2 (Dao 2023, arXiv:2307.08691); the algorithm is that
// of v1.cu.
//
// Differences from v1, with reasons:
//
// * Products on tensor cores (mma.m16n8k16), with scores that stay in registers. An output
//   fragment, packed to 16 bits, is the left fragment of the next product. A warp owns 16 or 32
//   whole rows with all their scores: no barrier and no shared memory between the products. A row
//   lies in 4 lanes, so its maximum takes two shuffles.
//
//       a warp's scores, 16 x 8 a fragment:             lane l: the pair at row l/4, columns
//                                                       2(l%4), +1, and the pair 8 rows below
//                8 walked rows each                          0 1   2 3   4 5   6 7
//           own  +----+----+----+----+                   0  l=0   l=1   l=2   l=3     e = 0, 1
//           16   |n=0 |n=1 |n=2 |n=3 |                   1  l=4   l=5   l=6   l=7
//           rows +----+----+----+----+                  ..
//           m=1  |    |    |    |    |                   8  l=0   l=1   l=2   l=3     e = 2, 3
//                +----+----+----+----+
//                two neighbours: a left side 16 deep
//
// * Tiles in shared memory as 16-byte chunks, permuted by xor with the row number: ldmatrix reads
//   the same chunk of 8 rows at once, and they must lie in 8 different groups of 4 banks. With 64
//   columns (8 chunks a row):
//
//           row 0   0 1 2 3 4 5 6 7
//           row 1   1 0 3 2 5 4 7 6        chunk c of row r lies at place c ^ (r % 8):
//           row 2   2 3 0 1 6 7 4 5        any column of this picture holds each number once
//           ..
//
// * cp.async with two buffers: the next tile is copied during the work on this one, without
//   registers. One barrier a tile.
//
// * 32 rows a warp where registers allow: each ldmatrix serves two products; with one, shared
//   memory is the limit. Own rows stay in registers as fragments where they fit (KEEP_..), else
//   each tile reads them.
//
// * Only tiles that a mask cuts are masked. A warp skips tiles that it does not see (except in the
//   forward pass at head width 128, which has no registers left for the branch).
//
// Arrays are read in 16-byte pieces: pointers and strides must be multiples of 8 elements.
//
// measured: not yet
//
// minillm-sass: attention_forward HMMA*32 LDSM*8 LDGSTS.E.BYPASS.128 STG.E.128
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=32 -DDROPOUT=0 -DWARPS=4 -DWARP_ROWS=32 -DLOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=32 -DDROPOUT=1 -DWARPS=4 -DWARP_ROWS=32 -DLOOP=32
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=64 -DDROPOUT=0 -DWARPS=4 -DWARP_ROWS=32 -DLOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=64 -DDROPOUT=1 -DWARPS=4 -DWARP_ROWS=32 -DLOOP=32
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=96 -DDROPOUT=0 -DWARPS=4 -DWARP_ROWS=32 -DLOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=96 -DDROPOUT=1 -DWARPS=4 -DWARP_ROWS=32 -DLOOP=32
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=128 -DDROPOUT=0 -DWARPS=4 -DWARP_ROWS=32 -DLOOP=48
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=128 -DDROPOUT=1 -DWARPS=8 -DWARP_ROWS=16 -DLOOP=64
// minillm-build: -DELEMENT=float16 -DHEAD_WIDTH=64 -DDROPOUT=0 -DWARPS=4 -DWARP_ROWS=32 -DLOOP=64
#include "v2_common.cuh"

constexpr int DOWN = WARP_ROWS / 16, ACROSS = LOOP / 8;       // fragments of a warp's scores
constexpr int OWN = WARPS * WARP_ROWS, THREADS = 32 * WARPS;  // of a block
constexpr bool KEEP_QUERIES = HEAD_WIDTH <= 64;

// Reduce over the 4 lanes of a row.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Running softmax of a warp's rows, two a fragment in a thread: maximum of scaled scores in powers
// of two, and this thread's share of the sum.
struct Softmax {
    float m[DOWN][2], l[DOWN][2];
};

// Turn scores into probabilities relative to the new maximum. Sums are rescaled if any row of the
// warp has a new maximum, which is rare after the first few tiles.
__device__ __forceinline__ void softmax_step(Softmax& of, float (&s)[DOWN][ACROSS][4],
                                             float (&sums)[DOWN][BLOCKS][4], float scale) {
    #pragma unroll
    for (int m = 0; m < DOWN; m++) {
        float shrink[2];
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = -INFINITY;
            #pragma unroll
            for (int n = 0; n < ACROSS; n++)
                top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
            top = fmaxf(of.m[m][half], row_max(top) * scale);
            const float base = top == -INFINITY ? 0.0f : top;  // no key seen yet: avoid inf - inf
            shrink[half] = exp2_(of.m[m][half] - base);
            of.m[m][half] = top;
            float sum = 0;
            #pragma unroll
            for (int n = 0; n < ACROSS; n++)
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

// Grid (query tiles, heads, samples). o [B, Tq, H, K]; lse [B, H, Tq].
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_forward(const Element* q, const Element* k, const Element* v, Element* o, float* lse,
                      const int* tables, const uint64_t* head_keys, const int64_t* query_times,
                      const uint32_t* column_words, const Attention a) {
    constexpr int TILE = LOOP * HEAD_WIDTH;
    Element* q_tile = dynamic_shared<Element>();   // [OWN]
    Element* k_tiles = q_tile + OWN * HEAD_WIDTH;  // [2][LOOP]
    Element* v_tiles = k_tiles + 2 * TILE;         // [2][LOOP]
    const int h = blockIdx.y, b = blockIdx.z, kv_head = h / (a.num_heads / a.num_kv_heads),
              row_of_head = b * a.num_heads + h;
    // The last queries of a causal mask see most: longest work first.
    const int first = (gridDim.x - 1 - blockIdx.x) * OWN;
    const int own = WARP * WARP_ROWS;                           // this warp's rows of the tile
    k = head_start(k, a.k, b, kv_head);
    v = head_start(v, a.v, b, kv_head);
    if (column_words) column_words += int64_t(b) * a.column_step;
    const Visible visible(tables, a, b);
    const Seen seen = visible.of_queries(first + own, WARP_ROWS);  // by this warp
    const Seen walked = visible.of_queries(first, OWN);            // by the block
    const float scale = a.scale * LOG2_E;

    copy_tile<OWN, THREADS>(q_tile, head_start(q, a.q, b, h), a.q.time, first, a.num_queries);
    if (walked.first < walked.end) {
        copy_tile<LOOP, THREADS>(k_tiles, k, a.k.time, walked.first, a.num_keys);
        copy_tile<LOOP, THREADS>(v_tiles, v, a.v.time, walked.first, a.num_keys);
    }
    cp_async_commit();
    OwnRows<DOWN, KEEP_QUERIES> queries = {q_tile, own};
    float sums[DOWN][BLOCKS][4];
    clear(sums);
    Softmax softmax;
    #pragma unroll
    for (int m = 0; m < DOWN; m++)
        softmax.m[m][0] = softmax.m[m][1] = -INFINITY, softmax.l[m][0] = softmax.l[m][1] = 0;
#if DROPOUT
    uint64_t words[DOWN][2];
    query_words(words, a, head_keys, query_times, b, h, first + own);
#endif

    for (int key = walked.first, buffer = 0; key < walked.end; key += LOOP, buffer ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile has arrived, and reads of the other are done
        if (key == walked.first) queries.keep();
        if (key + LOOP < walked.end) {
            copy_tile<LOOP, THREADS>(k_tiles + (buffer ^ 1) * TILE, k, a.k.time, key + LOOP,
                                     a.num_keys);
            copy_tile<LOOP, THREADS>(v_tiles + (buffer ^ 1) * TILE, v, a.v.time, key + LOOP,
                                     a.num_keys);
            cp_async_commit();
        }
        // No registers for the branch at 128.
        if (HEAD_WIDTH < 128 && seen.misses(key, LOOP)) continue;
        float s[DOWN][ACROSS][4];
        dot_rows(s, queries, k_tiles + buffer * TILE, 0);
        if (seen.hides(key, LOOP)) hide_keys(s, visible, first + own, key);
        WATCH(S, s);
        softmax_step(softmax, s, sums, scale);
        WATCH(m, softmax.m);
        WATCH(l, softmax.l);
#if DROPOUT
        #pragma unroll
        for (int m = 0; m < DOWN; m++)
            #pragma unroll
            for (int n = 0; n < ACROSS; n++)
                #pragma unroll
                for (int e = 0; e < 4; e++)
                    s[m][n][e] *=
                        kept(a, words[m][e / 2], column_words, key + 8 * n + LANE % 4 * 2 + e % 2);
#endif
        #pragma unroll
        for (int n = 0; n < ACROSS; n += 2) {
            Fragment weights[DOWN];
            pack_scores(weights, s, n);
            add_weighted_rows(sums, weights, v_tiles + buffer * TILE, 8 * n);
        }
    }
    cp_async_wait<0>();  // without a visible key, the copy of the queries is in flight
    __syncthreads();

    float factor[DOWN][2];
    #pragma unroll
    for (int m = 0; m < DOWN; m++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = first + own + 16 * m + 8 * half + LANE / 4;
            const float total = row_sum(softmax.l[m][half]);
            factor[m][half] = total > 0 ? 1 / total : 0.0f;
            if (LANE % 4 == 0 && query < a.num_queries)
                lse[int64_t(row_of_head) * a.num_queries + query] =
                    (softmax.m[m][half] + log2_(total)) * LN_2;
        }
    store_rows(head_start(o, a.o, b, h), a.o.time, first + own, a.num_queries, sums, factor, q_tile,
               own);
}
