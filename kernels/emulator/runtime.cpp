// Threads as fibers: one stack each, switched by hand, all in one thread of the process. Blocks run one after another.
//
// A thread runs until it has to wait for others (or is made to yield). Which one goes on then is the order's choice: each order is a legal
// schedule of the GPU's, and a kernel that lacks a barrier gives other results under some of them.
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "internal.h"

namespace emulator {

Machine machine;

// ---- switching

constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t GUARD_BYTES = 64 << 10;

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
// Save the callee-saved registers and the stack pointer, take over another stack, and return there.
extern "C" void emulator_switch(void** save, void* load);
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
static void* new_stack_pointer(char* top, void (*entry)()) {
    void** sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;  // where entry() would return to; also aligns the stack as a call does
    *--sp = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    return sp;
}
#elif defined(__aarch64__) && !defined(EMULATOR_UCONTEXT)
extern "C" void emulator_switch(void** save, void* load);
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
static void* new_stack_pointer(char* top, void (*entry)()) {
    void** sp = reinterpret_cast<void**>(top) - 20;
    std::memset(sp, 0, 160);
    sp[11] = reinterpret_cast<void*>(entry);  // x30, the address that `ret` goes to
    return sp;
}
#else
// Anywhere else: the C library's contexts, slower since each switch is a system call. The stack pointer points to a context instead.
static void emulator_switch(void** save, void* load) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, static_cast<ucontext_t*>(load));
}
static void* new_stack_pointer(char* top, void (*entry)()) {
    ucontext_t* context = reinterpret_cast<ucontext_t*>(top - (sizeof(ucontext_t) + 63) / 64 * 64);
    getcontext(context);
    context->uc_stack.ss_sp = top - STACK_BYTES;
    context->uc_stack.ss_size = reinterpret_cast<char*>(context) - (top - STACK_BYTES);
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}
#endif

