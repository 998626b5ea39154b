// Layout of tiles in shared memory, for TMA and wgmma.
#pragma once
#include "runtime.h"

namespace emulator {

inline char* shared_start() { return static_cast<char*>(dynamic_shared()); }

// Return the offset of a byte in a swizzled tile: bits of the offset exchange its 16-byte chunks.
inline size_t exchanged(size_t offset, int swizzle_bytes) {
    const size_t mask = swizzle_bytes ? swizzle_bytes / 16 - 1 : 0;
    return offset ^ ((offset >> 7 & mask) << 4);
}

}  // namespace emulator
