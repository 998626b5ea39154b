// Attention backward, variant 3: Hopper's own way, for bfloat16 and float16 on compute capability 9.0. What wgmma, TMA, mbarriers and the
// parting of work between warpgroups are for is told in v3_forward.cu; the algorithm is that of v1.cu and v2_backward.cu: two kernels, one for
// the gradients of keys and values, one for those of queries, each of which owns its rows. Seven products where a kernel that adds gradients
// of queries atomically has five; but every sum has one order, and the same bits come every time.
//
// Both keep 64 rows of their own a warpgroup, and walk over tiles of the other side:
//
//     attention_grad_kv, own keys                            attention_grad_q, own queries
//
//       S^T  = k q^T        [64 keys, QUERIES]                 S   = q k^T        [64 queries, KEYS]
//       dP^T = v grad_o^T                                      dP  = grad_o v^T
//       P^T  = exp2(S^T scale - log_sum)                       P   = exp2(S scale - log_sum)
//       dS^T = P^T (dP^T - delta)                              dS  = P (dP - delta)
//       grad_v += P^T grad_o                                   grad_q += dS k
//       grad_k += dS^T q
//
//   Written so, all left factors are tiles of own rows, which stay in shared memory, or accumulators, which stay in registers: what is
//   summed over lies along the tile's rows or along its columns, and descriptors tell wgmma which. Nothing is transposed, and scores
//   never go through shared memory.
//
//   The statistics log_sum and delta = <grad_o, o> belong to queries. To own queries they are two numbers a row. To tiles of queries they
//   are columns: a small kernel writes them in a padded array first, from which TMA fetches them with the tile.
//
//     loader, thread 0     q0 + statistics, grad_o0, q1 + statistics, grad_o1 ..    (or k0, v0, k1, v1 ..)
//     loader, thread 32    own rows of the next part, once the last product with this part's is done
//     consumer 0           S dP | exp, dS | sums          S dP | exp, dS | sums
//     consumer 1                  S dP    | exp, dS | sums         S dP  | exp, dS | sums
//
//   While one warpgroup takes exponentials, the tensor cores work for the other. A warpgroup does not run ahead of itself as in the forward
//   pass: S, dP and both left factors would need more registers than it has (ptxas then makes the products wait for one another, C7512).
//
// Tiles of keys that none of a block's queries sees are left out, and so are tiles of queries that see none of its keys; in the others,
// hidden keys have probabilities of 0.
//
// A group of query heads that share keys is one part of the work in attention_grad_kv, so their sum needs no second pass.
//
// Registers, by thread, of 232: head width 64: 64 sums + 128 for S and dP; 128: 128 + 64 (QUERIES is 64 there), or 64 + 128.
//
// measured: not yet
//
// minillm-arch: sm_90a
// minillm-build: -DHEAD_WIDTH=64 -DELEMENT=bfloat16
// minillm-build: -DHEAD_WIDTH=64 -DELEMENT=float16
// minillm-build: -DHEAD_WIDTH=128 -DELEMENT=bfloat16
// minillm-build: -DHEAD_WIDTH=128 -DELEMENT=float16
// minillm-build: -DHEAD_WIDTH=96 -DELEMENT=bfloat16
// minillm-build: -DHEAD_WIDTH=96 -DELEMENT=float16
// minillm-build: -DHEAD_WIDTH=32 -DELEMENT=bfloat16
// minillm-build: -DHEAD_WIDTH=32 -DELEMENT=float16
// minillm-sass: attention_grad_kv HGMMA*20 UTMALDG*4 UTMASTG*2 USETMAXREG*2
// minillm-sass: attention_grad_q HGMMA*12 UTMALDG*4 UTMASTG USETMAXREG*2
// minillm-sass: attention_statistics LDG.E.128*2
#include "v3_common.cuh"

constexpr int CONSUMERS = 2, LOADER = CONSUMERS, THREADS = 128 * (CONSUMERS + 1);
constexpr int LOADER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
static_assert(REGISTERS_SUFFICE<CONSUMERS, LOADER_REGISTERS, CONSUMER_REGISTERS>, "more registers than a block has");
constexpr int OWN = 64 * CONSUMERS;                   // keys, or queries, whose gradients are one part of the work
constexpr int QUERIES = HEAD_WIDTH > 64 ? 64 : 128;   // of a tile of the loop for keys; one of the loop for queries has KEYS
constexpr int QUERY_STAGES = HEAD_WIDTH > 64 ? 2 : 3, KEY_STAGES = HEAD_WIDTH > 64 ? 2 : 3;

