// Every function of the device headers in a kernel of its own, for test_emulator.py to compare with NumPy.
#include "../../../kernels/gpu/include/ampere.cuh"

extern "C" __global__ void reductions(const float* x, float* sums, float* maxima, float* block_results) {
    __shared__ float partial[32];
    const float mine = x[threadIdx.x];
    sums[threadIdx.x] = warp_sum(mine);
    maxima[threadIdx.x] = warp_max(mine);
    const float total = block_sum(mine, partial);
    const float largest = block_max(mine, partial);
    block_results[2 * threadIdx.x] = total;
    block_results[2 * threadIdx.x + 1] = largest;
}

extern "C" __global__ void shuffles(const int* x, int* y) {
    const int t = threadIdx.x, mine = x[t];
    y[0 * 32 + t] = __shfl_sync(0xffffffffu, mine, 7 * t);
    y[1 * 32 + t] = __shfl_xor_sync(0xffffffffu, mine, 5);
    y[2 * 32 + t] = __shfl_down_sync(0xffffffffu, mine, 3);
    y[3 * 32 + t] = __shfl_up_sync(0xffffffffu, mine, 3);
    y[4 * 32 + t] = __shfl_down_sync(0xffffffffu, mine, 3, 8);
    y[5 * 32 + t] = __shfl_sync(0xffffffffu, mine, 2, 8);
}

extern "C" __global__ void votes(const int* x, unsigned* y) {
    const int t = threadIdx.x, mine = x[t];
    y[0 * 64 + t] = __ballot_sync(0xffffffffu, mine > 0);
    y[1 * 64 + t] = __any_sync(0xffffffffu, mine > 0);
    y[2 * 64 + t] = __all_sync(0xffffffffu, mine > 0);
    y[3 * 64 + t] = __syncthreads_or(mine > 0);
    y[4 * 64 + t] = __syncthreads_and(mine > 0);
    y[5 * 64 + t] = __syncthreads_count(mine > 0);
}

extern "C" __global__ void atomics(int* counters, unsigned* places) {
    places[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd((unsigned*)counters, 1u);
    atomicAdd(counters + 1, -(int)threadIdx.x);
    atomicMax(counters + 2, (int)threadIdx.x - 10);
    if (atomicCAS(counters + 3, 0, 7) == 0) counters[4] = (int)(blockIdx.x * blockDim.x + threadIdx.x);
}

extern "C" __global__ void conversions(const float* x, uint16_t* bf, uint16_t* half, float* back, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const bfloat16 b = from_float<bfloat16>(x[i]);
        const float16 h = from_float<float16>(x[i]);
        bf[i] = *reinterpret_cast<const uint16_t*>(&b);
        half[i] = *reinterpret_cast<const uint16_t*>(&h);
        back[2 * i] = to_float(b);
        back[2 * i + 1] = to_float(h);
    }
}

extern "C" __global__ void packs(const Element* x, Element* y, uint32_t* pairs, float* unpacked) {
    Pack16<Element> pack = load16(x + threadIdx.x * (16 / sizeof(Element)));
    store16(y + threadIdx.x * (16 / sizeof(Element)), pack);
    const uint32_t both = pack2<bfloat16>(to_float(pack.v[0]), to_float(pack.v[1]));
    pairs[threadIdx.x] = both;
    unpacked[2 * threadIdx.x] = unpack2<bfloat16>(both).x;
    unpacked[2 * threadIdx.x + 1] = unpack2<bfloat16>(both).y;
}

// Copies of 16, 8 and 0 bytes in turn, as a tile with rows beyond the end of its array is filled.
extern "C" __global__ void copies(const float* x, float* y) {
    float* tile = dynamic_shared<float>();
    cp_async_16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x, threadIdx.x % 3 == 0 ? 16 : threadIdx.x % 3 == 1 ? 8 : 0);
    cp_async_commit();
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    for (int i = 0; i < 4; i++) y[4 * threadIdx.x + i] = tile[4 * threadIdx.x + i];
}

