// What the forward and the backward kernels of v3 agree on: sizes, the order of the work, and places in a ring of tiles.
#pragma once
#include "../device/tiles.cuh"
#include "common.cuh"

#ifndef HEAD_WIDTH
#define HEAD_WIDTH 64
#endif

constexpr int MOST_SHARED_BYTES = 232448;  // that a block can have

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

// Tile number n of a stream goes through stage n % STAGES of a ring, where it is full in a phase of this parity.
template <int STAGES> struct Place {
    int stage, parity;
    __device__ __forceinline__ explicit Place(unsigned n) : stage(n % STAGES), parity(n / STAGES % 2) {}
};

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