// ---- statistics of the queries, for both loops

// statistics [B H, 2, padded]: what turns scaled scores into probabilities, log2(sum(exp(scores))), and delta = <grad_o, o>, which the
// gradient of a softmax subtracts. Rows past the end, and those that see nothing, get probabilities of 0. Eight rows a warp.
constexpr int ROW_LANES = HEAD_WIDTH <= 32 ? 4 : HEAD_WIDTH <= 64 ? 8 : 16;  // of which each takes 8 elements
constexpr int STATISTICS_ROWS = 256 / ROW_LANES;                             // of a block

extern "C" __global__ void __launch_bounds__(256)
attention_statistics(const Element* o, const Element* grad_o, const float* lse, float* statistics, const Strides o_strides,
                     const Strides grad_o_strides, int num_queries, int padded) {
    const int head = blockIdx.y, sample = blockIdx.z;
    const int query = blockIdx.x * STATISTICS_ROWS + threadIdx.x / ROW_LANES, column = threadIdx.x % ROW_LANES * 8;
    float delta = 0;
    if (query < num_queries && column < HEAD_WIDTH) {
        const Pack16<Element> a = load16(head_start(o, o_strides, sample, head) + query * o_strides.time + column);
        const Pack16<Element> b = load16(head_start(grad_o, grad_o_strides, sample, head) + query * grad_o_strides.time + column);
        #pragma unroll
        for (int i = 0; i < 8; i++) delta += to_float(a.v[i]) * to_float(b.v[i]);
    }
    #pragma unroll
    for (int lanes = ROW_LANES / 2; lanes > 0; lanes /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, lanes);
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
    uint64_t own_full, own_empty, q_full[QUERY_STAGES], q_empty[QUERY_STAGES], grad_o_full[QUERY_STAGES], grad_o_empty[QUERY_STAGES];
};
static_assert(sizeof(KeyShared) <= MOST_SHARED_BYTES, "more shared memory than a block can have");

struct KeyPart {
    int first, kv_head, sample;
    int first_head, end_head;  // of the queries that share the keys,
    int first_tile, end_tile;  // and of each head's tiles those that see any of them
};

__device__ __forceinline__ bool key_part(const Problem& p, const int* tables, int round, KeyPart& part) {
    int head, number;
    if (!Schedule{num_blocks(p.num_keys, OWN), p.samples * p.kv_heads, p.section}.part(round, head, number)) return false;
    part.first = number * OWN;  // the first keys are seen by most queries
    part.kv_head = head % p.kv_heads;
    part.sample = head / p.kv_heads;
    part.first_head = part.kv_head * (p.heads / p.kv_heads);
    part.end_head = part.first_head + p.heads / p.kv_heads;
    const Range readers = visible_of(tables, p, part.sample).readers(part.first, OWN);
    part.first_tile = readers.first / QUERIES;
    part.end_tile = num_blocks(readers.end, QUERIES);
    return true;
}

__device__ __forceinline__ void load_own_keys(KeyShared& shared, const TensorMap* k_map, const TensorMap* v_map,
                                              const int* tables, const Problem& p) {
    KeyPart part;
    for (int round = 0; key_part(p, tables, round, part); round++) {
        mbarrier_wait(&shared.own_empty, round % 2 ^ 1);
        mbarrier_expect(&shared.own_full, sizeof(shared.k) + sizeof(shared.v));
        #pragma unroll
        for (int i = 0; i < CONSUMERS; i++) {
            load_tile<64, HEAD_WIDTH>(shared.k[i], k_map, &shared.own_full, part.first + 64 * i, part.kv_head, part.sample);
            load_tile<64, HEAD_WIDTH>(shared.v[i], v_map, &shared.own_full, part.first + 64 * i, part.kv_head, part.sample);
        }
    }
}

