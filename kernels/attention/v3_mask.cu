// A padding mask as v3 reads it, of bits and by tiles (KeyMask in v3_common.cuh). 1/8 of the mask's size, written once a pass: every block
// of the attention kernels then knows at once which tiles of keys it may leave out, and a tile's bits are one load.
//
// measured: not yet
//
// minillm-arch: sm_90a
// minillm-build: -DELEMENT=bfloat16
#include "v3_common.cuh"

// key_mask [B, num_keys], not 0 where a key is seen; tiles [B, number of tiles + 1, 8], the last of a sample for how many it has in all.
// Grid: the samples, a thread for each key of a tile.
extern "C" __global__ void __launch_bounds__(KEYS) attention_key_tiles(const uint8_t* key_mask, uint32_t* tiles, int num_keys) {
    __shared__ uint32_t words[KEYS / 32];
    const int all = num_blocks(num_keys, KEYS);
    key_mask += int64_t(blockIdx.x) * num_keys;
    tiles += int64_t(blockIdx.x) * 8 * (all + 1);
    int seen = 0;
    for (int tile = 0; tile < all; tile++) {
        const int key = tile * KEYS + threadIdx.x;
        const uint32_t word = __ballot_sync(0xffffffffu, key < num_keys && key_mask[key]);
        if (LANE == 0) words[WARP] = word;
        const bool any = __syncthreads_or(word != 0);
        if (threadIdx.x < KEYS / 32) tiles[8 * tile + threadIdx.x] = words[threadIdx.x];
        if (threadIdx.x == 0) {
            tiles[8 * tile + 5] = seen;
            if (any) tiles[8 * seen + 4] = tile;
        }
        seen += any;
        __syncthreads();  // the words have been read
    }
    if (threadIdx.x == 0) tiles[8 * all + 5] = seen;
}
