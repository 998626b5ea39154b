// Fibers: a stack for each thread, with a guard below it, and the switch between them, in assembly
// for known processors.
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstring>

#include "internal.h"

namespace emulator {

constexpr size_t GUARD_BYTES = 64 << 10;

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
// Save the callee-saved registers and the stack pointer, take over another stack, and return there.
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");
void* new_stack_pointer(char* top, void (*entry)()) {
    void** sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;  // where entry() would return to; also aligns the stack as a call does
    *--sp = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    return sp;
}
#elif defined(__aarch64__) && !defined(EMULATOR_UCONTEXT)
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, %function
emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulator_switch, .-emulator_switch
)");
void* new_stack_pointer(char* top, void (*entry)()) {
    void** sp = reinterpret_cast<void**>(top) - 20;
    std::memset(sp, 0, 160);
    sp[11] = reinterpret_cast<void*>(entry);  // x30, the address that `ret` goes to
    return sp;
}
#else
// Other processors: the C library's contexts, slower since each switch is a system call. The stack
// pointer points to a context instead.
extern "C" void emulator_switch(void** save, void* load) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, static_cast<ucontext_t*>(load));
}
void* new_stack_pointer(char* top, void (*entry)()) {
    ucontext_t* context = reinterpret_cast<ucontext_t*>(top - (sizeof(ucontext_t) + 63) / 64 * 64);
    getcontext(context);
    context->uc_stack.ss_sp = top - STACK_BYTES;
    context->uc_stack.ss_size = reinterpret_cast<char*>(context) - (top - STACK_BYTES);
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}
#endif

// Allocate stacks with a guard page below each, which stops endless recursion. Returns false if
// there is no memory for them.
bool allocate_stacks(Launch& launch, int count) {
    const size_t each = STACK_BYTES + GUARD_BYTES;
    if (count > launch.num_stacks) {
        if (launch.num_stacks) munmap(launch.stacks, launch.num_stacks * each);
        launch.num_stacks = 0;
        void* memory = mmap(nullptr, count * each, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return false;
        launch.stacks = static_cast<char*>(memory);
        launch.num_stacks = count;
        for (int i = 0; i < count; i++) mprotect(launch.stacks + i * each, GUARD_BYTES, PROT_NONE);
    }
    machine.stacks_begin = launch.stacks;
    machine.stacks_end = launch.stacks + launch.num_stacks * each;
    for (int i = 0; i < count; i++)
        machine.fibers[i].stack = launch.stacks + i * each + GUARD_BYTES;
    return true;
}

}  // namespace emulator