__device__ __forceinline__ void load_queries(KeyShared& shared, const TensorMap* q_map, const TensorMap* grad_o_map,
                                             const TensorMap* statistics_map, const int* tables, const Problem& p) {
    int n = 0;
    KeyPart part;
    for (int round = 0; key_part(p, tables, round, part); round++) {
        for (int head = part.first_head; head < part.end_head; head++) {
            for (int tile = part.first_tile; tile < part.end_tile; tile++, n++) {
                const Place<QUERY_STAGES> at(n);
                uint64_t *q_full = &shared.q_full[at.stage], *grad_o_full = &shared.grad_o_full[at.stage];
                mbarrier_wait(&shared.q_empty[at.stage], at.parity ^ 1);
                mbarrier_expect(q_full, sizeof(Tile<QUERIES>) + sizeof(shared.statistics[0]));
                load_tile<QUERIES, HEAD_WIDTH>(shared.q[at.stage], q_map, q_full, tile * QUERIES, head, part.sample);
                tma_load_3d(shared.statistics[at.stage], statistics_map, q_full, tile * QUERIES, 0, part.sample * p.heads + head);
                mbarrier_wait(&shared.grad_o_empty[at.stage], at.parity ^ 1);
                mbarrier_expect(grad_o_full, sizeof(Tile<QUERIES>));
                load_tile<QUERIES, HEAD_WIDTH>(shared.grad_o[at.stage], grad_o_map, grad_o_full, tile * QUERIES, head, part.sample);
            }
        }
    }
}

// Scores [64 keys, QUERIES] become probabilities. The thread's first key is `key`.
__device__ __forceinline__ void key_probabilities(float (&scores)[QUERIES / 2], const float (&log_sums)[QUERIES], float scale,
                                                  const Visible& visible, bool hides, int key, int first_query) {
    #pragma unroll
    for (int i = 0; i < QUERIES / 2; i += 4) {
        const float2 log_sum = *reinterpret_cast<const float2*>(&log_sums[2 * i + accumulator_column()]);
        #pragma unroll
        for (int e = 0; e < 4; e++) scores[i + e] = exp2_(scores[i + e] * scale - (e % 2 ? log_sum.y : log_sum.x));
    }
    if (!hides) return;
    if (!visible.table) {  // a key is seen by the queries from its own index on
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
            const Pack<int, 2> of = load<2>(bounds + 4 * i + 2 * e);  // 16 bytes a load would spill registers
            if (key < of.v[0] || key >= of.v[1]) scores[i + e] = 0;
            if (key + 8 < of.v[0] || key + 8 >= of.v[1]) scores[i + 2 + e] = 0;
        }
}

// Probabilities p and the gradients of scores p (grad_p - delta), both as left factors: 16 queries at a time, so that what has been used up
// makes room for what it becomes.
__device__ __forceinline__ void key_factors(uint32_t (&probabilities)[QUERIES / 16][4], uint32_t (&grad_scores)[QUERIES / 16][4],
                                            const float (&p)[QUERIES / 2], const float (&grad_p)[QUERIES / 2],
                                            const float (&deltas)[QUERIES]) {
    #pragma unroll
    for (int i = 0; i < QUERIES / 2; i += 2) {
        const float2 delta = *reinterpret_cast<const float2*>(&deltas[i / 4 * 8 + accumulator_column()]);
        probabilities[i / 8][i / 2 % 4] = pack2<Element>(p[i], p[i + 1]);
        grad_scores[i / 8][i / 2 % 4] = pack2<Element>(p[i] * (grad_p[i] - delta.x), p[i + 1] * (grad_p[i + 1] - delta.y));
    }
}

// One tile of queries: grad_v += p^T grad_o and grad_k += grad_s^T q, for 64 keys. Scores and all that follows from them are computed
// transposed, [keys, queries]: so p^T and grad_s^T come as accumulators, and go as left factors into the next products.
__device__ __forceinline__ void add_queries(KeyShared& shared, const Problem& p, const Visible& visible, int consumer,
                                            const Place<QUERY_STAGES>& at, int first_key, int first_query,
                                            float (&grad_k)[HEAD_WIDTH / 2], float (&grad_v)[HEAD_WIDTH / 2]) {
    float scores[QUERIES / 2], grad_p[QUERIES / 2];
    uint32_t probabilities[QUERIES / 16][4], grad_scores[QUERIES / 16][4];
    const bool hides = visible.table ? visible.of_queries(first_query, QUERIES).hides(first_key, 64)
                                     : p.causal && first_query < first_key + 63;
    mbarrier_wait(&shared.q_full[at.stage], at.parity);
    start_product_transposed<QUERIES, HEAD_WIDTH>(scores, shared.k[consumer], shared.q[at.stage]);
    mbarrier_wait(&shared.grad_o_full[at.stage], at.parity);
    start_product_transposed<QUERIES, HEAD_WIDTH>(grad_p, shared.v[consumer], shared.grad_o[at.stage]);
    wait_for<1>(scores);
    key_probabilities(scores, shared.statistics[at.stage][0], p.scale * LOG2_E, visible, hides, first_key + accumulator_row(), first_query);
    wait_for<0>(grad_p);
    key_factors(probabilities, grad_scores, scores, grad_p, shared.statistics[at.stage][1]);
    start_sum_of_products<HEAD_WIDTH, QUERIES>(grad_v, probabilities, shared.grad_o[at.stage]);
    start_sum_of_products<HEAD_WIDTH, QUERIES>(grad_k, grad_scores, shared.q[at.stage]);
    wait_for<1>(grad_v);
    release(&shared.grad_o_empty[at.stage]);
    wait_for<0>(grad_k);
    release(&shared.q_empty[at.stage]);
}

