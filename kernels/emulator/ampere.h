// Emulated ampere.cuh: ampere.cpp defines each instruction.
#pragma once
#include <cstdint>

#include "cuda.h"

namespace emulator {
void cp_async(void* shared, const void* global, int bytes);
void cp_async_commit();
void cp_async_wait(int still_under_way);
void ldmatrix(uint32_t* to, const void* row, int count, bool transpose);
void mma(float* d, const uint32_t* a, const uint32_t* b, bool is_bfloat16);
template <typename T> struct TypeOf;
}  // namespace emulator

template <> struct emulator::TypeOf<bfloat16> { static constexpr bool is_bfloat16 = true; };
template <> struct emulator::TypeOf<float16> { static constexpr bool is_bfloat16 = false; };

EMULATED uint32_t shared_address(const void* pointer) { return emulator::shared_address(pointer); }
EMULATED void cp_async_16(void* shared, const void* global, int bytes = 16) {
    emulator::cp_async(shared, global, bytes);
}
EMULATED void cp_async_commit() { emulator::cp_async_commit(); }
template <int N> EMULATED void cp_async_wait() { emulator::cp_async_wait(N); }
EMULATED void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
    emulator::ldmatrix(r, shared_row, 4, false);
}
EMULATED void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row) {
    emulator::ldmatrix(r, shared_row, 2, false);
}
EMULATED void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
    emulator::ldmatrix(r, shared_row, 4, true);
}
EMULATED void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row) {
    emulator::ldmatrix(r, shared_row, 2, true);
}
template <typename T>
EMULATED void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulator::mma(d, a, b, emulator::TypeOf<T>::is_bfloat16);
}
