// Parts shared by the kernels of v3: sizes, order of the work, stages of a ring of tiles, loads of
// keys and stores of results.
#pragma once
#include "../gpu/include/tiles.cuh"
#include "common.cuh"

#ifndef HEAD_WIDTH
#define HEAD_WIDTH 64
#endif

constexpr int MOST_SHARED_BYTES = 232448;  // that a block can have
constexpr int KEYS = 128;                  // of a tile

// True if the computing warpgroups and the loading one get the registers that they request. A
// multiprocessor has 65536; a block starts with an equal share for each thread, a multiple of 8.
// setmaxnreg never returns if it requests more than there are.
template <int CONSUMERS, int LOADER_REGISTERS, int CONSUMER_REGISTERS>
constexpr bool REGISTERS_SUFFICE = LOADER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <=
                                   65536 / (128 * (CONSUMERS + 1)) / 8 * 8 * (CONSUMERS + 1);

template <int ROWS> using Tile = Element[PANELS_OF<HEAD_WIDTH> * ROWS * PANEL_COLUMNS];

// Passed by value.
struct Problem {
    int32_t samples, heads, kv_heads, num_queries, num_keys;
    int32_t causal, visible_step;  // as in common.cuh
    int32_t section;               // see Schedule
    float scale;
};

__device__ __forceinline__ int num_blocks(int size, int block) {
    return (size + block - 1) / block;
}

__device__ __forceinline__ Visible visible_of(const int* tables, const Problem& p, int sample) {
    return Visible(tables, p.visible_step, sample, p.num_queries, p.num_keys, p.causal);
}

// Set accumulators [64, KEYS] of a tile from key `first` on to `hidden` where a query does not see
// the key. `keys`: of the thread's two rows.
__device__ __forceinline__ void hide_keys(float (&scores)[KEYS / 2], const Range (&keys)[2],
                                          int first, float hidden) {
    const int shift = first + accumulator_column();
    const int first_0 = keys[0].first - shift, first_1 = keys[1].first - shift,
              end_0 = keys[0].end - shift, end_1 = keys[1].end - shift;
    #pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
        const int column = i / 4 * 8 + i % 2;
        if (column >= (i / 2 % 2 ? end_1 : end_0) || column < (i / 2 % 2 ? first_1 : first_0))
            scores[i] = hidden;
    }
}

// The work is `per_head` equal parts of `heads` heads (of all samples). Blocks are persistent and
// take one part a round, so that a block loads the next part while it finishes one. The order only
// affects speed:
//   - within a section of heads, whose keys and values fit into the L2 cache: the same part of all
//     heads, then the next part, from the longest to the shortest;
//   - every second round runs backwards, to balance long and short parts.
struct Schedule {
    int per_head, heads, section;

    // Find this block's part in a round; false if there is none left.
    __device__ __forceinline__ bool part(int round, int& head, int& number) const {
        const int index = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        if (index >= per_head * heads) return false;
        const int first_head = index / (section * per_head) * section,
                  rest = index % (section * per_head);
        const int width = min(section, heads - first_head);
        head = first_head + rest % width;
        number = rest / width;
        return true;
    }
};

// One part of the work on queries: ROWS of one head. Parts are counted from the end, a multiple of
// UNIT queries. The last queries see most keys, so the longest part is complete and all its
// warpgroups work. The first part may begin before query 0: loads of those rows bring zeros, and
// stores are clipped.
template <int ROWS, int UNIT> struct QueryPart {
    int first, head, sample;
    int first_tile, end_tile;  // of keys that any of the queries sees

    __device__ __forceinline__ bool of_round(const Problem& p, const int* tables, int round) {
        const int blocks = num_blocks(p.num_queries, ROWS);
        int of_all, number;
        if (!Schedule{blocks, p.samples * p.heads, p.section}.part(round, of_all, number))
            return false;
        first = num_blocks(p.num_queries, UNIT) * UNIT - (number + 1) * ROWS;
        head = of_all % p.heads;
        sample = of_all / p.heads;
        const Seen seen = visible_of(tables, p, sample).of_queries(first, ROWS);
        first_tile = seen.first / KEYS;
        end_tile = max(num_blocks(seen.end, KEYS), first_tile);
        return true;
    }
};

// Stage of tile number n in a ring, and the parity of the phase in which it is full.
template <int STAGES> struct Place {
    int stage, parity;
    __device__ __forceinline__ explicit Place(unsigned n)
        : stage(n % STAGES), parity(n / STAGES % 2) {}
};

// Load the tiles of keys and values of each part into the stages of their rings. Called by thread 0
// of the loading warpgroup.
template <class Part, int STAGES, class Shared>
__device__ __forceinline__ void load_keys(Shared& shared, const TensorMap* k_map,
                                          const TensorMap* v_map, const int* tables,
                                          const Problem& p) {
    int n = 0;
    Part part;
    for (int round = 0; part.of_round(p, tables, round); round++) {
        const int kv_head = part.head / (p.heads / p.kv_heads);
        for (int tile = part.first_tile; tile < part.end_tile; tile++, n++) {
            const Place<STAGES> at(n);
            const int first = tile * KEYS;
            mbarrier_wait(&shared.k_empty[at.stage], at.parity ^ 1);
            mbarrier_expect(&shared.k_full[at.stage], sizeof(Tile<KEYS>));
            load_tile<KEYS, HEAD_WIDTH>(shared.k[at.stage], k_map, &shared.k_full[at.stage], first,
                                        kv_head, part.sample);
            mbarrier_wait(&shared.v_empty[at.stage], at.parity ^ 1);
            mbarrier_expect(&shared.v_full[at.stage], sizeof(Tile<KEYS>));
            load_tile<KEYS, HEAD_WIDTH>(shared.v[at.stage], v_map, &shared.v_full[at.stage], first,
                                        kv_head, part.sample);
        }
    }
}

// Release a buffer: one arrival for each warp, whose wait covers only its own products.
constexpr int WARPS_PER_GROUP = 4;
__device__ __forceinline__ void release(uint64_t* empty) {
    __syncwarp();
    if (LANE == 0) mbarrier_arrive(empty);
}

// Release a buffer once `x`, which is never negative, is known. The dependency is for ptxas: it
// hoists a wait for products above the arithmetic that should overlap them. An arrival that depends
// on the result of the arithmetic prevents it.
__device__ __forceinline__ void release_with(uint64_t* empty, float x) {
    __syncwarp();
    if (LANE == 0 && !(x < 0)) mbarrier_arrive(empty);  // also if x is not a number
}

// Store a warpgroup's accumulators, 64 rows from `time` on, through a tile and the copy engine.
// `barrier` is the warpgroup's own. OTHERS: number of other tiles that it stores between two uses
// of this one.
template <int OTHERS>
__device__ __forceinline__ void store_rows(const TensorMap* map, Element* tile,
                                           const float (&d)[HEAD_WIDTH / 2],
                                           const float (&factor)[2], int time, int head, int sample,
                                           int barrier) {
    const bool leader = threadIdx.x % 128 == 0;
    if (leader) tma_wait_read<OTHERS>();  // the last store from this tile
    named_barrier_sync(barrier, 128);
    write_tile<HEAD_WIDTH>(tile, d, factor);
    fence_async_proxy();
    named_barrier_sync(barrier, 128);
    if (leader) {
        store_tile<64, HEAD_WIDTH>(map, tile, time, head, sample);
        tma_commit();
    }
}