__device__ __forceinline__ void compute_for_keys(KeyShared& shared, const TensorMap* grad_k_map, const TensorMap* grad_v_map,
                                                 const int* tables, const Problem& p, int consumer) {
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
                add_queries(shared, p, visible, consumer, Place<QUERY_STAGES>(n), first, tile * QUERIES, grad_k, grad_v);
        release(&shared.own_empty);
        const float one[2] = {1, 1}, scale[2] = {p.scale, p.scale};
        store_rows<1>(grad_v_map, shared.grad_v[consumer], grad_v, one, first, part.kv_head, part.sample, 1 + consumer);
        store_rows<1>(grad_k_map, shared.grad_k[consumer], grad_k, scale, first, part.kv_head, part.sample, 1 + consumer);
    }
    if (threadIdx.x % 128 == 0) tma_wait<0>();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_grad_kv(const __grid_constant__ TensorMap grad_o_map, const __grid_constant__ TensorMap q_map,
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
        if (threadIdx.x == 128 * LOADER) load_queries(shared, &q_map, &grad_o_map, &statistics_map, tables, p);
        if (threadIdx.x == 128 * LOADER + 32) load_own_keys(shared, &k_map, &v_map, tables, p);
    } else {
        set_max_registers_up<CONSUMER_REGISTERS>();
        compute_for_keys(shared, &grad_k_map, &grad_v_map, tables, p, group);
    }
}

// ---- gradients of queries

struct QueryShared {
    Tile<64> q[CONSUMERS], grad_o[CONSUMERS], grad_q[CONSUMERS];
    Tile<KEYS> k[KEY_STAGES], v[KEY_STAGES];
    uint64_t own_full, own_empty, k_full[KEY_STAGES], k_empty[KEY_STAGES], v_full[KEY_STAGES], v_empty[KEY_STAGES];
};
static_assert(sizeof(QueryShared) <= MOST_SHARED_BYTES, "more shared memory than a block can have");

typedef QueryPart<OWN, OWN> OwnQueries;  // none begins before query 0, where there are no statistics

__device__ __forceinline__ void load_own_queries(QueryShared& shared, const TensorMap* q_map, const TensorMap* grad_o_map,
                                                 const int* tables, const Problem& p) {
    OwnQueries part;
    for (int round = 0; part.of_round(p, tables, round); round++) {
        mbarrier_wait(&shared.own_empty, round % 2 ^ 1);
        mbarrier_expect(&shared.own_full, sizeof(shared.q) + sizeof(shared.grad_o));
        #pragma unroll
        for (int i = 0; i < CONSUMERS; i++) {
            load_tile<64, HEAD_WIDTH>(shared.q[i], q_map, &shared.own_full, part.first + 64 * i, part.head, part.sample);
            load_tile<64, HEAD_WIDTH>(shared.grad_o[i], grad_o_map, &shared.own_full, part.first + 64 * i, part.head, part.sample);
        }
    }
}

// What a thread knows of its two queries.
struct Rows {
    Range keys[2];  // seen
    float log_sum[2], delta[2];
};

// Scores [64 queries, KEYS] of a tile from key `first` on become probabilities.
__device__ __forceinline__ void query_probabilities(float (&scores)[KEYS / 2], const Rows& rows, float scale, bool hides, int first) {
    #pragma unroll
    for (int i = 0; i < KEYS / 2; i++) scores[i] = exp2_(scores[i] * scale - rows.log_sum[i / 2 % 2]);
    if (hides) hide_keys(scores, rows.keys, first, 0);
}

// The gradients of scores p (grad_p - delta) as a left factor.
__device__ __forceinline__ void query_factor(uint32_t (&grad_scores)[KEYS / 16][4], const float (&p)[KEYS / 2],
                                             const float (&grad_p)[KEYS / 2], const Rows& rows) {
    #pragma unroll
    for (int i = 0; i < KEYS / 2; i += 2) {
        const float delta = rows.delta[i / 2 % 2];
        grad_scores[i / 8][i / 2 % 4] = pack2<Element>(p[i] * (grad_p[i] - delta), p[i + 1] * (grad_p[i + 1] - delta));
    }
}

