// Instructions of compute capability 8.0 and up: copies that need no register (cp.async), loads of
// tensor-core fragments (ldmatrix), and the tensor cores themselves (mma.sync).
//
// Fragments, for lane l of a warp, as the PTX manual draws them ("Matrix Fragments for
// mma.m16n8k16", "ldmatrix"):
//   A [16 x 16]  a[0]: row l/4,     columns 2(l%4), +1      a[1]: the same of row l/4 + 8
//                a[2]: row l/4,     columns 2(l%4) + 8, +9  a[3]: the same of row l/4 + 8
//   B [16 x 8]   b[0]: rows 2(l%4), +1 of column l/4        b[1]: rows 2(l%4) + 8, +9 of column l/4
//   D [16 x 8]   d[0], d[1]: row l/4, columns 2(l%4), +1    d[2], d[3]: the same of row l/4 + 8
// So D, packed to 16 bits, is half of an A: attention feeds its scores into the next product
// without leaving registers.
#pragma once
#include "cuda.cuh"

#ifndef MINILLM_EMULATOR

// Return the 32-bit address within the block's shared memory, the operand of instructions.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Start copying 16 bytes from global to shared memory (both 16-byte aligned). With `bytes` < 16,
// only those are read and the rest becomes zero, which fills rows beyond the end of an array. `.cg`
// bypasses L1, since the data are not read again. The copy is visible to its own thread after
// cp_async_wait, to the others after a later barrier.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
}

// Commit this thread's copies since the last commit as a group, which may be empty.
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most the N latest groups are in flight.
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Load 8 x 8 matrices of 16-bit elements: lanes 8i .. 8i+7 point at the eight 16-byte rows of
// matrix i; lane l gets columns 2(l%4), +1 of row l/4 of matrix i in r[i]. The whole warp takes
// part, including lanes that name no row (x2: 16 to 31).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// ldmatrix with each matrix transposed: lane l gets rows 2(l%4), +1 of column l/4. A tile stored
// with rows of k thus serves as B [k x n].
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// Compute d += a b by the whole warp: 16 x 8 += (16 x 16) (16 x 8), 16-bit elements T, float sums.
// 4096 flops for one instruction.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_16x8x16<bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16x8x16<float16>(float (&d)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
