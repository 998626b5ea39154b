// Attention forward, variant 3: Hopper's instructions, for bfloat16 and float16 on compute
// capability 9.0. After FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608). tiles.cuh shows the
// layout of tiles, v3_common.cuh the order of the work.
//
// Differences from v2, with reasons:
//
// * wgmma instead of mma.sync, which reaches two thirds of this chip's peak. A warpgroup multiplies
//   64 rows by a whole tile in one instruction. The tensor cores read tiles from shared memory: no
//   ldmatrix, no registers for the right factor. Scores stay in registers: packed to 16 bits, they
//   are the left factor of the product with the values.
//
// * TMA instead of cp.async: one thread requests a tile, and the copy engine fetches, clips and
//   swizzles it. An mbarrier counts the bytes. No thread computes addresses.
//
// * Warp specialisation. The last warpgroup loads, the others compute; each buffer of a ring has a
//   "full" and an "empty" barrier. Loading needs few registers, and the rest go to the others
//   (setmaxnreg).
//
//       loader, thread 0      K0 V0 K1 V1 ..   waits for `empty` of a stage, loads the tile
//       loader, thread 32     Q                the next part's, after this part's last scores
//
//       ring of STAGES        +-----+-----+-----+-----+
//       tiles of keys, and    | K0  | K1  | K2  | K3  |   tile n: stage n % STAGES,
//       one of values         +-----+-----+-----+-----+   parity n / STAGES % 2
//
//       consumer 0..2         waits for `full`, computes, and every warp arrives at `empty`
//
// * Products overlap with arithmetic: the scores of tile t + 1 start before the sum over tile t,
//   and the exponentials of t + 1 run during that sum. Warpgroups take turns: one uses the tensor
//   cores while the others compute exponentials.
//
//       consumer 0   QK1 PV0  exp 1 .............   QK2 PV1  exp 2 ..
//       consumer 1            QK1 PV0  exp 1 .............   QK2 PV1  exp 2 ..
//       consumer 2                     QK1 PV0  exp 1 .............   QK2 ..
//       tensor cores  0   0   1    1   2    2    0   0   1    1
//
// * The output goes through shared memory to the copy engine: from registers, a row would be
//   written in pieces of 16 bytes.
//
// * Persistent blocks, one a multiprocessor. Stores of a part's output and loads of the next part's
//   queries and keys overlap with other work. For causal attention long parts come first.
//
// Registers of a thread: at head width 64, 64 scores + 32 sums + 32 for the packed left factor, of
// 160; at 128, 64 + 64 + 32 of 232, hence one consumer less. Shared memory: 176 and 192 KB, one
// block a multiprocessor.
//
// * Tiles of keys that no query of a block sees are skipped; in the others, hidden scores become
//   minus infinity. All warpgroups of a block walk over the same tiles, from the first visible one.
//
// Dropout is left to v2. Its hash takes about ten integer instructions a score, at 64 a clock and
// multiprocessor; a score's products take 1/16 clock and its exponential another 1/16. The kernel
// would run at half its speed, and head width 64 leaves no registers for the words of the rows.
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
// minillm-sass: attention_forward HGMMA*20 UTMALDG*3 UTMASTG USETMAXREG*2
#include "v3_common.cuh"

constexpr int CONSUMERS = HEAD_WIDTH > 64 ? 2 : 3;  // warpgroups that compute, for 64 queries each
constexpr int STAGES = HEAD_WIDTH > 64 ? 2 : 4;     // of the rings of tiles of keys and of values
constexpr int QUERIES = 64 * CONSUMERS;
constexpr int LOADER = CONSUMERS, THREADS = 128 * (CONSUMERS + 1);
// A multiprocessor has 65536 registers. Threads start with an equal share; the loading warpgroup
// releases those that it does not need.
constexpr int LOADER_REGISTERS = CONSUMERS == 2 ? 40 : 32,
              CONSUMER_REGISTERS = CONSUMERS == 2 ? 232 : 160;
static_assert(REGISTERS_SUFFICE<CONSUMERS, LOADER_REGISTERS, CONSUMER_REGISTERS>,
              "more registers than a block has");

struct Shared {
    Tile<64> q[CONSUMERS], o[CONSUMERS];
    Tile<KEYS> k[STAGES], v[STAGES];
    uint64_t q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};
static_assert(sizeof(Shared) <= MOST_SHARED_BYTES, "more shared memory than a block can have");

typedef QueryPart<QUERIES, 64> Part;

// ---- the loading warpgroup: one thread for the keys and values (load_keys in v3_common.cuh), one
// for the queries, so that neither waits for the other's buffers

__device__ __forceinline__ void load_queries(Shared& shared, const TensorMap* q_map,
                                             const int* tables, const Problem& p) {
    Part part;
    for (int round = 0; part.of_round(p, tables, round); round++) {
        mbarrier_wait(&shared.q_empty, round % 2 ^ 1);
        mbarrier_expect(&shared.q_full, sizeof(shared.q));
        #pragma unroll
        for (int i = 0; i < CONSUMERS; i++)
            load_tile<64, HEAD_WIDTH>(shared.q[i], q_map, &shared.q_full, part.first + 64 * i,
                                      part.head, part.sample);
    }
}

