// Attention, variant 1: float32 tiles in shared memory, for any GPU and element type.
//
// o = softmax(scale q k^T) v without the [Tq, Tk] array of scores. A block owns OWN rows of one
// head and walks over the rows that they meet, LOOP at a time. All three kernels have this shape:
//
//     kernel   owns       walks over   two tiles of scores from    adds up
//     forward  queries    keys         q.k                         o  += P v      (online softmax)
//     grad_kv  keys       queries      k.q and v.grad_o            gv += P^T grad_o,  gk += dS^T q
//     grad_q   queries    keys         q.k and grad_o.v            gq += dS k
//
// Two functions compute all products: `dot_rows` (own by walked rows, WIDTH deep) and
// `add_weighted_rows` (scores by walked rows, LOOP deep). 256 threads form a 16 x 16 grid. Thread
// (y, x) holds own rows y, y + 16, .. and columns x, x + 16, .. of the other side:
//
//                 walked rows (LOOP)                   WIDTH columns
//                 x x+16                               x x+16 x+32 x+48
//            y    #  #                            y    #  #    #    #
//     own    y+16 #  #   scores            own    y+16 #  #    #    #   sums, in registers
//     rows   y+32 #  #                     rows   y+32 #  #    #    #
//            y+48 #  #                            y+48 #  #    #    #
//
// The 16 threads of a row are half a warp, so a row's maximum and sum take four shuffles. Scores
// pass between the products through shared memory without a block-wide barrier. Padding by four
// floats puts the 16 rows that a warp reads into different banks; that of scores puts the two rows
// that a warp writes 16 banks apart.
//
// The online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867): keep a running maximum m;
// when it grows, the sums so far shrink by exp(m_old - m_new). Backward recomputes P from the
// log-sum-exp (Dao et al. 2022, arXiv:2205.14135). Each of its two kernels owns its output: no
// atomics, so the bits repeat, for 7 products instead of 5.
// minillm-build: -DELEMENT=float32 -DHEAD_WIDTH=32 -DOWN=64 -DLOOP=32
// minillm-build: -DELEMENT=float32 -DHEAD_WIDTH=64 -DOWN=64 -DLOOP=32
// minillm-build: -DELEMENT=float32 -DHEAD_WIDTH=96 -DOWN=32 -DLOOP=32
// minillm-build: -DELEMENT=float32 -DHEAD_WIDTH=128 -DOWN=32 -DLOOP=32
// minillm-build: -DELEMENT=float32 -DHEAD_WIDTH=64 -DOWN=32 -DLOOP=32
// minillm-build: -DELEMENT=float32 -DHEAD_WIDTH=128 -DOWN=32 -DLOOP=16
// minillm-build: -DELEMENT=bfloat16 -DHEAD_WIDTH=64 -DOWN=64 -DLOOP=32
// minillm-build: -DELEMENT=float16 -DHEAD_WIDTH=64 -DOWN=64 -DLOOP=32
#include "common.cuh"

#ifndef HEAD_WIDTH
#define HEAD_WIDTH 64
#endif
#ifndef OWN  // rows of a block
#define OWN 64
#endif
#ifndef LOOP  // rows that it walks over at a time
#define LOOP 32
#endif

constexpr int SIDE = 16, THREADS = SIDE * SIDE;
constexpr int OWN_ROWS = OWN / SIDE, LOOP_ROWS = LOOP / SIDE, COLUMNS = HEAD_WIDTH / SIDE;
constexpr int PITCH = HEAD_WIDTH + 4, SCORE_PITCH = LOOP | 16;  // floats from row to row

#define X ((int)threadIdx.x % SIDE)
#define Y ((int)threadIdx.x / SIDE)

// Load rows [first, first + ROWS) of a head into a float32 tile [ROWS][PITCH]; zeros from `end` on.
template <int ROWS>
__device__ __forceinline__ void load_tile(float* tile, const Element* x, int64_t stride, int first,
                                          int end) {
    for (int i = threadIdx.x; i < ROWS * HEAD_WIDTH; i += THREADS) {
        const int row = i / HEAD_WIDTH, column = i % HEAD_WIDTH;
        tile[row * PITCH + column] =
            first + row < end ? to_float(x[(first + row) * stride + column]) : 0.0f;
    }
}