// Stacks with a guard below each, where a thread that recurses without end stops. Returns whether there is memory for them.
static bool allocate_stacks(Launch& launch, int count) {
    const size_t each = STACK_BYTES + GUARD_BYTES;
    if (count > launch.num_stacks) {
        if (launch.num_stacks) munmap(launch.stacks, launch.num_stacks * each);
        launch.num_stacks = 0;
        void* memory = mmap(nullptr, count * each, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return false;
        launch.stacks = static_cast<char*>(memory);
        launch.num_stacks = count;
        for (int i = 0; i < count; i++) mprotect(launch.stacks + i * each, GUARD_BYTES, PROT_NONE);
    }
    machine.stacks_begin = launch.stacks;
    machine.stacks_end = launch.stacks + launch.num_stacks * each;
    for (int i = 0; i < count; i++) machine.fibers[i].stack = launch.stacks + i * each + GUARD_BYTES;
    return true;
}

static void to_scheduler() {
    Fiber& me = running_fiber();
    emulator_switch(&me.stack_pointer, machine.scheduler_stack);
}

static void fiber_main() {
    machine.launch->kernel(machine.launch->args);
    Fiber& me = running_fiber();
    me.state = State::done;
    machine.left--;
    to_scheduler();
    __builtin_unreachable();
}

static void set_ready(int thread, bool ready) {
    uint32_t& word = machine.ready[thread / WARP_SIZE];
    const uint32_t bit = 1u << thread % WARP_SIZE;
    word = ready ? word | bit : word & ~bit;
}

// ---- the running thread

Index thread_index() { return running_fiber().index; }
Index block_index() { return machine.block_index; }
Index block_size() { return machine.launch->block; }
Index grid_size() { return machine.launch->grid; }
int thread() { return machine.running; }
int num_threads() { return machine.num_threads; }
void* dynamic_shared() { return machine.shared; }
size_t dynamic_shared_bytes() { return machine.launch->shared_bytes; }

unsigned random_below(unsigned n) {
    uint64_t& x = machine.random_state;  // xorshift64*
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    return static_cast<unsigned>((x * 0x2545f4914f6cdd1dull >> 32) * n >> 32);
}

void yield() { to_scheduler(); }

void suspend(const char* what, Site site, const char* detail) {
    Fiber& me = running_fiber();
    me.state = State::waiting;
    me.what = what;
    me.site = site;
    snprintf(me.detail, sizeof me.detail, "%s", detail);
    set_ready(machine.running, false);
    to_scheduler();
}

void wake(int thread) {
    Fiber& fiber = machine.fibers[thread];
    if (fiber.state != State::waiting) return;
    fiber.state = State::ready;
    set_ready(thread, true);
}

// ---- reports

std::string describe_thread(int thread) {
    char text[64];
    const Index i = machine.fibers[thread].index;
    if (machine.launch->block.y == 1 && machine.launch->block.z == 1)
        snprintf(text, sizeof text, "thread %u", i.x);
    else
        snprintf(text, sizeof text, "thread (%u, %u, %u)", i.x, i.y, i.z);
    return text;
}

void stop_with_report(int thread, const char* kind, Site site, const char* format, va_list args) {
    Report& report = *machine.report;
    snprintf(report.kind, sizeof report.kind, "%s", kind);
    vsnprintf(report.text, sizeof report.text, format, args);
    report.site = reinterpret_cast<uint64_t>(site);
    const Index b = machine.block_index, t = thread >= 0 ? machine.fibers[thread].index : Index{};
    report.block[0] = b.x, report.block[1] = b.y, report.block[2] = b.z;
    report.thread[0] = t.x, report.thread[1] = t.y, report.thread[2] = t.z;
    machine.failed = true;
    if (machine.running < 0) throw Stopped{};
    to_scheduler();  // which runs nobody any more
    __builtin_unreachable();
}

void fail(const char* kind, Site site, const char* format, ...) {
    va_list args;
    va_start(args, format);
    stop_with_report(machine.running, kind, site, format, args);
}

void fail_for(int thread, const char* kind, Site site, const char* format, ...) {
    va_list args;
    va_start(args, format);
    stop_with_report(thread, kind, site, format, args);
}

void note_divergence(Site one, Site other) {
    Report& report = *machine.report;
    const uint64_t pair[2] = {reinterpret_cast<uint64_t>(one), reinterpret_cast<uint64_t>(other)};
    for (uint64_t i = 0; i < report.num_divergent; i++)
        if (!memcmp(report.divergent[i], pair, sizeof pair)) return;
    if (report.num_divergent < 16) memcpy(report.divergent[report.num_divergent++], pair, sizeof pair);
}

// "threads 0-31, 64 wait" of those for which `chosen` holds.
template <typename Chosen> static std::string thread_ranges(Chosen chosen, const char* one_does, const char* several_do) {
    std::string text;
    int count = 0;
    for (int t = 0; t < machine.num_threads; t++) {
        if (!chosen(t)) continue;
        int last = t;
        while (last + 1 < machine.num_threads && chosen(last + 1)) last++;
        text += (text.empty() ? "" : ", ") + std::to_string(t) + (last > t ? "-" + std::to_string(last) : "");
        count += last - t + 1;
        t = last;
    }
    return (count == 1 ? "thread " : "threads ") + text + " " + (count == 1 ? one_does : several_do);
}

// Do two threads wait for the same at the same place?
static bool wait_alike(const Fiber& one, const Fiber& other) {
    return other.state == State::waiting && other.what == one.what && other.site == one.site && !strcmp(other.detail, one.detail);
}

// Nobody can go on: say who waits where.
static void report_deadlock() {
    std::string text = "No thread can go on.\n";
    std::vector<bool> told(machine.num_threads);
    const Fiber* first = &machine.fibers[0];
    for (int t = machine.num_threads - 1; t >= 0; t--)
        if (machine.fibers[t].state == State::waiting) first = &machine.fibers[t];
    for (int t = 0; t < machine.num_threads; t++) {
        const Fiber& fiber = machine.fibers[t];
        if (fiber.state != State::waiting || told[t]) continue;
        auto alike = [&](int u) { return wait_alike(fiber, machine.fibers[u]); };
        char place[64];
        snprintf(place, sizeof place, " at @%p@", fiber.site);
        text += "  " + thread_ranges(alike, "waits", "wait") + " in " + fiber.what + place;
        text += (fiber.detail[0] ? std::string(": ") + fiber.detail : "") + "\n";
        for (int u = t; u < machine.num_threads; u++) told[u] = told[u] || alike(u);
    }
    auto returned = [](int t) { return machine.fibers[t].state == State::done; };
    if (machine.left < machine.num_threads) text += "  " + thread_ranges(returned, "has", "have") + " returned from the kernel\n";
    Report& report = *machine.report;
    snprintf(report.kind, sizeof report.kind, "deadlock");
    snprintf(report.text, sizeof report.text, "%s", text.c_str());
    report.site = reinterpret_cast<uint64_t>(first->site);
    const Index b = machine.block_index;
    report.block[0] = b.x, report.block[1] = b.y, report.block[2] = b.z;
    report.thread[0] = first->index.x, report.thread[1] = first->index.y, report.thread[2] = first->index.z;
    machine.failed = true;
}

// ---- scheduling

static std::vector<bool (*)(bool)>& polls() {
    static std::vector<bool (*)(bool)> all;
    return all;
}
static std::vector<void (*)()>& resets() {
    static std::vector<void (*)()> all;
    return all;
}
static std::vector<void (*)()>& finishes() {
    static std::vector<void (*)()> all;
    return all;
}
void add_poll(bool (*poll)(bool idle)) { polls().push_back(poll); }
void add_reset(void (*reset)()) { resets().push_back(reset); }
void add_finish(void (*finish)()) { finishes().push_back(finish); }
Registration::Registration(bool (*poll)(bool idle), void (*reset)(), void (*finish)()) {
    if (poll) add_poll(poll);
    if (reset) add_reset(reset);
    if (finish) add_finish(finish);
}

static int lowest(uint32_t lanes) { return __builtin_ctz(lanes); }
static int highest(uint32_t lanes) { return 31 - __builtin_clz(lanes); }

// The next warp from `warp` on, in steps of `step`, of which a lane can run; -1 if there is none.
static int next_ready_warp(int warp, int step) {
    for (int i = 0, w = warp; i < machine.num_warps; i++, w = (w + step + machine.num_warps) % machine.num_warps)
        if (machine.ready[w]) return w;
    return -1;
}

static int next_round_robin(int last) {
    const int warp = last / WARP_SIZE, lane = last % WARP_SIZE;
    const uint32_t later = lane == 31 ? 0 : machine.ready[warp] & ~0u << (lane + 1);
    if (later) return warp * WARP_SIZE + lowest(later);
    const int w = next_ready_warp((warp + 1) % machine.num_warps, 1);
    return w < 0 ? -1 : w * WARP_SIZE + lowest(machine.ready[w]);
}

static int next_reversed(int last) {
    const int warp = last / WARP_SIZE, lane = last % WARP_SIZE;
    const uint32_t earlier = machine.ready[warp] & ((1u << lane) - 1);
    if (earlier) return warp * WARP_SIZE + highest(earlier);
    const int w = next_ready_warp((warp + machine.num_warps - 1) % machine.num_warps, -1);
    return w < 0 ? -1 : w * WARP_SIZE + highest(machine.ready[w]);
}

static int next_greedy(int last) {
    const int warp = next_ready_warp(last / WARP_SIZE, 1);
    return warp < 0 ? -1 : warp * WARP_SIZE + lowest(machine.ready[warp]);
}

static int next_random() {
    const int warp = next_ready_warp(random_below(machine.num_warps), 1);
    if (warp < 0) return -1;
    uint32_t lanes = machine.ready[warp];
    for (unsigned skip = random_below(__builtin_popcount(lanes)); skip; skip--) lanes &= lanes - 1;
    return warp * WARP_SIZE + lowest(lanes);
}

static int next_thread(int last) {
    switch (static_cast<Order>(machine.launch->order)) {
        case Order::round_robin: return next_round_robin(last);
        case Order::greedy_warp: return next_greedy(last);
        case Order::reversed: return next_reversed(last);
        case Order::random: return next_random();
    }
    return -1;
}

static bool poll_all(bool idle) {
    bool any = false;
    for (auto poll : polls()) any |= poll(idle);
    return any;
}

static void start_block(uint32_t number) {
    const Index grid = machine.launch->grid, block = machine.launch->block;
    machine.block_number = number;
    machine.block_index = {number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
    machine.left = machine.num_threads;
    for (int t = 0; t < machine.num_threads; t++) {
        Fiber& fiber = machine.fibers[t];
        fiber.state = State::ready;
        fiber.index = {t % block.x, t / block.x % block.y, t / (block.x * block.y)};
        fiber.stack_pointer = new_stack_pointer(fiber.stack + STACK_BYTES, fiber_main);
        set_ready(t, true);
    }
    prepare_block_clocks();
    prepare_block_memory();
    prepare_block_collectives();
    for (auto reset : resets()) reset();
}

static void run_threads() {
    const bool forwards = machine.launch->order == static_cast<int>(Order::round_robin);
    int last = forwards ? machine.num_threads - 1 : 0;  // so that the first to run is thread 0, or the last where order is reversed
    constexpr int SWITCHES_PER_POLL = 16;
    for (uint64_t count = 1; machine.left > 0 && !machine.failed; count++) {
        if (count % SWITCHES_PER_POLL == 0) poll_all(false);
        const int next = next_thread(last);
        if (machine.failed) return;
        if (next < 0) {
            if (!poll_all(true) && !machine.failed) report_deadlock();
            continue;
        }
        machine.running = last = next;
        machine.report->switches++;
        emulator_switch(&machine.scheduler_stack, machine.fibers[next].stack_pointer);
        if (machine.fibers[next].state == State::done) set_ready(next, false);
        machine.running = -1;
    }
}

static void run_block() {
    try {
        run_threads();
        if (!machine.failed)
            for (auto finish : finishes()) finish();
    } catch (const Stopped&) {  // a report from no thread, which is in machine.report
    }
}

static std::vector<uint32_t> block_order() {
    const Index grid = machine.launch->grid;
    std::vector<uint32_t> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0);
    if (machine.launch->order == static_cast<int>(Order::reversed)) std::reverse(order.begin(), order.end());
    if (machine.launch->order == static_cast<int>(Order::random))
        for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_below(i)]);
    return order;
}

