// Attention backward, variant 2: tensor cores through mma.sync. Fragments, swizzled tiles and
// double buffers are those of v2_forward.cu, the three kernels those of v1.cu: statistics of the
// queries, gradients of keys and values, gradients of queries. Each block owns its output, so every
// sum has one order.
//
// * Scores stay in registers: a warp that owns keys computes S^T, so P^T and dS^T are left sides of
//   the next products.
//
// * Walked rows are processed in slices, since the scores of two products share the registers with
//   two sums.
//
// measured: not yet
//
// minillm-sass: attention_grad_kv HMMA*32 LDSM*8 LDGSTS.E.BYPASS.128 STG.E.128*2
// minillm-sass: attention_grad_q HMMA*24 LDSM*8 LDGSTS.E.BYPASS.128 STG.E.128
// minillm-sass: attention_delta LDG.E.128*2
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=32 -DDROPOUT=0 -DWARPS=4 -DWARP_ROWS=32 -DLOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=32 -DDROPOUT=1 -DWARPS=4 -DWARP_ROWS=32 -DLOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=64 -DDROPOUT=0 -DWARPS=4 -DWARP_ROWS=32 -DLOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=64 -DDROPOUT=1 -DWARPS=4 -DWARP_ROWS=32 -DLOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=96 -DDROPOUT=0 -DWARPS=4 -DWARP_ROWS=16 -DLOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=96 -DDROPOUT=1 -DWARPS=4 -DWARP_ROWS=16 -DLOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=128 -DDROPOUT=0 -DWARPS=8 -DWARP_ROWS=16 -DLOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=128 -DDROPOUT=1 -DWARPS=8 -DWARP_ROWS=16 -DLOOP=64
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=128 -DDROPOUT=0 -DWARPS=8 -DWARP_ROWS=16 -DLOOP=32
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=128 -DDROPOUT=1 -DWARPS=8 -DWARP_ROWS=16 -DLOOP=32
// minillm-build: -DELEMENT=float16 -DHEAD_WIDTH=64 -DDROPOUT=0 -DWARPS=4 -DWARP_ROWS=32 -DLOOP=64
#include "v2_common.cuh"

// SLICE: walked rows; DOWN, ACROSS: fragments.
constexpr int DOWN = WARP_ROWS / 16, SLICE = DOWN == 1 ? 32 : 16, ACROSS = SLICE / 8;
constexpr int OWN = WARPS * WARP_ROWS, THREADS = 32 * WARPS;
constexpr bool KEEP_OWN = DOWN * HEAD_WIDTH <= 64;  // both own tiles as fragments
// Log-sum-exp of a query without visible keys: probabilities exp2(-inf) = 0.
constexpr float NEVER = INFINITY;

// Row statistics that P and dP subtract, padded to be copied in tiles: lse in powers of two and
// delta = <grad_o, o>, a row of `padded` floats for each sample and head. Grid (padded / 8, heads,
// samples), one warp a query.
extern "C" __global__ void __launch_bounds__(256)
    attention_delta(const Element* grad_o, const Element* o, const float* lse, float* lse_2,
                    float* delta, int padded, const Attention a) {
    const int h = blockIdx.y, b = blockIdx.z, query = blockIdx.x * 8 + WARP,
              row_of_head = b * a.num_heads + h;
    const bool inside = query < a.num_queries;
    float sum = 0;
    if (inside && LANE < CHUNKS) {
        const Pack16<Element> g =
            load16(head_start(grad_o, a.grad_o, b, h) + query * a.grad_o.time + 8 * LANE);
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

// Turn the dot products q.k and grad_o.v into the factors p of grad_o and grad_s of q and k.
__device__ __forceinline__ void probability(float& p, float& grad_s, float scale, float lse_2,
                                            float delta, float factor) {
    const float before = exp2_(p * scale - lse_2);
    p = before * factor;
    grad_s = before * (grad_s * factor - delta);
}

// Apply hide_keys to own rows that are keys from `key` on, and walked queries from `query` on.
template <int M, int N>
__device__ __forceinline__ void hide_queries(float (&s)[M][N][4], const Visible& visible, int key,
                                             int query) {
    #pragma unroll
    for (int n = 0; n < N; n++)
        #pragma unroll
        for (int e = 0; e < 2; e++) {
            const Range keys = visible.keys_of(query + 8 * n + LANE % 4 * 2 + e);
            const int first = keys.first - key - LANE / 4, end = keys.end - key - LANE / 4;
            #pragma unroll
            for (int m = 0; m < M; m++)
                #pragma unroll
                for (int half = 0; half < 2; half++)
                    if (16 * m + 8 * half >= end || 16 * m + 8 * half < first)
                        s[m][n][2 * half + e] = -INFINITY;
        }
}

// Compute probabilities of a warp's own keys, from `key` on, for the walked queries of a slice,
// whose statistics are in shared memory.
template <int M, int N>
__device__ __forceinline__ void probabilities_of_keys(float (&s)[M][N][4], float (&grad_s)[M][N][4],
                                                      const Attention& a, float scale,
                                                      const float* lse_2, const float* delta,
                                                      const uint64_t* words,
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
                    const float factor = DROPOUT ? kept(a, words[query], column_words,
                                                        key + 16 * m + 8 * half + LANE / 4)
                                                 : 1.0f;
                    probability(s[m][n][2 * half + e], grad_s[m][n][2 * half + e], scale, lse_here,
                                delta_here, factor);
                }
        }
}