// dots[i][j] = <row Y + 16 i of own, row X + 16 j of walked>
__device__ __forceinline__ void dot_rows(float (&dots)[OWN_ROWS][LOOP_ROWS], const float* own,
                                         const float* walked) {
    #pragma unroll
    for (int i = 0; i < OWN_ROWS; i++)
        #pragma unroll
        for (int j = 0; j < LOOP_ROWS; j++) dots[i][j] = 0;
    #pragma unroll 1  // two blocks a multiprocessor hide more latency than a longer loop body
    for (int k = 0; k < HEAD_WIDTH; k += 4) {
        Pack16<float> a[OWN_ROWS], b[LOOP_ROWS];
        #pragma unroll
        for (int i = 0; i < OWN_ROWS; i++) a[i] = load16(own + (Y + SIDE * i) * PITCH + k);
        #pragma unroll
        for (int j = 0; j < LOOP_ROWS; j++) b[j] = load16(walked + (X + SIDE * j) * PITCH + k);
        #pragma unroll
        for (int i = 0; i < OWN_ROWS; i++)
            #pragma unroll
            for (int j = 0; j < LOOP_ROWS; j++)
                #pragma unroll
                for (int u = 0; u < 4; u++) dots[i][j] += a[i].v[u] * b[j].v[u];
    }
}

// sums[i][c] += sum over n of scores[Y + 16 i][n] * walked[n][X + 16 c]
__device__ __forceinline__ void add_weighted_rows(float (&sums)[OWN_ROWS][COLUMNS],
                                                  const float* scores, const float* walked) {
    #pragma unroll 2
    for (int n = 0; n < LOOP; n += 4) {
        Pack16<float> weight[OWN_ROWS];
        #pragma unroll
        for (int i = 0; i < OWN_ROWS; i++)
            weight[i] = load16(scores + (Y + SIDE * i) * SCORE_PITCH + n);
        #pragma unroll
        for (int u = 0; u < 4; u++)
            #pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                const float value = walked[(n + u) * PITCH + X + SIDE * c];
                #pragma unroll
                for (int i = 0; i < OWN_ROWS; i++) sums[i][c] += weight[i].v[u] * value;
            }
    }
}

