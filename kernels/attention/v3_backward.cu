// Attention backward, variant 3: Hopper's instructions, for bfloat16 and float16 on compute
// capability 9.0. v3_forward.cu gives the reasons for wgmma, TMA, mbarriers and warp
// specialisation. The algorithm is that of v1.cu and v2_backward.cu: one kernel for the gradients
// of keys and values, one for those of queries, and each block owns its rows. There are 7 products
// instead of the 5 with atomic additions, but every sum has one order, so the bits repeat.
//
// In both, a warpgroup owns 64 rows and walks over tiles of the other side:
//
//     attention_grad_kv, own keys                    attention_grad_q, own queries
//
//       S^T  = k q^T        [64 keys, QUERIES]         S   = q k^T        [64 queries, KEYS]
//       dP^T = v grad_o^T                              dP  = grad_o v^T
//       P^T  = exp2(S^T scale - log_sum)               P   = exp2(S scale - log_sum)
//       dS^T = P^T (dP^T - delta)                      dS  = P (dP - delta)
//       grad_v += P^T grad_o                           grad_q += dS k
//       grad_k += dS^T q
//
//   All left factors are tiles of own rows, in shared memory, or accumulators, in registers. The
//   summed dim lies along a tile's rows or columns, as the descriptors of wgmma say. Nothing is
//   transposed, and scores never go through shared memory.
//
//   The statistics log_sum and delta = <grad_o, o> belong to queries: two numbers a row for own
//   queries, columns for tiles of queries. A small kernel first writes them to a padded array, from
//   which TMA fetches them with the tile.
//
//     loader, thread 0     q0 + statistics, grad_o0, q1 + statistics, grad_o1 .. (or k0, v0, ..)
//     loader, thread 32    own rows of the next part, after the last product with this part's
//     consumer 0           S dP | exp, dS | sums          S dP | exp, dS | sums
//     consumer 1                  S dP    | exp, dS | sums         S dP  | exp, dS | sums
//
//   While one warpgroup computes exponentials, the tensor cores serve the other. A warpgroup does
//   not overlap its own tiles as in the forward pass: S, dP and both left factors would need too
//   many registers (ptxas then serialises the products, C7512).
//
// Tiles of keys that no query of a block sees are skipped, and tiles of queries that see none of
// its keys. In the others, hidden keys have probabilities of 0.
//
// Query heads that share keys are one part of the work in attention_grad_kv, so their sum needs no
// second pass.
//
// Registers of a thread, of 232: at head width 64, 64 sums + 128 for S and dP; at 128, 128 + 64
// (QUERIES is 64), or 64 + 128.
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
#include "v3_backward_keys.cuh"

// ---- gradients of queries (v3_backward_keys.cuh: of keys and values)

struct QueryShared {
    Tile<64> q[CONSUMERS], grad_o[CONSUMERS], grad_q[CONSUMERS];
    Tile<KEYS> k[KEY_STAGES], v[KEY_STAGES];
    uint64_t own_full, own_empty, k_full[KEY_STAGES], k_empty[KEY_STAGES], v_full[KEY_STAGES],
        v_empty[KEY_STAGES];
};
static_assert(sizeof(QueryShared) <= MOST_SHARED_BYTES, "more shared memory than a block can have");

// None begins before query 0, where there are no statistics.
typedef QueryPart<OWN, OWN> OwnQueries;

__device__ __forceinline__ void load_own_queries(QueryShared& shared, const TensorMap* q_map,
                                                 const TensorMap* grad_o_map, const int* tables,
                                                 const Problem& p) {
    OwnQueries part;
    for (int round = 0; part.of_round(p, tables, round); round++) {
        mbarrier_wait(&shared.own_empty, round % 2 ^ 1);
        mbarrier_expect(&shared.own_full, sizeof(shared.q) + sizeof(shared.grad_o));
        #pragma unroll
        for (int i = 0; i < CONSUMERS; i++) {
            load_tile<64, HEAD_WIDTH>(shared.q[i], q_map, &shared.own_full, part.first + 64 * i,
                                      part.head, part.sample);
            load_tile<64, HEAD_WIDTH>(shared.grad_o[i], grad_o_map, &shared.own_full,
                                      part.first + 64 * i, part.head, part.sample);
        }
    }
}

// Statistics of a thread's two queries.
struct Rows {
    Range keys[2];  // seen
    float log_sum[2], delta[2];
};

// Turn scores [64 queries, KEYS] of a tile from key `first` on into probabilities.
__device__ __forceinline__ void query_probabilities(float (&scores)[KEYS / 2], const Rows& rows,
                                                    float scale, bool hides, int first) {
    #pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
        scores[i] = exp2_(scores[i] * scale - rows.log_sum[i / 2 % 2]);
    if (hides) hide_keys(scores, rows.keys, first, 0);
}

// Pack the gradients of scores p (grad_p - delta) as a left factor.
__device__ __forceinline__ void query_factor(uint32_t (&grad_scores)[KEYS / 16][4],
                                             const float (&p)[KEYS / 2],
                                             const float (&grad_p)[KEYS / 2], const Rows& rows) {
    #pragma unroll
    for (int i = 0; i < KEYS / 2; i += 2) {
        const float delta = rows.delta[i / 2 % 2];
        grad_scores[i / 8][i / 2 % 4] =
            pack2<Element>(p[i] * (grad_p[i] - delta), p[i + 1] * (grad_p[i + 1] - delta));
    }
}

// Add one tile of keys: grad_q += grad_s k, for 64 queries.
__device__ __forceinline__ void add_keys(QueryShared& shared, const Problem& p, int consumer,
                                         const Place<KEY_STAGES>& at, const Rows& rows,
                                         const Seen& seen, int tile,
                                         float (&grad_q)[HEAD_WIDTH / 2]) {
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

__device__ __forceinline__ void compute_for_queries(QueryShared& shared,
                                                    const TensorMap* grad_q_map,
                                                    const float* statistics, int padded,
                                                    const int* tables, const Problem& p,
                                                    int consumer) {
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
        store_rows<0>(grad_q_map, shared.grad_q[consumer], grad_q, scale, first, part.head,
                      part.sample, 1 + consumer);
    }
    if (threadIdx.x % 128 == 0) tma_wait<0>();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_grad_q(const __grid_constant__ TensorMap grad_o_map,
                     const __grid_constant__ TensorMap q_map,
                     const __grid_constant__ TensorMap k_map,
                     const __grid_constant__ TensorMap v_map, const float* statistics,
                     const __grid_constant__ TensorMap grad_q_map, const int* tables,
                     const Problem p, int padded) {
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
        if (threadIdx.x == 128 * LOADER)
            load_keys<OwnQueries, KEY_STAGES>(shared, &k_map, &v_map, tables, p);
        if (threadIdx.x == 128 * LOADER + 32)
            load_own_queries(shared, &q_map, &grad_o_map, tables, p);
    } else {
        set_max_registers_up<CONSUMER_REGISTERS>();
        compute_for_queries(shared, &grad_q_map, statistics, padded, tables, p, group);
    }
}
