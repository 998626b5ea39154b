// Kernels that each commit one fault, for test_emulator.py. The comment on the faulty line is what the test looks for in the report.
#include "../../../kernels/gpu/include/ampere.cuh"

extern "C" __global__ void read_past_array(const float* x, float* y) {
    y[threadIdx.x] = x[threadIdx.x + 1];  // FAULT read_past_array
}

extern "C" __global__ void write_before_array(float* y) {
    y[(int)threadIdx.x - 1] = 1.0f;  // FAULT write_before_array
}

extern "C" __global__ void null_pointer(const float* x, float* y) {
    y[threadIdx.x] = x[threadIdx.x];  // FAULT null_pointer
}

extern "C" __global__ void past_dynamic_shared(float* y) {
    float* tile = dynamic_shared<float>();
    tile[threadIdx.x] = 1.0f;  // FAULT past_dynamic_shared
    y[threadIdx.x] = tile[threadIdx.x];
}

extern "C" __global__ void past_static_shared(float* y) {
    __shared__ float tile[32];
    tile[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x + 1];  // FAULT past_static_shared
}

extern "C" __global__ void past_registers(float* y, int n) {
    float kept[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    float sum = 0.0f;
    for (int i = 0; i < n; i++) sum += kept[i];  // FAULT past_registers
    y[threadIdx.x] = sum;
}

extern "C" __global__ void misaligned_vector(const float* x, float* y) {
    store16(y + 4 * threadIdx.x, load16(x + 4 * threadIdx.x + 1));  // FAULT misaligned_vector
}

extern "C" __global__ void uninitialised_shared(float* y) {
    __shared__ float tile[64];
    tile[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x + 1];  // FAULT uninitialised_shared
}

extern "C" __global__ void uninitialised_global(float* y, float* z) {
    if (threadIdx.x > 0) y[threadIdx.x] = 1.0f;
    z[threadIdx.x] = y[threadIdx.x];  // FAULT uninitialised_global
}

extern "C" __global__ void left_over_from_block_before(float* y) {
    __shared__ float tile[32];
    if (blockIdx.x == 0) tile[threadIdx.x] = 1.0f;
    y[threadIdx.x + 32 * blockIdx.x] = tile[threadIdx.x];  // FAULT left_over_from_block_before
}

extern "C" __global__ void read_without_barrier(float* y) {
    __shared__ float tile[128];
    tile[threadIdx.x] = (float)threadIdx.x;
    y[threadIdx.x] = tile[threadIdx.x ^ 1];  // FAULT read_without_barrier
}

extern "C" __global__ void write_after_read(float* y) {
    __shared__ float tile[64];
    for (int i = 0; i < 2; i++) {
        tile[threadIdx.x] = (float)i;  // FAULT write_after_read
        __syncthreads();
        y[threadIdx.x] = tile[threadIdx.x ^ 32];
    }
}

extern "C" __global__ void barrier_of_the_wrong_warp(float* y) {
    __shared__ float tile[64];
    tile[threadIdx.x] = (float)threadIdx.x;
    __syncwarp();
    y[threadIdx.x] = tile[threadIdx.x ^ 32];  // FAULT barrier_of_the_wrong_warp
}

extern "C" __global__ void blocks_share_a_sum(float* y) {
    if (threadIdx.x == 0) y[0] = y[0] + 1.0f;  // FAULT blocks_share_a_sum
}

extern "C" __global__ void barrier_not_reached(float* y) {
    if (threadIdx.x < 40) __syncthreads();  // FAULT barrier_not_reached
    y[threadIdx.x] = 1.0f;
}

extern "C" __global__ void divergent_barriers(float* y) {
    if (threadIdx.x % 2)
        __syncthreads();  // FAULT divergent_barriers
    else
        __syncthreads();
    y[threadIdx.x] = 1.0f;
}

extern "C" __global__ void lane_missing_in_shuffle(float* y) {
    float x = (float)threadIdx.x;
    if (threadIdx.x != 5) x = __shfl_xor_sync(0xffffffffu, x, 1);  // FAULT lane_missing_in_shuffle
    y[threadIdx.x] = x;
}

extern "C" __global__ void lane_outside_its_mask(float* y) {
    y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, (float)threadIdx.x, 1);  // FAULT lane_outside_its_mask
}

extern "C" __global__ void shuffle_from_absent_lane(float* y) {
    if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, (float)threadIdx.x, 16);  // FAULT shuffle_from_absent_lane
}

extern "C" __global__ void copy_not_waited_for(const float* x, float* y) {
    __shared__ __align__(16) float tile[128];
    cp_async_16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x);
    cp_async_commit();
    y[threadIdx.x] = tile[4 * threadIdx.x];  // FAULT copy_not_waited_for
}

extern "C" __global__ void copy_waited_for_by_another(const float* x, float* y) {
    __shared__ __align__(16) float tile[128];
    cp_async_16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x);
    cp_async_commit();
    cp_async_wait<0>();
    y[threadIdx.x] = tile[4 * (threadIdx.x ^ 1)];  // FAULT copy_waited_for_by_another
}

extern "C" __global__ void one_group_too_few(const float* x, float* y) {
    __shared__ __align__(16) float tile[256];
    for (int half = 0; half < 2; half++) {
        cp_async_16(tile + 128 * half + 4 * threadIdx.x, x + 4 * threadIdx.x);
        cp_async_commit();
    }
    cp_async_wait<1>();
    __syncthreads();
    y[threadIdx.x] = tile[128 + threadIdx.x];  // FAULT one_group_too_few
}

extern "C" __global__ void ldmatrix_of_a_bad_row(float* y) {
    __shared__ __align__(16) uint16_t tile[8 * 8 + 8];
    for (int i = threadIdx.x; i < 72; i += 32) tile[i] = 0;
    __syncthreads();
    uint32_t r[2];
    ldmatrix_x2(r, tile + 4 * (threadIdx.x % 16));  // FAULT ldmatrix_of_a_bad_row
    y[threadIdx.x] = (float)r[0];
}
