// What the forward and the backward kernels of v3 agree on: sizes, the order of the work, what a padding mask leaves out, places in a ring
// of tiles, and how tiles of keys get there and results leave.
#pragma once
#include "../device/tiles.cuh"
#include "common.cuh"

#ifndef HEAD_WIDTH
#define HEAD_WIDTH 64
#endif

constexpr int MOST_SHARED_BYTES = 232448;  // that a block can have
constexpr int KEYS = 128;                  // of a tile

// Whether the computing warpgroups of a block, one more of which loads, find the registers that they ask for: a multiprocessor has 65536,
// a block starts with as many of them for each thread as are a multiple of 8, and setmaxnreg waits for ever for what is not there.
template <int CONSUMERS, int LOADER_REGISTERS, int CONSUMER_REGISTERS>
constexpr bool REGISTERS_SUFFICE =
    LOADER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= 65536 / (128 * (CONSUMERS + 1)) / 8 * 8 * (CONSUMERS + 1);

template <int ROWS> using Tile = Element[PANELS_OF<HEAD_WIDTH> * ROWS * PANEL_COLUMNS];

// Passed by value.
struct Problem {
    int32_t samples, heads, kv_heads, num_queries, num_keys;
    int32_t causal;   // query i sees the keys up to i
    int32_t section;  // see Schedule
    float scale;
};

__device__ __forceinline__ int num_blocks(int size, int block) { return (size + block - 1) / block; }

// How many keys a query sees: those from 0 on.
__device__ __forceinline__ int seen_keys(const Problem& p, int query) { return p.causal ? min(query + 1, p.num_keys) : p.num_keys; }

// Which keys of a sample a padding mask hides, by tiles, as v3_mask.cu writes it down. A tile of which nothing is seen is left out: it is
// not loaded, and takes no product.
struct KeyMask {
    const uint4* tiles;  // two for each tile, and for the end: which of its keys are seen, a bit each; `tile`, `seen`. Null: all are seen

    __device__ __forceinline__ KeyMask(const uint4* samples, const Problem& p, int sample)
        : tiles(samples ? samples + int64_t(sample) * 2 * (num_blocks(p.num_keys, KEYS) + 1) : nullptr) {}
    // How many of the first `all` tiles are not left out.
    __device__ __forceinline__ int seen(int all) const { return tiles ? int(tiles[2 * all + 1].y) : all; }
    // Which tile is the i-th of those.
    __device__ __forceinline__ int tile(int i) const { return tiles ? int(tiles[2 * i + 1].x) : i; }
    __device__ __forceinline__ bool sees(int key) const {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(tiles + 2 * (key / KEYS));
        return !tiles || words[key % KEYS / 32] >> key % 32 & 1;
    }
};

// Of the accumulators [64, KEYS] of a tile, those of keys that the mask hides become `hidden`.
__device__ __forceinline__ void hide_masked(float (&scores)[KEYS / 2], const KeyMask& mask, int tile, float hidden) {
    if (!mask.tiles) return;
    const uint4 seen = mask.tiles[2 * tile];
    const int shift = accumulator_column();
    const uint32_t words[4] = {seen.x >> shift, seen.y >> shift, seen.z >> shift, seen.w >> shift};
    #pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
        const int column = i / 4 * 8 + i % 2;  // after the thread's first
        if (!(words[column / 32] >> column % 32 & 1)) scores[i] = hidden;
    }
}

// The work is `per_head` equal parts of `heads` heads (of all samples). A block of the grid stays, and takes one part each round, so that
// it loads the next part while it finishes one. Which, decides speed only:
//   - within a section of heads, whose keys and values fit into the second-level cache, the same part of all heads, then the next part:
//     parts are numbered from the longest to the shortest, and what is left for the end is short;
//   - every second round runs backwards, so that no block gets the longer part each time.
struct Schedule {
    int per_head, heads, section;

    // This block's part in a round; false if there is none left.
    __device__ __forceinline__ bool part(int round, int& head, int& number) const {
        const int index = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        if (index >= per_head * heads) return false;
        const int first_head = index / (section * per_head) * section, rest = index % (section * per_head);
        const int width = min(section, heads - first_head);
        head = first_head + rest % width;
        number = rest / width;
        return true;
    }
};