// Grid (key tiles, key-value heads, samples). Walks over the query heads of a key head.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_grad_kv(const Element* grad_o, const Element* q, const Element* k, const Element* v,
                      const float* lse_2, const float* delta, int padded, Element* grad_k,
                      Element* grad_v, const int* tables, const uint64_t* head_keys,
                      const int64_t* query_times, const uint32_t* column_words, const Attention a) {
    constexpr int TILE = LOOP * HEAD_WIDTH;
    Element* k_tile = dynamic_shared<Element>();                                 // [OWN]
    Element* v_tile = k_tile + OWN * HEAD_WIDTH;                                 // [OWN]
    Element* q_tiles = v_tile + OWN * HEAD_WIDTH;                                // [2][LOOP]
    Element* grad_o_tiles = q_tiles + 2 * TILE;                                  // [2][LOOP]
    float* lse_tiles = reinterpret_cast<float*>(grad_o_tiles + 2 * TILE);        // [2][LOOP]
    float* delta_tiles = lse_tiles + 2 * LOOP;                                   // [2][LOOP]
    // [2][LOOP], if there is dropout.
    uint64_t* word_tiles = reinterpret_cast<uint64_t*>(delta_tiles + 2 * LOOP);
    const int kv_head = blockIdx.y, b = blockIdx.z, group = a.num_heads / a.num_kv_heads;
    const int first = blockIdx.x * OWN, own = WARP * WARP_ROWS;
    if (column_words) column_words += int64_t(b) * a.column_step;
    const Visible visible(tables, a, b);
    const float scale = a.scale * LOG2_E;

    // Step i walks over queries [start + i % tiles * LOOP, ..) of head i / tiles of the group.
    const Range queries = visible.readers(first, OWN);
    const int start = queries.first / LOOP * LOOP,
              tiles = max(queries.end - start + LOOP - 1, 0) / LOOP, steps = group * tiles;
    auto copy_step = [&](int step, int buffer) {
        const int h = kv_head * group + step / tiles, query = start + step % tiles * LOOP,
                  row_of_head = b * a.num_heads + h;
        const Element *q_head = head_start(q, a.q, b, h),
                      *grad_o_head = head_start(grad_o, a.grad_o, b, h);
        copy_tile<LOOP, THREADS>(q_tiles + buffer * TILE, q_head, a.q.time, query, a.num_queries);
        copy_tile<LOOP, THREADS>(grad_o_tiles + buffer * TILE, grad_o_head, a.grad_o.time, query,
                                 a.num_queries);
        const int i = threadIdx.x;
        if (i < LOOP / 4) {
            const int64_t from = int64_t(row_of_head) * padded + query + 4 * i;
            cp_async_16(lse_tiles + buffer * LOOP + 4 * i, lse_2 + from);
            cp_async_16(delta_tiles + buffer * LOOP + 4 * i, delta + from);
        }
        if (DROPOUT && i < LOOP) {
            const bool inside = query + i < a.num_queries;
            word_tiles[buffer * LOOP + i] =
                inside ? row_word(head_keys[row_of_head],
                                  query_times[int64_t(b) * a.num_queries + query + i])
                       : uint64_t(0);
        }
    };

    copy_tile<OWN, THREADS>(k_tile, head_start(k, a.k, b, kv_head), a.k.time, first, a.num_keys);
    copy_tile<OWN, THREADS>(v_tile, head_start(v, a.v, b, kv_head), a.v.time, first, a.num_keys);
    if (steps > 0) copy_step(0, 0);
    cp_async_commit();
    OwnRows<DOWN, KEEP_OWN> keys = {k_tile, own}, values = {v_tile, own};
    float k_sums[DOWN][BLOCKS][4], v_sums[DOWN][BLOCKS][4];
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
        const Element *q_tile = q_tiles + buffer * TILE,
                      *grad_o_tile = grad_o_tiles + buffer * TILE;
        const int query = start + step % tiles * LOOP;
        #pragma unroll 1
        for (int slice = 0; slice < LOOP; slice += SLICE) {
            float s[DOWN][ACROSS][4], grad_s[DOWN][ACROSS][4];
            const Seen seen = visible.of_queries(query + slice, SLICE);
            if (seen.misses(first + own, WARP_ROWS)) continue;  // none of this warp's keys
            dot_rows(s, keys, q_tile, slice);
            dot_rows(grad_s, values, grad_o_tile, slice);
            if (seen.hides(first + own, WARP_ROWS))
                hide_queries(s, visible, first + own, query + slice);
            const int at = buffer * LOOP + slice;
            const uint64_t* words = DROPOUT ? word_tiles + at : nullptr;
            probabilities_of_keys(s, grad_s, a, scale, lse_tiles + at, delta_tiles + at, words,
                                  column_words, first + own);
            WATCH(P, s);
            WATCH(dS, grad_s);
            #pragma unroll
            for (int n = 0; n < ACROSS; n += 2) {
                Fragment weights[DOWN];
                pack_scores(weights, s, n);
                add_weighted_rows(v_sums, weights, grad_o_tile, slice + 8 * n);
                pack_scores(weights, grad_s, n);
                add_weighted_rows(k_sums, weights, q_tile, slice + 8 * n);
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();

    float factor[DOWN][2];
    #pragma unroll
    for (int m = 0; m < DOWN; m++) factor[m][0] = factor[m][1] = a.scale;
    store_rows(head_start(grad_k, a.grad_k, b, kv_head), a.grad_k.time, first + own, a.num_keys,
               k_sums, factor, k_tile, own);
    #pragma unroll
    for (int m = 0; m < DOWN; m++) factor[m][0] = factor[m][1] = 1;
    store_rows(head_start(grad_v, a.grad_v, b, kv_head), a.grad_v.time, first + own, a.num_keys,
               v_sums, factor, v_tile, own);
}

// Grid (query tiles, heads, samples).
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_grad_q(const Element* grad_o, const Element* q, const Element* k, const Element* v,
                     const float* lse_2, const float* delta, int padded, Element* grad_q,
                     const int* tables, const uint64_t* head_keys, const int64_t* query_times,
                     const uint32_t* column_words, const Attention a) {
    constexpr int TILE = LOOP * HEAD_WIDTH;
    Element* q_tile = dynamic_shared<Element>();        // [OWN]
    Element* grad_o_tile = q_tile + OWN * HEAD_WIDTH;   // [OWN]
    Element* k_tiles = grad_o_tile + OWN * HEAD_WIDTH;  // [2][LOOP]
    Element* v_tiles = k_tiles + 2 * TILE;              // [2][LOOP]
    const int h = blockIdx.y, b = blockIdx.z, kv_head = h / (a.num_heads / a.num_kv_heads),
              row_of_head = b * a.num_heads + h;
    const int first = (gridDim.x - 1 - blockIdx.x) * OWN, own = WARP * WARP_ROWS;
    k = head_start(k, a.k, b, kv_head);
    v = head_start(v, a.v, b, kv_head);
    if (column_words) column_words += int64_t(b) * a.column_step;
    const Visible visible(tables, a, b);
    const Seen seen = visible.of_queries(first + own, WARP_ROWS),
               walked = visible.of_queries(first, OWN);
    const float scale = a.scale * LOG2_E;

    copy_tile<OWN, THREADS>(q_tile, head_start(q, a.q, b, h), a.q.time, first, a.num_queries);
    copy_tile<OWN, THREADS>(grad_o_tile, head_start(grad_o, a.grad_o, b, h), a.grad_o.time, first,
                            a.num_queries);
    if (walked.first < walked.end) {
        copy_tile<LOOP, THREADS>(k_tiles, k, a.k.time, walked.first, a.num_keys);
        copy_tile<LOOP, THREADS>(v_tiles, v, a.v.time, walked.first, a.num_keys);
    }
    cp_async_commit();
    OwnRows<DOWN, KEEP_OWN> queries = {q_tile, own}, grads = {grad_o_tile, own};
    float sums[DOWN][BLOCKS][4], lse_here[DOWN][2], delta_here[DOWN][2];
    clear(sums);
    #pragma unroll
    for (int m = 0; m < DOWN; m++)
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = first + own + 16 * m + 8 * half + LANE / 4;
            const bool inside = query < a.num_queries;
            lse_here[m][half] = inside ? lse_2[int64_t(row_of_head) * padded + query] : NEVER;
            delta_here[m][half] = inside ? delta[int64_t(row_of_head) * padded + query] : 0.0f;
        }
#if DROPOUT
    uint64_t words[DOWN][2];
    query_words(words, a, head_keys, query_times, b, h, first + own);
#endif

    for (int key = walked.first, buffer = 0; key < walked.end; key += LOOP, buffer ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        if (key == walked.first) queries.keep(), grads.keep();
        if (key + LOOP < walked.end) {
            copy_tile<LOOP, THREADS>(k_tiles + (buffer ^ 1) * TILE, k, a.k.time, key + LOOP,
                                     a.num_keys);
            copy_tile<LOOP, THREADS>(v_tiles + (buffer ^ 1) * TILE, v, a.v.time, key + LOOP,
                                     a.num_keys);
            cp_async_commit();
        }
        const Element *k_tile = k_tiles + buffer * TILE, *v_tile = v_tiles + buffer * TILE;
        #pragma unroll 1
        for (int slice = 0; slice < LOOP; slice += SLICE) {
            if (seen.misses(key + slice, SLICE)) continue;
            float s[DOWN][ACROSS][4], grad_s[DOWN][ACROSS][4];
            dot_rows(s, queries, k_tile, slice);
            dot_rows(grad_s, grads, v_tile, slice);
            if (seen.hides(key + slice, SLICE)) hide_keys(s, visible, first + own, key + slice);
            #pragma unroll
            for (int m = 0; m < DOWN; m++)
                #pragma unroll
                for (int n = 0; n < ACROSS; n++)
                    #pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float factor = 1;
#if DROPOUT
                        factor = kept(a, words[m][e / 2], column_words,
                                      key + slice + 8 * n + LANE % 4 * 2 + e % 2);
#endif
                        probability(s[m][n][e], grad_s[m][n][e], scale, lse_here[m][e / 2],
                                    delta_here[m][e / 2], factor);
                    }
            WATCH(P, s);
            WATCH(dS, grad_s);
            #pragma unroll
            for (int n = 0; n < ACROSS; n += 2) {
                Fragment weights[DOWN];
                pack_scores(weights, grad_s, n);
                add_weighted_rows(sums, weights, k_tile, slice + 8 * n);
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads();

    float factor[DOWN][2];
    #pragma unroll
    for (int m = 0; m < DOWN; m++) factor[m][0] = factor[m][1] = a.scale;
    store_rows(head_start(grad_q, a.grad_q, b, h), a.grad_q.time, first + own, a.num_queries, sums,
               factor, q_tile, own);
}
