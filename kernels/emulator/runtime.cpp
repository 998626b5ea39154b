// Execution of a launch: blocks in sequence, the threads of a block as fibers, all in one thread of
// the process.
//
// A thread runs until it waits for others (or is preempted). The order chooses the next one: each
// order is a legal schedule of the GPU, and a kernel that lacks a barrier gives different results
// under some of them.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "internal.h"

namespace emulator {

Machine machine;

void to_scheduler() {
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
    for (int i = 0, w = warp; i < machine.num_warps;
         i++, w = (w + step + machine.num_warps) % machine.num_warps)
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
    // The first to run is thread 0, or the last if reversed.
    int last = forwards ? machine.num_threads - 1 : 0;
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
    if (machine.launch->order == static_cast<int>(Order::reversed))
        std::reverse(order.begin(), order.end());
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

extern "C" __attribute__((visibility("default"))) int emulator_launch(Launch* launch,
                                                                      Report* report) {
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

void watch(const char* name, char type, int element_bytes, const void* data, size_t count,
           const int* shape) {
    const Site site = EMULATOR_SITE;
    if (machine.launch->watch_thread != machine.running ||
        machine.launch->watch_block != machine.block_number)
        return;
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
    log.insert(log.end(), static_cast<const char*>(data),
               static_cast<const char*>(data) + count * element_bytes);
    log.resize((log.size() + 7) / 8 * 8);
}

}  // namespace emulator
