// Gradients of keys and values, and the statistics of queries, of variant 3 (v3_backward.cu).
#pragma once
#include "v3_common.cuh"

constexpr int CONSUMERS = 2, LOADER = CONSUMERS, THREADS = 128 * (CONSUMERS + 1);
constexpr int LOADER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(REGISTERS_SUFFICE<CONSUMERS, LOADER_REGISTERS, CONSUMER_REGISTERS>,
              "more registers than a block has");
constexpr int OWN = 64 * CONSUMERS;                   // keys or queries of one part of the work
constexpr int QUERIES = HEAD_WIDTH > 64 ? 64 : 128;   // of a tile in attention_grad_kv
constexpr int QUERY_STAGES = HEAD_WIDTH > 64 ? 2 : 3, KEY_STAGES = HEAD_WIDTH > 64 ? 2 : 3;

// ---- statistics of the queries, for both loops

// statistics [B H, 2, padded]: log2(sum(exp(scores))), which turns scaled scores into
// probabilities, and delta = <grad_o, o>, which the gradient of a softmax subtracts. Rows past the
// end, and those without visible keys, get probabilities of 0. Eight rows a warp.
constexpr int ROW_LANES = HEAD_WIDTH <= 32 ? 4 : HEAD_WIDTH <= 64 ? 8 : 16;  // of 8 elements each
constexpr int STATISTICS_ROWS = 256 / ROW_LANES;                             // of a block

extern "C" __global__ void __launch_bounds__(256)
    attention_statistics(const Element* o, const Element* grad_o, const float* lse,
                         float* statistics, const Strides o_strides, const Strides grad_o_strides,
                         int num_queries, int padded) {
    const int head = blockIdx.y, sample = blockIdx.z;
    const int query = blockIdx.x * STATISTICS_ROWS + threadIdx.x / ROW_LANES,
              column = threadIdx.x % ROW_LANES * 8;
    float delta = 0;
    if (query < num_queries && column < HEAD_WIDTH) {
        const Pack16<Element> a =
            load16(head_start(o, o_strides, sample, head) + query * o_strides.time + column);
        const Pack16<Element> b = load16(head_start(grad_o, grad_o_strides, sample, head) +
                                         query * grad_o_strides.time + column);
        #pragma unroll
        for (int i = 0; i < 8; i++) delta += to_float(a.v[i]) * to_float(b.v[i]);
    }
    #pragma unroll
    for (int lanes = ROW_LANES / 2; lanes > 0; lanes /= 2)
        delta += __shfl_xor_sync(0xffffffffu, delta, lanes);
    if (column != 0 || query >= padded) return;
    const int64_t row = int64_t(sample) * gridDim.y + head;
    const float log_sum = query < num_queries ? lse[row * num_queries + query] : -INFINITY;
    statistics[2 * row * padded + query] = log_sum == -INFINITY ? INFINITY : log_sum * LOG2_E;
    statistics[(2 * row + 1) * padded + query] = delta;
}

// ---- gradients of keys and values

struct KeyShared {
    Tile<64> k[CONSUMERS], v[CONSUMERS], grad_k[CONSUMERS], grad_v[CONSUMERS];
    Tile<QUERIES> q[QUERY_STAGES], grad_o[QUERY_STAGES];
    float statistics[QUERY_STAGES][2][QUERIES];
    uint64_t own_full, own_empty, q_full[QUERY_STAGES], q_empty[QUERY_STAGES],
        grad_o_full[QUERY_STAGES], grad_o_empty[QUERY_STAGES];
};
static_assert(sizeof(KeyShared) <= MOST_SHARED_BYTES, "more shared memory than a block can have");

struct KeyPart {
    int first, kv_head, sample;
    int first_head, end_head;  // of the queries that share the keys
    int first_tile, end_tile;  // of each head's tiles, those that see any of the keys
};

__device__ __forceinline__ bool key_part(const Problem& p, const int* tables, int round,
                                         KeyPart& part) {
    int head, number;
    if (!Schedule{num_blocks(p.num_keys, OWN), p.samples * p.kv_heads, p.section}.part(round, head,
                                                                                       number))
        return false;
    part.first = number * OWN;  // most queries see the first keys
    part.kv_head = head % p.kv_heads;
    part.sample = head / p.kv_heads;
    part.first_head = part.kv_head * (p.heads / p.kv_heads);
    part.end_head = part.first_head + p.heads / p.kv_heads;
    const Range readers = visible_of(tables, p, part.sample).readers(part.first, OWN);
    part.first_tile = readers.first / QUERIES;
    part.end_tile = num_blocks(readers.end, QUERIES);
    return true;
}

