// Tiles of 16-bit elements in shared memory, as Hopper's copy engine writes and its tensor cores
// read them, and products of whole tiles.
//
// A tile [ROWS][columns] lies as panels of 64 columns, each [ROWS][64] elements from a multiple of
// 1024 bytes on; the last may be partly empty. A row of a panel is 128 bytes, the width of the 32
// banks, in eight chunks of 16. Chunk c of row r lies at c ^ (r % 8) ("128-byte swizzle"): a chunk
// of eight rows, or the eight chunks of one row, then covers all banks once.
//
//       chunk  0 1 2 3 4 5 6 7        panel 0            panel 1            in memory
//     row 0    0 1 2 3 4 5 6 7    columns 0 .. 63    columns 64 .. 127    +---------+ 0
//     row 1    1 0 3 2 5 4 7 6    +--------------+   +--------------+     | panel 0 |
//     row 2    2 3 0 1 6 7 4 5    | ROWS rows of |   |              |     +---------+ ROWS * 128
//     ...                         | 128 bytes    |   |              |     | panel 1 |
//     row 7    7 6 5 4 3 2 1 0    +--------------+   +--------------+     +---------+ ROWS * 256
//     row 8    0 1 2 3 4 5 6 7
#pragma once
#include "hopper.cuh"

constexpr int PANEL_COLUMNS = 64, PANEL_ROW_BYTES = 128, PANEL_EIGHT_ROWS = 8 * PANEL_ROW_BYTES;

// Number of panels of a tile.
template <int COLUMNS> constexpr int PANELS_OF = (COLUMNS + PANEL_COLUMNS - 1) / PANEL_COLUMNS;

// Return the offset of element (row, column) of a tile, in elements.
template <int ROWS> __device__ __forceinline__ int swizzled(int row, int column) {
    const int chunk = (column % PANEL_COLUMNS / 8) ^ (row % 8);
    return column / PANEL_COLUMNS * ROWS * PANEL_COLUMNS + row * PANEL_COLUMNS + chunk * 8 +
           column % 8;
}

// Copy all panels of a tile from or to a box of an array [B, T, H, K]. Rows and columns outside the
// array are zeros in the tile.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void load_tile(Element* tile, const TensorMap* map, uint64_t* full,
                                          int time, int head, int sample) {
    #pragma unroll
    for (int panel = 0; panel < PANELS_OF<COLUMNS>; panel++)
        tma_load_4d(tile + panel * ROWS * PANEL_COLUMNS, map, full, panel * PANEL_COLUMNS, head,
                    time, sample);
}
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void store_tile(const TensorMap* map, const Element* tile, int time,
                                           int head, int sample) {
    #pragma unroll
    for (int panel = 0; panel < PANELS_OF<COLUMNS>; panel++)
        tma_store_4d(map, tile + panel * ROWS * PANEL_COLUMNS, panel * PANEL_COLUMNS, head, time,
                     sample);
}

// Return the descriptor of the memory `bytes` after that of another. Addresses end below 2^18 and
// are counted in units of 16 bytes, so only the low word changes, by one addition.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, int bytes) {
    return (descriptor & 0xffffffff00000000ull) | uint32_t(uint32_t(descriptor) + (bytes >> 4));
}

// Products sum over 16 columns or rows at a time: step k is `advanced` by these bytes from the
// descriptor of the tile.
//   columns: of a left factor, or of a right one that lies as [N, columns]
//   rows: of a right factor that lies as [rows, N]
__device__ __forceinline__ uint64_t columns_descriptor(const Element* tile) {
    return shared_descriptor(tile, 16, PANEL_EIGHT_ROWS, SWIZZLE_128);
}
template <int ROWS> __device__ __forceinline__ int columns_step(int k) {
    return k / 4 * ROWS * PANEL_ROW_BYTES + k % 4 * 32;
}
template <int ROWS> __device__ __forceinline__ uint64_t rows_descriptor(const Element* tile) {
    return shared_descriptor(tile, ROWS * PANEL_ROW_BYTES, PANEL_EIGHT_ROWS, SWIZZLE_128);
}
__device__ __forceinline__ int rows_step(int k) { return k * 16 * PANEL_ROW_BYTES; }

// d [64, N] = a [64, COLUMNS] b [N, COLUMNS]^T, both tiles. Start and commit as one group.
template <int N, int COLUMNS>
__device__ __forceinline__ void start_product_transposed(float (&d)[N / 2], const Element* a,
                                                         const Element* b) {
    accumulator_fence(d);
    warpgroup_fence();
    const uint64_t left = columns_descriptor(a), right = columns_descriptor(b);
    #pragma unroll
    for (int k = 0; k < COLUMNS / 16; k++)
        wgmma_m64_k16<Element, N, 0>(d, advanced(left, columns_step<64>(k)),
                                     advanced(right, columns_step<N>(k)), k > 0);
    warpgroup_commit();
}
// d [64, N] += a [64, ROWS] b [ROWS, N], a in registers, b a tile. Start and commit as one group.
template <int N, int ROWS>
__device__ __forceinline__ void start_sum_of_products(float (&d)[N / 2],
                                                      const uint32_t (&a)[ROWS / 16][4],
                                                      const Element* b) {
    accumulator_fence(d);
    warpgroup_fence();
    const uint64_t right = rows_descriptor<ROWS>(b);
    #pragma unroll
    for (int k = 0; k < ROWS / 16; k++)
        wgmma_m64_k16<Element, N, 1>(d, a[k], advanced(right, rows_step(k)), true);
    warpgroup_commit();
}
// Wait until at most PENDING groups are in flight, d's group not among them.
template <int PENDING, int SIZE> __device__ __forceinline__ void wait_for(float (&d)[SIZE]) {
    warpgroup_wait<PENDING>();
    accumulator_fence(d);
}

// Round accumulators [64, N] to 16 bits as a left factor: a thread holds the same elements in both,
// so nothing moves.
template <int N> __device__ __forceinline__ void as_left_factor(uint32_t (&a)[N / 16][4],
                                                                const float (&d)[N / 2]) {
    #pragma unroll
    for (int k = 0; k < N / 16; k++) {
        #pragma unroll
        for (int e = 0; e < 4; e++)
            a[k][e] = pack2<Element>(d[8 * k + 2 * e], d[8 * k + 2 * e + 1]);
    }
}

// Return the index of the thread's warpgroup; the shuffle makes it uniform over a warp for the
// compiler.
__device__ __forceinline__ int warpgroup_index() {
    return __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0);
}

// Return the row, of a warpgroup's 64, of this thread's accumulators d[4 i], d[4 i + 1]; the two
// after them are 8 rows below. Their columns are 8 i + accumulator_column() and the next.
__device__ __forceinline__ int accumulator_row() { return WARP % 4 * 16 + LANE / 4; }
__device__ __forceinline__ int accumulator_column() { return LANE % 4 * 2; }

// Write accumulators [64, N], times a factor for each of the thread's two rows, into a tile.
template <int N> __device__ __forceinline__ void write_tile(Element* tile, const float (&d)[N / 2],
                                                            const float (&factor)[2]) {
    #pragma unroll
    for (int i = 0; i < N / 2; i += 2) {
        const int half = i / 2 % 2;
        const int place =
            swizzled<64>(accumulator_row() + 8 * half, i / 4 * 8 + accumulator_column());
        *reinterpret_cast<uint32_t*>(tile + place) =
            pack2<Element>(d[i] * factor[half], d[i + 1] * factor[half]);
    }
}
