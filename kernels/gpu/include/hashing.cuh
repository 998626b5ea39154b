// Random bits that are addressed, not drawn: those of kernels/random/hashing.py.
#pragma once
#include "cuda.cuh"

__device__ __forceinline__ uint64_t finalise(uint64_t z) {  // splitmix64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

__device__ __forceinline__ uint64_t random_bits(uint64_t key, uint64_t index) {
    const uint64_t golden = 0x9E3779B97F4A7C15ull;
    return finalise(finalise(index * golden + key) + golden);
}

// Return true if dropout keeps the element with a 64-bit row word and a 32-bit column word.
__device__ __forceinline__ bool keeps(uint64_t row, uint32_t column, uint32_t threshold) {
    uint32_t z = (uint32_t(row) ^ column) * 0x7FEB352Du;
    z = ((z ^ (z >> 15)) + uint32_t(row >> 32)) * 0x846CA68Bu;
    return z >= threshold;
}