__device__ __forceinline__ void load_own_keys(KeyShared& shared, const TensorMap* k_map,
                                              const TensorMap* v_map, const int* tables,
                                              const Problem& p) {
    KeyPart part;
    for (int round = 0; key_part(p, tables, round, part); round++) {
        mbarrier_wait(&shared.own_empty, round % 2 ^ 1);
        mbarrier_expect(&shared.own_full, sizeof(shared.k) + sizeof(shared.v));
        #pragma unroll
        for (int i = 0; i < CONSUMERS; i++) {
            load_tile<64, HEAD_WIDTH>(shared.k[i], k_map, &shared.own_full, part.first + 64 * i,
                                      part.kv_head, part.sample);
            load_tile<64, HEAD_WIDTH>(shared.v[i], v_map, &shared.own_full, part.first + 64 * i,
                                      part.kv_head, part.sample);
        }
    }
}

__device__ __forceinline__ void load_queries(KeyShared& shared, const TensorMap* q_map,
                                             const TensorMap* grad_o_map,
                                             const TensorMap* statistics_map, const int* tables,
                                             const Problem& p) {
    int n = 0;
    KeyPart part;
    for (int round = 0; key_part(p, tables, round, part); round++) {
        for (int head = part.first_head; head < part.end_head; head++) {
            for (int tile = part.first_tile; tile < part.end_tile; tile++, n++) {
                const Place<QUERY_STAGES> at(n);
                uint64_t *q_full = &shared.q_full[at.stage],
                         *grad_o_full = &shared.grad_o_full[at.stage];
                mbarrier_wait(&shared.q_empty[at.stage], at.parity ^ 1);
                mbarrier_expect(q_full, sizeof(Tile<QUERIES>) + sizeof(shared.statistics[0]));
                load_tile<QUERIES, HEAD_WIDTH>(shared.q[at.stage], q_map, q_full, tile * QUERIES,
                                               head, part.sample);
                tma_load_3d(shared.statistics[at.stage], statistics_map, q_full, tile * QUERIES, 0,
                            part.sample * p.heads + head);
                mbarrier_wait(&shared.grad_o_empty[at.stage], at.parity ^ 1);
                mbarrier_expect(grad_o_full, sizeof(Tile<QUERIES>));
                load_tile<QUERIES, HEAD_WIDTH>(shared.grad_o[at.stage], grad_o_map, grad_o_full,
                                               tile * QUERIES, head, part.sample);
            }
        }
    }
}

// Turn scores [64 keys, QUERIES] into probabilities. The thread's first key is `key`.
__device__ __forceinline__ void key_probabilities(float (&scores)[QUERIES / 2],
                                                  const float (&log_sums)[QUERIES], float scale,
                                                  const Visible& visible, bool hides, int key,
                                                  int first_query) {
    #pragma unroll
    for (int i = 0; i < QUERIES / 2; i += 4) {
        const float2 log_sum =
            *reinterpret_cast<const float2*>(&log_sums[2 * i + accumulator_column()]);
        #pragma unroll
        for (int e = 0; e < 4; e++)
            scores[i + e] = exp2_(scores[i + e] * scale - (e % 2 ? log_sum.y : log_sum.x));
    }
    if (!hides) return;
    if (!visible.table) {  // queries from a key's index on see it
        const int distance = key - first_query - accumulator_column();
        #pragma unroll
        for (int i = 0; i < QUERIES / 2; i++)
            if (i / 4 * 8 + i % 2 < distance + i / 2 % 2 * 8) scores[i] = 0;
        return;
    }
    const int* bounds = visible.table + 2 * (first_query + accumulator_column());
    #pragma unroll
    for (int i = 0; i < QUERIES / 2; i += 4)
        #pragma unroll
        for (int e = 0; e < 2; e++) {
            // 16 bytes a load would spill registers.
            const Pack<int, 2> of = load<2>(bounds + 4 * i + 2 * e);
            if (key < of.v[0] || key >= of.v[1]) scores[i + e] = 0;
            if (key + 8 < of.v[0] || key + 8 >= of.v[1]) scores[i + 2 + e] = 0;
        }
}

// Pack probabilities p and gradients of scores p (grad_p - delta) as left factors: 16 queries at a
// time, so that results reuse the registers of their inputs.
__device__ __forceinline__ void key_factors(uint32_t (&probabilities)[QUERIES / 16][4],
                                            uint32_t (&grad_scores)[QUERIES / 16][4],
                                            const float (&p)[QUERIES / 2],
                                            const float (&grad_p)[QUERIES / 2],
                                            const float (&deltas)[QUERIES]) {
    #pragma unroll
    for (int i = 0; i < QUERIES / 2; i += 2) {
        const float2 delta =
            *reinterpret_cast<const float2*>(&deltas[i / 4 * 8 + accumulator_column()]);
        probabilities[i / 8][i / 2 % 4] = pack2<Element>(p[i], p[i + 1]);
        grad_scores[i / 8][i / 2 % 4] =
            pack2<Element>(p[i] * (grad_p[i] - delta.x), p[i + 1] * (grad_p[i + 1] - delta.y));
    }
}