static bool prepare(Launch& launch, Report& report) {
    machine.launch = &launch;
    machine.launch_number++;
    machine.report = &report;
    report.kind[0] = report.text[0] = 0;
    report.switches = report.num_divergent = 0;
    machine.num_threads = launch.block.x * launch.block.y * launch.block.z;
    machine.num_warps = (machine.num_threads + WARP_SIZE - 1) / WARP_SIZE;
    machine.fibers.resize(machine.num_threads);
    machine.ready.assign(machine.num_warps, 0);
    machine.random_state = launch.seed * 0x9e3779b97f4a7c15ull + 0x1234567;
    machine.failed = false;
    machine.running = -1;
    machine.log.clear();
    machine.watched.clear();
    machine.trace.clear();
    machine.trace_lacks_data = false;
    prepare_memory(launch);
    if (allocate_stacks(launch, machine.num_threads)) return true;
    snprintf(report.kind, sizeof report.kind, "no memory");
    snprintf(report.text, sizeof report.text, "for the stacks of %d threads", machine.num_threads);
    return false;
}

extern "C" __attribute__((visibility("default"))) int emulator_launch(Launch* launch, Report* report) {
    if (!prepare(*launch, *report)) return 1;
    for (uint32_t number : block_order()) {
        if (launch->only_block >= 0 && number != launch->only_block) continue;
        start_block(number);
        run_block();
        if (machine.failed) break;
    }
    finish_memory();
    report->num_accesses = machine.log.size();
    report->accesses = machine.log.data();
    report->watched_bytes = machine.watched.size();
    report->watched = machine.watched.data();
    report->num_traced = machine.trace.size();
    report->trace = machine.trace.data();
    report->dynamic_shared = reinterpret_cast<uint64_t>(machine.shared);
    return machine.failed;
}

// ---- watching

void watch(const char* name, char type, int element_bytes, const void* data, size_t count, const int* shape) {
    const Site site = EMULATOR_SITE;
    if (machine.launch->watch_thread != machine.running || machine.launch->watch_block != machine.block_number) return;
    Watched header{};
    header.site = reinterpret_cast<uint64_t>(site);
    header.count = count;
    snprintf(header.name, sizeof header.name, "%s", name);
    header.type[0] = type;
    header.element_bytes = element_bytes;
    memcpy(header.shape, shape, sizeof header.shape);
    std::vector<char>& log = machine.watched;
    const char* bytes = reinterpret_cast<const char*>(&header);
    log.insert(log.end(), bytes, bytes + sizeof header);
    log.insert(log.end(), static_cast<const char*>(data), static_cast<const char*>(data) + count * element_bytes);
    log.resize((log.size() + 7) / 8 * 8);
}

}  // namespace emulator