// Reduce over the 16 threads of a row.
__device__ __forceinline__ float row_max(float x) {
    #pragma unroll
    for (int distance = SIDE / 2; distance > 0; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
    return x;
}
__device__ __forceinline__ float row_sum(float x) {
    #pragma unroll
    for (int distance = SIDE / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

// Store a row of the block's sums, times `factor`, unless it is past the end.
__device__ __forceinline__ void store_row(Element* x, int64_t stride, int row, int end,
                                          const float (&sums)[COLUMNS], float factor) {
    if (row >= end) return;
    #pragma unroll
    for (int c = 0; c < COLUMNS; c++)
        x[row * stride + X + SIDE * c] = from_float<Element>(sums[c] * factor);
}

// Grid (query tiles, heads, samples). o [B, Tq, H, K]; lse [B, H, Tq].
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_forward(const Element* q, const Element* k, const Element* v, Element* o, float* lse,
                      const int* tables, const uint64_t* head_keys, const int64_t* query_times,
                      const uint32_t* column_words, const Attention a) {
    float* q_tile = dynamic_shared<float>();        // [OWN][PITCH]
    float* k_tile = q_tile + OWN * PITCH;           // [LOOP][PITCH]
    float* v_tile = k_tile + LOOP * PITCH;          // [LOOP][PITCH]
    float* scores = v_tile + LOOP * PITCH;          // [OWN][SCORE_PITCH]
    const int h = blockIdx.y, b = blockIdx.z, kv_head = h / (a.num_heads / a.num_kv_heads),
              row_of_head = b * a.num_heads + h;
    // The last queries of a causal mask see most: longest work first.
    const int first = (gridDim.x - 1 - blockIdx.x) * OWN;
    k = head_start(k, a.k, b, kv_head);
    v = head_start(v, a.v, b, kv_head);
    if (column_words) column_words += int64_t(b) * a.column_step;
    const Visible visible(tables, a, b);

    load_tile<OWN>(q_tile, head_start(q, a.q, b, h), a.q.time, first, a.num_queries);
    Range keys[OWN_ROWS];
    uint64_t word[OWN_ROWS];
    float m[OWN_ROWS], l[OWN_ROWS], sums[OWN_ROWS][COLUMNS];
    #pragma unroll
    for (int i = 0; i < OWN_ROWS; i++) {
        const int query = first + Y + SIDE * i;
        keys[i] = visible.keys_of(query);
        word[i] = head_keys && query < a.num_queries
                      ? row_word(head_keys[row_of_head],
                                 query_times[int64_t(b) * a.num_queries + query]) : 0;
        m[i] = -INFINITY;
        l[i] = 0;
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) sums[i][c] = 0;
    }

    const Seen seen = visible.of_queries(first, OWN);
    for (int first_key = seen.first; first_key < seen.end; first_key += LOOP) {
        __syncthreads();  // all reads of the tiles are done
        load_tile<LOOP>(k_tile, k, a.k.time, first_key, a.num_keys);
        load_tile<LOOP>(v_tile, v, a.v.time, first_key, a.num_keys);
        __syncthreads();  // all has been written
        float s[OWN_ROWS][LOOP_ROWS];
        dot_rows(s, q_tile, k_tile);
        #pragma unroll
        for (int i = 0; i < OWN_ROWS; i++) {
            float top = m[i];
            #pragma unroll
            for (int j = 0; j < LOOP_ROWS; j++) {
                const int key = first_key + X + SIDE * j;
                s[i][j] = key < keys[i].end && key >= keys[i].first ? score(a, s[i][j]) : -INFINITY;
                top = fmaxf(top, s[i][j]);
            }
            top = row_max(top);
            const float base = top == -INFINITY ? 0.0f : top;  // no key seen yet: avoid inf - inf
            const float shrink = exp2_(m[i] - base);
            m[i] = top;
            l[i] *= shrink;
            #pragma unroll
            for (int c = 0; c < COLUMNS; c++) sums[i][c] *= shrink;
            #pragma unroll
            for (int j = 0; j < LOOP_ROWS; j++) {
                const int key = first_key + X + SIDE * j;
                float p = exp2_(s[i][j] - base);
                l[i] += p;  // of this thread's keys; the row's threads reduce at the end
                if (head_keys && key < keys[i].end)
                    p = keeps(word[i], column_words[key], a.threshold) ? p * a.keep_scale : 0.0f;
                scores[(Y + SIDE * i) * SCORE_PITCH + X + SIDE * j] = p;
            }
        }
        WATCH(S, s);
        WATCH(m, m);
        WATCH(l, l);
        __syncwarp();  // a row's scores come from this warp
        add_weighted_rows(sums, scores, v_tile);
    }

    o = head_start(o, a.o, b, h);
    #pragma unroll
    for (int i = 0; i < OWN_ROWS; i++) {
        const int query = first + Y + SIDE * i;
        const float total = row_sum(l[i]);
        store_row(o, a.o.time, query, a.num_queries, sums[i], total > 0 ? 1 / total : 0.0f);
        if (X == 0 && query < a.num_queries)
            lse[int64_t(row_of_head) * a.num_queries + query] = (m[i] + log2_(total)) * LN_2;
    }
}

// Row statistics that P and dP subtract: lse in powers of two, delta = <grad_o, o>, padded for v2's
// copies of tiles. Grid (padded / 8, heads, samples), one warp a query.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_delta(const Element* grad_o, const Element* o, const float* lse, float* lse_2,
                    float* delta, int padded, const Attention a) {
    const int h = blockIdx.y, b = blockIdx.z, query = blockIdx.x * (THREADS / 32) + WARP,
              row_of_head = b * a.num_heads + h;
    if (query >= a.num_queries) return;
    grad_o = head_start(grad_o, a.grad_o, b, h) + query * a.grad_o.time;
    o = head_start(o, a.o, b, h) + query * a.o.time;
    float sum = 0;
    for (int i = LANE; i < HEAD_WIDTH; i += 32) sum += to_float(grad_o[i]) * to_float(o[i]);
    sum = warp_sum(sum);
    if (LANE) return;
    lse_2[int64_t(row_of_head) * padded + query] =
        lse[int64_t(row_of_head) * a.num_queries + query] * LOG2_E;
    delta[int64_t(row_of_head) * padded + query] = sum;
}

// Statistics and visible keys of a query in the backward pass.
struct Query {
    Range keys;
    float lse_2, delta;
    uint64_t word;
};

__device__ __forceinline__ Query query_at(
    const Attention& a, const Visible& visible, const float* lse_2, const float* delta, int padded,
    const uint64_t* head_keys, const int64_t* query_times, int b, int h, int query) {
    if (query >= a.num_queries) return {{0, 0}, 0.0f, 0.0f, 0};
    const int row_of_head = b * a.num_heads + h;
    const int64_t at = int64_t(row_of_head) * padded + query;
    return {visible.keys_of(query), lse_2[at], delta[at],
            head_keys ? row_word(head_keys[row_of_head],
                                 query_times[int64_t(b) * a.num_queries + query]) : 0};
}

// Turn the dot products q.k and grad_o.v into the factors p of grad_o and grad_s of q and k.
__device__ __forceinline__ void probability(
    float& p, float& grad_s, const Attention& a, const Query& query, int key,
    const uint32_t* column_words) {
    if (key >= query.keys.end || key < query.keys.first) {
        p = grad_s = 0;
        return;
    }
    float slope = 1;
    const float before = exp2_(score(a, p, &slope) - query.lse_2);
    const float factor = !column_words                                       ? 1.0f
                         : keeps(query.word, column_words[key], a.threshold) ? a.keep_scale
                                                                             : 0.0f;
    p = before * factor;
    grad_s = before * (grad_s * factor - query.delta) * slope;
}

// Grid (key tiles, key-value heads, samples). Walks over the query heads of a key head.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_grad_kv(const Element* grad_o, const Element* q, const Element* k, const Element* v,
                      const float* lse_2, const float* delta, int padded, Element* grad_k,
                      Element* grad_v, const int* tables, const uint64_t* head_keys,
                      const int64_t* query_times, const uint32_t* column_words, const Attention a) {
    float* k_tile = dynamic_shared<float>();        // [OWN][PITCH]
    float* v_tile = k_tile + OWN * PITCH;           // [OWN][PITCH]
    float* q_tile = v_tile + OWN * PITCH;           // [LOOP][PITCH]
    float* grad_o_tile = q_tile + LOOP * PITCH;     // [LOOP][PITCH]
    float* scores = grad_o_tile + LOOP * PITCH;     // [OWN][SCORE_PITCH]
    float* grad_scores = scores + OWN * SCORE_PITCH;
    const int kv_head = blockIdx.y, b = blockIdx.z, group = a.num_heads / a.num_kv_heads,
              first = blockIdx.x * OWN;
    if (column_words) column_words += int64_t(b) * a.column_step;
    const Visible visible(tables, a, b);

    load_tile<OWN>(k_tile, head_start(k, a.k, b, kv_head), a.k.time, first, a.num_keys);
    load_tile<OWN>(v_tile, head_start(v, a.v, b, kv_head), a.v.time, first, a.num_keys);
    float k_sums[OWN_ROWS][COLUMNS], v_sums[OWN_ROWS][COLUMNS];
    #pragma unroll
    for (int i = 0; i < OWN_ROWS; i++)
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) k_sums[i][c] = v_sums[i][c] = 0;

    const Range queries = visible.readers(first, OWN);
    for (int h = kv_head * group; h < (kv_head + 1) * group; h++)
        for (int first_query = queries.first / LOOP * LOOP; first_query < queries.end;
             first_query += LOOP) {
            __syncthreads();
            load_tile<LOOP>(q_tile, head_start(q, a.q, b, h), a.q.time, first_query, a.num_queries);
            load_tile<LOOP>(grad_o_tile, head_start(grad_o, a.grad_o, b, h), a.grad_o.time,
                            first_query, a.num_queries);
            __syncthreads();
            float s[OWN_ROWS][LOOP_ROWS], grad_s[OWN_ROWS][LOOP_ROWS];
            dot_rows(s, k_tile, q_tile);
            dot_rows(grad_s, v_tile, grad_o_tile);
            #pragma unroll
            for (int j = 0; j < LOOP_ROWS; j++) {
                const int column = first_query + X + SIDE * j;
                const Query query = query_at(a, visible, lse_2, delta, padded, head_keys,
                                             query_times, b, h, column);
                #pragma unroll
                for (int i = 0; i < OWN_ROWS; i++) {
                    probability(s[i][j], grad_s[i][j], a, query, first + Y + SIDE * i,
                                column_words);
                    scores[(Y + SIDE * i) * SCORE_PITCH + X + SIDE * j] = s[i][j];
                    grad_scores[(Y + SIDE * i) * SCORE_PITCH + X + SIDE * j] = grad_s[i][j];
                }
            }
            WATCH(P, s);
            WATCH(dS, grad_s);
            __syncwarp();
            add_weighted_rows(v_sums, scores, grad_o_tile);
            add_weighted_rows(k_sums, grad_scores, q_tile);
        }

    grad_k = head_start(grad_k, a.grad_k, b, kv_head);
    grad_v = head_start(grad_v, a.grad_v, b, kv_head);
    #pragma unroll
    for (int i = 0; i < OWN_ROWS; i++) {
        store_row(grad_k, a.grad_k.time, first + Y + SIDE * i, a.num_keys, k_sums[i], a.scale);
        store_row(grad_v, a.grad_v.time, first + Y + SIDE * i, a.num_keys, v_sums[i], 1.0f);
    }
}