// Add one tile of queries: grad_v += p^T grad_o and grad_k += grad_s^T q, for 64 keys. Scores are
// computed transposed, [keys, queries], so that the accumulators p^T and grad_s^T are left factors
// of the next products.
__device__ __forceinline__ void add_queries(KeyShared& shared, const Problem& p,
                                            const Visible& visible, int consumer,
                                            const Place<QUERY_STAGES>& at, int first_key,
                                            int first_query, float (&grad_k)[HEAD_WIDTH / 2],
                                            float (&grad_v)[HEAD_WIDTH / 2]) {
    float scores[QUERIES / 2], grad_p[QUERIES / 2];
    uint32_t probabilities[QUERIES / 16][4], grad_scores[QUERIES / 16][4];
    const bool hides = visible.table ? visible.of_queries(first_query, QUERIES).hides(first_key, 64)
                                     : p.causal && first_query < first_key + 63;
    mbarrier_wait(&shared.q_full[at.stage], at.parity);
    start_product_transposed<QUERIES, HEAD_WIDTH>(scores, shared.k[consumer], shared.q[at.stage]);
    mbarrier_wait(&shared.grad_o_full[at.stage], at.parity);
    start_product_transposed<QUERIES, HEAD_WIDTH>(grad_p, shared.v[consumer],
                                                  shared.grad_o[at.stage]);
    wait_for<1>(scores);
    key_probabilities(scores, shared.statistics[at.stage][0], p.scale * LOG2_E, visible, hides,
                      first_key + accumulator_row(), first_query);
    wait_for<0>(grad_p);
    key_factors(probabilities, grad_scores, scores, grad_p, shared.statistics[at.stage][1]);
    start_sum_of_products<HEAD_WIDTH, QUERIES>(grad_v, probabilities, shared.grad_o[at.stage]);
    start_sum_of_products<HEAD_WIDTH, QUERIES>(grad_k, grad_scores, shared.q[at.stage]);
    wait_for<1>(grad_v);
    release(&shared.grad_o_empty[at.stage]);
    wait_for<0>(grad_k);
    release(&shared.q_empty[at.stage]);
}

__device__ __forceinline__ void compute_for_keys(KeyShared& shared, const TensorMap* grad_k_map,
                                                 const TensorMap* grad_v_map, const int* tables,
                                                 const Problem& p, int consumer) {
    int n = 0;
    KeyPart part;
    for (int round = 0; key_part(p, tables, round, part); round++) {
        float grad_k[HEAD_WIDTH / 2], grad_v[HEAD_WIDTH / 2];
        #pragma unroll
        for (int i = 0; i < HEAD_WIDTH / 2; i++) grad_k[i] = grad_v[i] = 0;
        const int first = part.first + 64 * consumer;
        const Visible visible = visible_of(tables, p, part.sample);
        mbarrier_wait(&shared.own_full, round % 2);
        for (int head = part.first_head; head < part.end_head; head++)
            for (int tile = part.first_tile; tile < part.end_tile; tile++, n++)
                add_queries(shared, p, visible, consumer, Place<QUERY_STAGES>(n), first,
                            tile * QUERIES, grad_k, grad_v);
        release(&shared.own_empty);
        const float one[2] = {1, 1}, scale[2] = {p.scale, p.scale};
        store_rows<1>(grad_v_map, shared.grad_v[consumer], grad_v, one, first, part.kv_head,
                      part.sample, 1 + consumer);
        store_rows<1>(grad_k_map, shared.grad_k[consumer], grad_k, scale, first, part.kv_head,
                      part.sample, 1 + consumer);
    }
    if (threadIdx.x % 128 == 0) tma_wait<0>();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_grad_kv(
    const __grid_constant__ TensorMap grad_o_map, const __grid_constant__ TensorMap q_map,
    const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
    const __grid_constant__ TensorMap statistics_map, const __grid_constant__ TensorMap grad_k_map,
    const __grid_constant__ TensorMap grad_v_map, const int* tables, const Problem p) {
    KeyShared& shared = *dynamic_shared<KeyShared>();
    if (threadIdx.x == 0) {
        mbarrier_init(&shared.own_full, 1);
        mbarrier_init(&shared.own_empty, CONSUMERS * WARPS_PER_GROUP);
        for (int stage = 0; stage < QUERY_STAGES; stage++) {
            mbarrier_init(&shared.q_full[stage], 1);
            mbarrier_init(&shared.grad_o_full[stage], 1);
            mbarrier_init(&shared.q_empty[stage], CONSUMERS * WARPS_PER_GROUP);
            mbarrier_init(&shared.grad_o_empty[stage], CONSUMERS * WARPS_PER_GROUP);
        }
        fence_barrier_init();
    }
    __syncthreads();
    const int group = warpgroup_index();
    if (group == LOADER) {
        set_max_registers_down<LOADER_REGISTERS>();
        if (threadIdx.x == 128 * LOADER)
            load_queries(shared, &q_map, &grad_o_map, &statistics_map, tables, p);
        if (threadIdx.x == 128 * LOADER + 32) load_own_keys(shared, &k_map, &v_map, tables, p);
    } else {
        set_max_registers_up<CONSUMER_REGISTERS>();
        compute_for_keys(shared, &grad_k_map, &grad_v_map, tables, p, group);
    }
}
