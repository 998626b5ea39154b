// Calls that the compiler inserts into a kernel: by -fsanitize=thread before every access to
// memory, by -fsanitize=bounds for an index out of an array of known size. They replace the
// sanitizers' own libraries.
#include <cstring>

#include "internal.h"

using namespace emulator;

#define SANITIZER_CALLS(SIZE)                                                               \
    extern "C" void __tsan_read##SIZE(void* p) {                                            \
        if (reinterpret_cast<uintptr_t>(p) % SIZE) require_aligned(p, SIZE, EMULATOR_SITE); \
        access_of_kernel(p, SIZE, false, EMULATOR_SITE);                                    \
    }                                                                                       \
    extern "C" void __tsan_write##SIZE(void* p) {                                           \
        if (reinterpret_cast<uintptr_t>(p) % SIZE) require_aligned(p, SIZE, EMULATOR_SITE); \
        access_of_kernel(p, SIZE, true, EMULATOR_SITE);                                     \
    }                                                                                       \
    extern "C" void __tsan_unaligned_read##SIZE(void* p) {                                  \
        access_of_kernel(p, SIZE, false, EMULATOR_SITE);                                    \
    }                                                                                       \
    extern "C" void __tsan_unaligned_write##SIZE(void* p) {                                 \
        access_of_kernel(p, SIZE, true, EMULATOR_SITE);                                     \
    }
SANITIZER_CALLS(1)
SANITIZER_CALLS(2)
SANITIZER_CALLS(4)
SANITIZER_CALLS(8)
SANITIZER_CALLS(16)

extern "C" void __tsan_read_range(void* p, size_t bytes) {
    access_of_kernel(p, bytes, false, EMULATOR_SITE);
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
    access_of_kernel(p, bytes, true, EMULATOR_SITE);
}
extern "C" void __tsan_volatile_read4(void* p) { access_of_kernel(p, 4, false, EMULATOR_SITE); }
extern "C" void __tsan_volatile_write4(void* p) { access_of_kernel(p, 4, true, EMULATOR_SITE); }
// clang calls these for copies of whole structs.
extern "C" void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
    access_of_kernel(const_cast<void*>(from), bytes, false, EMULATOR_SITE);
    access_of_kernel(to, bytes, true, EMULATOR_SITE);
    return memcpy(to, from, bytes);
}
extern "C" void* __tsan_memmove(void* to, const void* from, size_t bytes) {
    access_of_kernel(const_cast<void*>(from), bytes, false, EMULATOR_SITE);
    access_of_kernel(to, bytes, true, EMULATOR_SITE);
    return memmove(to, from, bytes);
}
extern "C" void* __tsan_memset(void* to, int value, size_t bytes) {
    access_of_kernel(to, bytes, true, EMULATOR_SITE);
    return memset(to, value, bytes);
}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}

// -fsanitize=bounds, for arrays of known size: shared ones and those in registers.
struct SourcePlace {
    const char* file;
    uint32_t line, column;
};
struct TypeName {
    uint16_t kind, info;
    char name[1];
};
struct OutOfBounds {
    SourcePlace where;
    const TypeName *array, *index;
};
extern "C" void __ubsan_handle_out_of_bounds(OutOfBounds* what, uintptr_t index) {
    fail("out of bounds", EMULATOR_SITE, "index %ld of an array of type %s",
         static_cast<long>(index), what->array->name);
}
extern "C" void __ubsan_handle_out_of_bounds_abort(OutOfBounds* what, uintptr_t index) {
    __ubsan_handle_out_of_bounds(what, index);
}