// A [16 x 16] and B [16 x 8] by ldmatrix from rows of 16-bit elements; d = a b.
template <typename T> __device__ void multiply(const T* a, const T* b_by_columns, const T* b_by_rows, float* d) {
    T* tile = dynamic_shared<T>();  // A, then B with columns as rows [8 x 16], then B itself [16 x 8]
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) tile[i] = a[i];
    for (int i = lane; i < 128; i += 32) tile[256 + i] = b_by_columns[i];
    for (int i = lane; i < 128; i += 32) tile[384 + i] = b_by_rows[i];
    __syncwarp();
    uint32_t a_fragment[4], b_fragment[2], b_transposed[2];
    ldmatrix_x4(a_fragment, tile + (lane % 16) * 16 + (lane / 16) * 8);
    ldmatrix_x2(b_fragment, tile + 256 + (lane % 8) * 16 + (lane / 8 % 2) * 8);
    ldmatrix_x2_trans(b_transposed, tile + 384 + (lane % 16) * 8);
    float first[4] = {0.0f, 0.0f, 0.0f, 0.0f}, second[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    mma_16x8x16<T>(first, a_fragment, b_fragment);
    mma_16x8x16<T>(second, a_fragment, b_transposed);
    for (int e = 0; e < 4; e++) {
        const int at = (lane / 4 + 8 * (e / 2)) * 8 + lane % 4 * 2 + e % 2;
        d[at] = first[e];
        d[128 + at] = second[e];
    }
}
extern "C" __global__ void multiply_bfloat16(const bfloat16* a, const bfloat16* b_by_columns, const bfloat16* b_by_rows, float* d) {
    multiply(a, b_by_columns, b_by_rows, d);
}
extern "C" __global__ void multiply_float16(const float16* a, const float16* b_by_columns, const float16* b_by_rows, float* d) {
    multiply(a, b_by_columns, b_by_rows, d);
}

// Four 8 x 8 matrices, transposed and as they are.
extern "C" __global__ void matrices(const uint16_t* x, uint16_t* plain, uint16_t* transposed) {
    uint16_t* tile = dynamic_shared<uint16_t>();
    for (int i = threadIdx.x; i < 256; i += 32) tile[i] = x[i];
    __syncwarp();
    uint32_t r[4], t[4];
    ldmatrix_x4(r, tile + 8 * threadIdx.x);
    ldmatrix_x4_trans(t, tile + 8 * threadIdx.x);
    for (int m = 0; m < 4; m++) {
        for (int half = 0; half < 2; half++) {
            plain[64 * m + 2 * threadIdx.x + half] = (uint16_t)(r[m] >> (16 * half));
            transposed[64 * m + 2 * threadIdx.x + half] = (uint16_t)(t[m] >> (16 * half));
        }
    }
}

__device__ __forceinline__ float total(const Pack16<float>& four) { return four.v[0] + four.v[1] + four.v[2] + four.v[3]; }

// Accesses of known cost: in passes over the banks, and in sectors of global memory.
extern "C" __global__ void access_patterns(const float* x, float* y) {
    __shared__ __align__(16) float tile[32 * 33];
    const int t = threadIdx.x;
    for (int i = t; i < 32 * 33; i += 32) tile[i] = 0.0f;
    __syncwarp();
    float sum = tile[t];                 // PATTERN 1 of 1
    sum += tile[2 * t];                  // PATTERN 2 of 1
    sum += tile[32 * t];                 // PATTERN 32 of 1
    sum += tile[33 * t];                 // PATTERN 1 of 1
    sum += tile[5];                      // PATTERN 1 of 1
    sum += total(load16(tile + 4 * t));  // PATTERN 4 of 4
    sum += total(load16(tile + 32 * t)); // PATTERN 32 of 4
    sum += x[t];                         // PATTERN 4 of 4
    sum += x[8 * t];                     // PATTERN 32 of 4
    sum += x[0];                         // PATTERN 1 of 1
    sum += total(load16(x + 4 * t));     // PATTERN 16 of 16
    y[t] = sum;                          // PATTERN 4 of 4
}