// Grid (query tiles, heads, samples).
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_grad_q(const Element* grad_o, const Element* q, const Element* k, const Element* v,
                     const float* lse_2, const float* delta, int padded, Element* grad_q,
                     const int* tables, const uint64_t* head_keys, const int64_t* query_times,
                     const uint32_t* column_words, const Attention a) {
    float* q_tile = dynamic_shared<float>();        // [OWN][PITCH]
    float* grad_o_tile = q_tile + OWN * PITCH;      // [OWN][PITCH]
    float* k_tile = grad_o_tile + OWN * PITCH;      // [LOOP][PITCH]
    float* v_tile = k_tile + LOOP * PITCH;          // [LOOP][PITCH]
    float* grad_scores = v_tile + LOOP * PITCH;     // [OWN][SCORE_PITCH]
    const int h = blockIdx.y, b = blockIdx.z, kv_head = h / (a.num_heads / a.num_kv_heads);
    const int first = (gridDim.x - 1 - blockIdx.x) * OWN;
    k = head_start(k, a.k, b, kv_head);
    v = head_start(v, a.v, b, kv_head);
    if (column_words) column_words += int64_t(b) * a.column_step;
    const Visible visible(tables, a, b);

    load_tile<OWN>(q_tile, head_start(q, a.q, b, h), a.q.time, first, a.num_queries);
    load_tile<OWN>(grad_o_tile, head_start(grad_o, a.grad_o, b, h), a.grad_o.time, first,
                   a.num_queries);
    Query query[OWN_ROWS];
    float sums[OWN_ROWS][COLUMNS];
    #pragma unroll
    for (int i = 0; i < OWN_ROWS; i++) {
        query[i] = query_at(a, visible, lse_2, delta, padded, head_keys, query_times, b, h,
                            first + Y + SIDE * i);
        #pragma unroll
        for (int c = 0; c < COLUMNS; c++) sums[i][c] = 0;
    }

    const Seen seen = visible.of_queries(first, OWN);
    for (int first_key = seen.first; first_key < seen.end; first_key += LOOP) {
        __syncthreads();
        load_tile<LOOP>(k_tile, k, a.k.time, first_key, a.num_keys);
        load_tile<LOOP>(v_tile, v, a.v.time, first_key, a.num_keys);
        __syncthreads();
        float s[OWN_ROWS][LOOP_ROWS], grad_s[OWN_ROWS][LOOP_ROWS];
        dot_rows(s, q_tile, k_tile);
        dot_rows(grad_s, grad_o_tile, v_tile);
        #pragma unroll
        for (int i = 0; i < OWN_ROWS; i++)
            #pragma unroll
            for (int j = 0; j < LOOP_ROWS; j++) {
                probability(s[i][j], grad_s[i][j], a, query[i], first_key + X + SIDE * j,
                            column_words);
                grad_scores[(Y + SIDE * i) * SCORE_PITCH + X + SIDE * j] = grad_s[i][j];
            }
        WATCH(P, s);
        WATCH(dS, grad_s);
        __syncwarp();
        add_weighted_rows(sums, grad_scores, k_tile);
    }

    grad_q = head_start(grad_q, a.grad_q, b, h);
    #pragma unroll
    for (int i = 0; i < OWN_ROWS; i++)
        store_row(grad_q, a.grad_q.time, first + Y + SIDE * i, a.num_queries, sums[i], a.scale);
}