// ---- a computing warpgroup

// Warpgroups take turns at starting products, so that one works on its scores while the tensor
// cores serve the others. The ids of turn barriers follow those of store_rows. Each synchronises
// two warpgroups: the one whose turn it is and the one before.
#ifndef TAKE_TURNS
#define TAKE_TURNS 1
#endif
__device__ __forceinline__ void begin_turns(int consumer) {
    if (TAKE_TURNS && consumer == CONSUMERS - 1) named_barrier_arrive(1 + CONSUMERS, 256);
}
__device__ __forceinline__ void await_turn(int consumer) {
    if (TAKE_TURNS) named_barrier_sync(1 + CONSUMERS + consumer, 256);
}
__device__ __forceinline__ void pass_turn_on(int consumer) {
    if (TAKE_TURNS) named_barrier_arrive(1 + CONSUMERS + (consumer + 1) % CONSUMERS, 256);
}

// State of a thread's two rows.
struct Rows {
    Range keys[2];                          // seen
    float top[2] = {-INFINITY, -INFINITY};  // the greatest score so far, times `scale`
    float sum[2] = {0, 0};                  // of exp2(scale score - top), of this thread's columns
};

// Replace scores by exp2(scale score - top). `correction` is the factor of sums with an earlier
// top: exactly 1 where the top has not changed.
__device__ __forceinline__ void exponentiate(float (&scores)[KEYS / 2], Rows& rows,
                                             float (&correction)[2], float scale) {
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        float top = -INFINITY;
        #pragma unroll
        for (int i = 2 * half; i < KEYS / 2; i += 4)
            top = fmaxf(top, fmaxf(scores[i], scores[i + 1]));
        // Four neighbouring lanes hold a row.
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        top = fmaxf(rows.top[half], top * scale);
        const float shift = top == -INFINITY ? 0 : top;  // no key seen yet
        correction[half] = exp2_(rows.top[half] - shift);
        rows.top[half] = top;
        float sum = 0;
        #pragma unroll
        for (int i = 2 * half; i < KEYS / 2; i += 4) {
            scores[i] = exp2_(scores[i] * scale - shift);
            scores[i + 1] = exp2_(scores[i + 1] * scale - shift);
            sum += scores[i] + scores[i + 1];
        }
        rows.sum[half] = rows.sum[half] * correction[half] + sum;
    }
}

// Multiply a warp's rows by `correction` if one of them has a new top, which is rare after the
// first tiles.
__device__ __forceinline__ void rescale(float (&out)[HEAD_WIDTH / 2],
                                        const float (&correction)[2]) {
    if (!__any_sync(0xffffffffu, correction[0] != 1 || correction[1] != 1)) return;
    #pragma unroll
    for (int i = 0; i < HEAD_WIDTH / 2; i++) out[i] *= correction[i / 2 % 2];
}

// out [64, HEAD_WIDTH] = sum over `tiles` tiles of keys from `first_tile` on, one at least, of
// exp(scores) values. The scores of one tile are computed during the sum over the last one's
// values; the other warpgroups use the tensor cores in between.
__device__ __forceinline__ void attend(Shared& shared, int consumer, Rows& rows, const Seen& seen,
                                       int first_tile, int tiles, int n, float scale,
                                       float (&out)[HEAD_WIDTH / 2]) {
    float scores[KEYS / 2], correction[2];
    uint32_t probabilities[KEYS / 16][4];

    Place<STAGES> at(n);
    mbarrier_wait(&shared.k_full[at.stage], at.parity);
    start_product_transposed<KEYS, HEAD_WIDTH>(scores, shared.q[consumer], shared.k[at.stage]);
    wait_for<0>(scores);
    release(&shared.k_empty[at.stage]);
    if (seen.hides(first_tile * KEYS, KEYS))
        hide_keys(scores, rows.keys, first_tile * KEYS, -INFINITY);
    WATCH(S, scores);
    exponentiate(scores, rows, correction, scale);
    WATCH(m, rows.top);
    WATCH(l, rows.sum);
    as_left_factor<KEYS>(probabilities, scores);
    for (int i = 1; i < tiles; i++) {
        const Place<STAGES> next(n + i);
        mbarrier_wait(&shared.k_full[next.stage], next.parity);
        await_turn(consumer);
        start_product_transposed<KEYS, HEAD_WIDTH>(scores, shared.q[consumer],
                                                   shared.k[next.stage]);
        mbarrier_wait(&shared.v_full[at.stage], at.parity);
        start_sum_of_products<HEAD_WIDTH, KEYS>(out, probabilities, shared.v[at.stage]);
        pass_turn_on(consumer);
        wait_for<1>(scores);
        const int first = (first_tile + i) * KEYS;
        if (seen.hides(first, KEYS)) hide_keys(scores, rows.keys, first, -INFINITY);
        WATCH(S, scores);
        exponentiate(scores, rows, correction, scale);
        WATCH(m, rows.top);
        WATCH(l, rows.sum);
        release_with(&shared.k_empty[next.stage], rows.sum[0] + rows.sum[1]);
        wait_for<0>(out);
        release(&shared.v_empty[at.stage]);
        rescale(out, correction);
        as_left_factor<KEYS>(probabilities, scores);
        at = next;
    }
    release(&shared.q_empty);
    mbarrier_wait(&shared.v_full[at.stage], at.parity);
    start_sum_of_products<HEAD_WIDTH, KEYS>(out, probabilities, shared.v[at.stage]);
    wait_for<0>(out);
    release(&shared.v_empty[at.stage]);
}

