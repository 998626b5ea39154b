// Smoke test of what the Hopper kernels build on: a tensor map passed by value, a TMA copy, and the
// barrier at which the copy arrives.
// minillm-arch: sm_90a
// minillm-sass: copy_box UTMALDG
// minillm-build: -DELEMENT=bfloat16
#include "../gpu/include/hopper.cuh"

#define ROWS 8
#define COLUMNS 32

// Copy the box of the mapped matrix that begins at (row, column) to out [ROWS, COLUMNS]. Elements
// outside the matrix are zero.
extern "C" __global__ void __launch_bounds__(128)
copy_box(const __grid_constant__ TensorMap map, Element* out, int row, int column) {
    __shared__ __align__(128) Element box[ROWS * COLUMNS];
    __shared__ uint64_t arrived;
    if (threadIdx.x == 0) {
        mbarrier_init(&arrived, 1);
        fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_expect(&arrived, sizeof(box));
        tma_load_2d(box, &map, &arrived, column, row);
    }
    mbarrier_wait(&arrived, 0);
    for (int i = threadIdx.x; i < ROWS * COLUMNS; i += blockDim.x) out[i] = box[i];
}