// One part of the work on queries: ROWS of one head.
template <int ROWS> struct QueryPart {
    int first, head, sample;
    int tiles;  // of keys that any of the queries sees, those left out not counted

    __device__ __forceinline__ bool of_round(const Problem& p, const uint4* key_tiles, int round) {
        const int blocks = num_blocks(p.num_queries, ROWS);
        int of_all, number;
        if (!Schedule{blocks, p.samples * p.heads, p.section}.part(round, of_all, number)) return false;
        first = (blocks - 1 - number) * ROWS;  // the last queries see most keys
        head = of_all % p.heads;
        sample = of_all / p.heads;
        tiles = seen_tiles(p, KeyMask(key_tiles, p, sample), first + ROWS);
        return true;
    }
    // How many tiles the queries before `end` see.
    static __device__ __forceinline__ int seen_tiles(const Problem& p, const KeyMask& mask, int end) {
        return mask.seen(num_blocks(seen_keys(p, min(end, p.num_queries) - 1), KEYS));
    }
};

// Tile number n of a stream goes through stage n % STAGES of a ring, where it is full in a phase of this parity.
template <int STAGES> struct Place {
    int stage, parity;
    __device__ __forceinline__ explicit Place(unsigned n) : stage(n % STAGES), parity(n / STAGES % 2) {}
};

// Thread 0 of the loading warpgroup: the tiles of keys and values of one part after another, each into the next stage of its ring.
template <class Part, int STAGES, class Shared>
__device__ __forceinline__ void load_keys(Shared& shared, const TensorMap* k_map, const TensorMap* v_map, const uint4* key_tiles,
                                          const Problem& p) {
    int n = 0;
    Part part;
    for (int round = 0; part.of_round(p, key_tiles, round); round++) {
        const int kv_head = part.head / (p.heads / p.kv_heads);
        const KeyMask mask(key_tiles, p, part.sample);
        for (int i = 0; i < part.tiles; i++, n++) {
            const Place<STAGES> at(n);
            const int first = mask.tile(i) * KEYS;
            mbarrier_wait(&shared.k_empty[at.stage], at.parity ^ 1);
            mbarrier_expect(&shared.k_full[at.stage], sizeof(Tile<KEYS>));
            load_tile<KEYS, HEAD_WIDTH>(shared.k[at.stage], k_map, &shared.k_full[at.stage], first, kv_head, part.sample);
            mbarrier_wait(&shared.v_empty[at.stage], at.parity ^ 1);
            mbarrier_expect(&shared.v_full[at.stage], sizeof(Tile<KEYS>));
            load_tile<KEYS, HEAD_WIDTH>(shared.v[at.stage], v_map, &shared.v_full[at.stage], first, kv_head, part.sample);
        }
    }
}

// A warp has done with a buffer. One arrival a warp: a warp knows only of itself that its products are complete.
constexpr int WARPS_PER_GROUP = 4;
__device__ __forceinline__ void release(uint64_t* empty) {
    __syncwarp();
    if (LANE == 0) mbarrier_arrive(empty);
}

// The same, no sooner than `x`, which is never negative, is known. That is said to ptxas alone: it moves a wait for products up as far as
// it can, before the arithmetic that is meant to run beside them. An arrival that hangs on a result of that arithmetic stands in its way.
__device__ __forceinline__ void release_with(uint64_t* empty, float x) {
    __syncwarp();
    if (LANE == 0 && !(x < 0)) mbarrier_arrive(empty);  // also if x is not a number
}

// A thread of a computing warpgroup puts its accumulators into a tile from which the copy engine stores them: 64 rows from `time` on.
// `barrier` is one of the warpgroup's own, and OTHERS says from how many other tiles it stores before it comes to this one again.
template <int OTHERS>
__device__ __forceinline__ void store_rows(const TensorMap* map, Element* tile, const float (&d)[HEAD_WIDTH / 2], const float (&factor)[2],
                                           int time, int head, int sample, int barrier) {
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