// Skip the tiles from `own` on that only other warpgroups of the block need. There are no turns for
// the first tile of a part.
__device__ __forceinline__ void pass_over(Shared& shared, int consumer, int own, int tiles, int n) {
    for (int i = own; i < tiles; i++) {
        const Place<STAGES> at(n + i);
        if (i > 0) await_turn(consumer);
        if (i > 0) pass_turn_on(consumer);
        mbarrier_wait(&shared.k_full[at.stage], at.parity);
        release(&shared.k_empty[at.stage]);
        mbarrier_wait(&shared.v_full[at.stage], at.parity);
        release(&shared.v_empty[at.stage]);
    }
}

// Compute the `factor` that normalises the sums of the thread's two rows, and write their
// log-sum-exp.
__device__ __forceinline__ void normalise(const Rows& rows, float* lse, const Problem& p,
                                          const Part& part, int first, float (&factor)[2]) {
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = rows.sum[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        factor[half] = sum == 0 ? 0 : 1 / sum;
        const int query = first + accumulator_row() + 8 * half;
        if (LANE % 4 == 0 && unsigned(query) < unsigned(p.num_queries))
            lse[(int64_t(part.sample) * p.heads + part.head) * p.num_queries + query] =
                LN_2 * (rows.top[half] + log2_(sum));
    }
}

__device__ __forceinline__ void compute(Shared& shared, const TensorMap* o_map, float* lse,
                                        const int* tables, const Problem& p, int consumer) {
    int n = 0;
    Part part;
    begin_turns(consumer);
    for (int round = 0; part.of_round(p, tables, round); round++) {
        const int first = part.first + 64 * consumer;
        const Visible visible = visible_of(tables, p, part.sample);
        const Seen seen = visible.of_queries(first, 64);
        const int tiles = max(num_blocks(seen.end, KEYS) - part.first_tile, 0);
        Rows rows;
        rows.keys[0] = visible.keys_of(first + accumulator_row());
        rows.keys[1] = visible.keys_of(first + accumulator_row() + 8);
        float out[HEAD_WIDTH / 2];
        #pragma unroll
        for (int i = 0; i < HEAD_WIDTH / 2; i++) out[i] = 0;
        mbarrier_wait(&shared.q_full, round % 2);
        if (tiles > 0)
            attend(shared, consumer, rows, seen, part.first_tile, tiles, n, p.scale * LOG2_E, out);
        else
            release(&shared.q_empty);  // these queries see none of the keys
        const int of_part = part.end_tile - part.first_tile;
        pass_over(shared, consumer, tiles, of_part, n);
        n += of_part;
        float factor[2];
        normalise(rows, lse, p, part, first, factor);
        store_rows<0>(o_map, shared.o[consumer], out, factor, first, part.head, part.sample,
                      1 + consumer);
    }
    if (threadIdx.x % 128 == 0) tma_wait<0>();
}

// o [B, Tq, H, K] and lse [B, H, Tq] of q [B, Tq, H, K], k and v [B, Tk, Hkv, K]; tables: Visible.
// All sizes are at least 1, scale > 0. Boxes of the maps: 64 queries, or KEYS keys, of one head, by
// 64 columns. The grid may have any number of blocks.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_forward(const __grid_constant__ TensorMap q_map,
                      const __grid_constant__ TensorMap k_map,
                      const __grid_constant__ TensorMap v_map,
                      const __grid_constant__ TensorMap o_map, float* lse, const int* tables,
                      const Problem p) {
    Shared& shared = *dynamic_shared<Shared>();
    if (threadIdx.x == 0) {
        mbarrier_init(&shared.q_full, 1);
        mbarrier_init(&shared.q_empty, CONSUMERS * WARPS_PER_GROUP);
        for (int stage = 0; stage < STAGES; stage++) {
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
        if (threadIdx.x == 128 * LOADER) load_keys<Part, STAGES>(shared, &k_map, &v_map, tables, p);
        if (threadIdx.x == 128 * LOADER + 32) load_queries(shared, &q_map, tables, p);
    } else {
        set_max_registers_up<CONSUMER_REGISTERS>();
        compute(shared, &o_map, lse, tables, p, group);
    }
}
