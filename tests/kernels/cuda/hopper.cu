// Single products of tiles on Hopper's tensor cores, loaded and stored by its copy engine: for each way in which kernels lay tiles out.
// minillm-arch: sm_90a
#ifndef ELEMENT
#define ELEMENT bfloat16
#endif
#include "../../../kernels/gpu/include/tiles.cuh"

#ifndef TEST_WIDTH
#define TEST_WIDTH 128
#endif
#ifndef TEST_DEPTH
#define TEST_DEPTH 128
#endif
#ifndef SWIZZLE_BYTES
#define SWIZZLE_BYTES 128
#endif

__device__ __forceinline__ void write_accumulators(float* d, const float (&sums)[TEST_WIDTH / 2]) {
    for (int i = 0; i < TEST_WIDTH / 2; i++)
        d[(accumulator_row() + i / 2 % 2 * 8) * TEST_WIDTH + i / 4 * 8 + accumulator_column() + i % 2] = sums[i];
}

struct Shared {
    Element a[PANELS_OF<TEST_DEPTH> * 64 * PANEL_COLUMNS], b[PANELS_OF<TEST_DEPTH> * TEST_WIDTH * PANEL_COLUMNS];
    uint64_t full;
};

__device__ __forceinline__ void prepare(uint64_t* full) {
    if (threadIdx.x == 0) {
        mbarrier_init(full, 1);
        fence_barrier_init();
    }
    __syncthreads();
}

// d [64, TEST_WIDTH] = a [64, TEST_DEPTH] b [TEST_WIDTH, TEST_DEPTH]^T; a also goes back, through shared memory, to `copy`.
extern "C" __global__ void __launch_bounds__(128)
product_transposed(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                   const __grid_constant__ TensorMap copy_map, float* d) {
    Shared& shared = *dynamic_shared<Shared>();
    prepare(&shared.full);
    if (threadIdx.x == 0) {
        mbarrier_expect(&shared.full, sizeof(shared.a) + sizeof(shared.b));
        load_tile<64, TEST_DEPTH>(shared.a, &a_map, &shared.full, 0, 0, 0);
        load_tile<TEST_WIDTH, TEST_DEPTH>(shared.b, &b_map, &shared.full, 0, 0, 0);
    }
    mbarrier_wait(&shared.full, 0);
    float sums[TEST_WIDTH / 2];
    start_product_transposed<TEST_WIDTH, TEST_DEPTH>(sums, shared.a, shared.b);
    wait_for<0>(sums);
    write_accumulators(d, sums);
    if (threadIdx.x == 0) {
        store_tile<64, TEST_DEPTH>(&copy_map, shared.a, 0, 0, 0);
        tma_commit();
        tma_wait<0>();
    }
}

// d [64, TEST_WIDTH] = 1 + round(a [64, TEST_DEPTH]) b [TEST_DEPTH, TEST_WIDTH], a from registers in which it lies as accumulators do; then
// round(2 d) to `copy`.
extern "C" __global__ void __launch_bounds__(128)
product(const float* a, const __grid_constant__ TensorMap b_map, const __grid_constant__ TensorMap copy_map, float* d) {
    struct Tiles {
        Element b[PANELS_OF<TEST_WIDTH> * TEST_DEPTH * PANEL_COLUMNS], copy[PANELS_OF<TEST_WIDTH> * 64 * PANEL_COLUMNS];
        uint64_t full;
    };
    Tiles& shared = *dynamic_shared<Tiles>();
    prepare(&shared.full);
    if (threadIdx.x == 0) {
        mbarrier_expect(&shared.full, sizeof(shared.b));
        load_tile<TEST_DEPTH, TEST_WIDTH>(shared.b, &b_map, &shared.full, 0, 0, 0);
    }
    float left[TEST_DEPTH / 2], sums[TEST_WIDTH / 2];
    for (int i = 0; i < TEST_DEPTH / 2; i++)
        left[i] = a[(accumulator_row() + i / 2 % 2 * 8) * TEST_DEPTH + i / 4 * 8 + accumulator_column() + i % 2];
    for (int i = 0; i < TEST_WIDTH / 2; i++) sums[i] = 1;
    uint32_t factor[TEST_DEPTH / 16][4];
    as_left_factor<TEST_DEPTH>(factor, left);
    mbarrier_wait(&shared.full, 0);
    start_sum_of_products<TEST_WIDTH, TEST_DEPTH>(sums, factor, shared.b);
    wait_for<0>(sums);
    write_accumulators(d, sums);
    const float two[2] = {2, 2};
    write_tile<TEST_WIDTH>(shared.copy, sums, two);
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x == 0) {
        store_tile<64, TEST_WIDTH>(&copy_map, shared.copy, 0, 0, 0);
        tma_commit();
        tma_wait<0>();
    }
}

// One instruction each, for tiles whose rows have SWIZZLE_BYTES: d[0] = a b^T and d[1] = a c, with a [64, 16], b [64, 16], c [16, 64]; a
// and b are the columns from `first` on of tiles, c comes as panels of 16 rows.
extern "C" __global__ void __launch_bounds__(128)
swizzles(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, const __grid_constant__ TensorMap c_map,
         float* d, int first) {
    constexpr int SPAN = SWIZZLE_BYTES / 2, SWIZZLE = SWIZZLE_BYTES == 128 ? SWIZZLE_128 : SWIZZLE_BYTES == 64 ? SWIZZLE_64 : SWIZZLE_32;
    struct Tiles {
        Element a[64 * SPAN], b[64 * SPAN], c[16 * 64];
        uint64_t full;
    };
    Tiles& shared = *dynamic_shared<Tiles>();
    prepare(&shared.full);
    if (threadIdx.x == 0) {
        mbarrier_expect(&shared.full, sizeof(shared.a) + sizeof(shared.b) + sizeof(shared.c));
        tma_load_2d(shared.a, &a_map, &shared.full, 0, 0);
        tma_load_2d(shared.b, &b_map, &shared.full, 0, 0);
        for (int panel = 0; panel < 64 / SPAN; panel++) tma_load_2d(shared.c + panel * 16 * SPAN, &c_map, &shared.full, panel * SPAN, 0);
    }
    mbarrier_wait(&shared.full, 0);
    float one[32], two[32];
    const uint64_t a = shared_descriptor(shared.a + first, 16, 8 * SWIZZLE_BYTES, SWIZZLE);
    warpgroup_fence();
    wgmma_m64_k16<Element, 64, 0>(one, a, shared_descriptor(shared.b + first, 16, 8 * SWIZZLE_BYTES, SWIZZLE), false);
    wgmma_m64_k16<Element, 64, 1>(two, a, shared_descriptor(shared.c, 16 * SWIZZLE_BYTES, 8 * SWIZZLE_BYTES, SWIZZLE), false);
    warpgroup_commit();
    warpgroup_wait<0>();
    for (int i = 0; i < 32; i++) {
        const int place = (accumulator_row() + i / 2 % 2 * 8) * 64 + i / 4 * 8 + accumulator_column() + i % 2;
        d[place] = one[i];
        d[64 * 64 + place] = two[i];
    }
}