// One tile of keys: grad_q += grad_s k, for 64 queries.
__device__ __forceinline__ void add_keys(QueryShared& shared, const Problem& p, int consumer, const Place<KEY_STAGES>& at, const Rows& rows,
                                         const Seen& seen, int tile, float (&grad_q)[HEAD_WIDTH / 2]) {
    float scores[KEYS / 2], grad_p[KEYS / 2];
    uint32_t grad_scores[KEYS / 16][4];
    mbarrier_wait(&shared.k_full[at.stage], at.parity);
    start_product_transposed<KEYS, HEAD_WIDTH>(scores, shared.q[consumer], shared.k[at.stage]);
    mbarrier_wait(&shared.v_full[at.stage], at.parity);
    start_product_transposed<KEYS, HEAD_WIDTH>(grad_p, shared.grad_o[consumer], shared.v[at.stage]);
    wait_for<1>(scores);
    query_probabilities(scores, rows, p.scale * LOG2_E, seen.hides(tile * KEYS, KEYS), tile * KEYS);
    wait_for<0>(grad_p);
    release(&shared.v_empty[at.stage]);
    query_factor(grad_scores, scores, grad_p, rows);
    start_sum_of_products<HEAD_WIDTH, KEYS>(grad_q, grad_scores, shared.k[at.stage]);
    wait_for<0>(grad_q);
    release(&shared.k_empty[at.stage]);
}

__device__ __forceinline__ void compute_for_queries(QueryShared& shared, const TensorMap* grad_q_map, const float* statistics, int padded,
                                                    const int* tables, const Problem& p, int consumer) {
    int n = 0;
    OwnQueries part;
    for (int round = 0; part.of_round(p, tables, round); round++) {
        const int first = part.first + 64 * consumer;
        const Visible visible = visible_of(tables, p, part.sample);
        const Seen seen = visible.of_queries(first, 64);
        const float* known = statistics + (int64_t(part.sample) * p.heads + part.head) * 2 * padded;
        Rows rows;
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const int query = first + accumulator_row() + 8 * half;
            rows.keys[half] = visible.keys_of(query);
            rows.log_sum[half] = known[query];
            rows.delta[half] = known[padded + query];
        }
        float grad_q[HEAD_WIDTH / 2];
        #pragma unroll
        for (int i = 0; i < HEAD_WIDTH / 2; i++) grad_q[i] = 0;
        mbarrier_wait(&shared.own_full, round % 2);
        for (int tile = part.first_tile; tile < part.end_tile; tile++, n++)
            add_keys(shared, p, consumer, Place<KEY_STAGES>(n), rows, seen, tile, grad_q);
        release(&shared.own_empty);
        const float scale[2] = {p.scale, p.scale};
        store_rows<0>(grad_q_map, shared.grad_q[consumer], grad_q, scale, first, part.head, part.sample, 1 + consumer);
    }
    if (threadIdx.x % 128 == 0) tma_wait<0>();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_grad_q(const __grid_constant__ TensorMap grad_o_map, const __grid_constant__ TensorMap q_map,
                 const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const float* statistics,
                 const __grid_constant__ TensorMap grad_q_map, const int* tables, const Problem p, int padded) {
    QueryShared& shared = *dynamic_shared<QueryShared>();
    if (threadIdx.x == 0) {
        mbarrier_init(&shared.own_full, 1);
        mbarrier_init(&shared.own_empty, CONSUMERS * WARPS_PER_GROUP);
        for (int stage = 0; stage < KEY_STAGES; stage++) {
            mbarrier_init(&shared.k_full[stage], 1);
            mbarrier_init(&shared.v_full[stage], 1);
            mbarrier_init(&shared.k_empty[stage], CONSUMERS * WARPS_PER_GROUP);
            mbarrier_init(&shared.v_empty[stage], CONSUMERS * WARPS_PER_GROUP);
        }
        fence_barrier_init();
    }
    __syncthreads();
    const int group = warpgroup_index();
    if (group == LOADER) {
        set_max_registers_down<LOADER_REGISTERS>();
        if (threadIdx.x == 128 * LOADER) load_keys<OwnQueries, KEY_STAGES>(shared, &k_map, &v_map, tables, p);
        if (threadIdx.x == 128 * LOADER + 32) load_own_queries(shared, &q_map, &grad_o_map, tables, p);
    } else {
        set_max_registers_up<CONSUMER_REGISTERS>();
        compute_for_queries(shared, &grad_q_map, statistics, padded, tables, p, group);
    }
}
