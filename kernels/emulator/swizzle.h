// How tiles lie in shared memory, for TMA and wgmma alike.
#pragma once
#include "runtime.h"

namespace emulator {

inline char* shared_start() { return static_cast<char*>(dynamic_shared()); }

// Where the byte at an offset of shared memory lies in a swizzled tile: 16-byte chunks are exchanged by the bits of the offset itself.
inline size_t exchanged(size_t offset, int swizzle_bytes) {
    const size_t mask = swizzle_bytes ? swizzle_bytes / 16 - 1 : 0;
    return offset ^ ((offset >> 7 & mask) << 4);
}

}  // namespace emulator
