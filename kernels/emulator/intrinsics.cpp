// CUDA's own intrinsics: barriers, shuffles, votes and atomics.
#include <algorithm>
#include <cstring>
#include <map>

#include "cuda.h"
#include "internal.h"

namespace emulator {

Votes block_barrier(const char* name, int value, int line) {
    return barrier_sync(0, machine.num_threads, EMULATOR_SITE, name, value, line);
}

// ---- __syncwarp orders the memory accesses of its lanes

static void execute_sync_warp(void**, unsigned mask, int warp) {
    Clock joined, last;
    for (int lane = 0; lane < WARP_SIZE; lane++) {
        if (!(mask >> lane & 1)) continue;
        const Fiber& fiber = machine.fibers[warp * WARP_SIZE + lane];
        if (!last.same_as(fiber.seen)) joined.join(last = fiber.seen);
    }
    for (int lane = 0; lane < WARP_SIZE; lane++)
        if (mask >> lane & 1)
            joined.raise(warp * WARP_SIZE + lane, machine.fibers[warp * WARP_SIZE + lane].now);
    for (int lane = 0; lane < WARP_SIZE; lane++) {
        if (!(mask >> lane & 1)) continue;
        Fiber& fiber = machine.fibers[warp * WARP_SIZE + lane];
        fiber.seen = joined;
        machine.latest = std::max(machine.latest, ++fiber.now);
    }
}

void sync_warp(unsigned mask) {
    warp_collective("__syncwarp", EMULATOR_SITE, mask, nullptr, execute_sync_warp, false);
}

// ---- shuffles: no memory order, just values

struct Shuffle {
    void* value;
    int bytes, source;
    Site site;
};

static void execute_shuffle(void** operands, unsigned mask, int) {
    char values[WARP_SIZE][16];
    Shuffle* const* lanes = reinterpret_cast<Shuffle* const*>(operands);
    for (int lane = 0; lane < WARP_SIZE; lane++)
        if (mask >> lane & 1) memcpy(values[lane], lanes[lane]->value, lanes[lane]->bytes);
    for (int lane = 0; lane < WARP_SIZE; lane++) {
        if (!(mask >> lane & 1)) continue;
        const Shuffle& mine = *lanes[lane];
        if (!(mask >> mine.source & 1))
            fail("wrong mask", mine.site,
                 "lane %d shuffles from lane %d, which does not take part (mask 0x%08x)", lane,
                 mine.source, mask);
        memcpy(mine.value, values[mine.source], mine.bytes);
    }
}

static int source_lane(char how, int lane, int operand, int width) {
    const int first = lane / width * width;
    if (how == 'i') return first + (operand & (width - 1));
    const int wanted = how == 'x' ? lane ^ operand : how == 'd' ? lane + operand : lane - operand;
    const bool outside = how == 'u' ? wanted < first : wanted >= first + width;
    return outside ? lane : wanted;
}

void shuffle(unsigned mask, void* value, int bytes, char how, int operand, int width) {
    const char* name = how == 'i'   ? "__shfl_sync"
                       : how == 'x' ? "__shfl_xor_sync"
                       : how == 'd' ? "__shfl_down_sync"
                                    : "__shfl_up_sync";
    Shuffle mine{value, bytes, source_lane(how, machine.running % WARP_SIZE, operand, width),
                 EMULATOR_SITE};
    warp_collective(name, mine.site, mask, &mine, execute_shuffle, false);
}

// ---- votes

struct Vote {
    bool predicate;
    unsigned result;
};

static void execute_vote(void** operands, unsigned mask, int) {
    Vote* const* lanes = reinterpret_cast<Vote* const*>(operands);
    unsigned result = 0;
    for (int lane = 0; lane < WARP_SIZE; lane++)
        if (mask >> lane & 1 && lanes[lane]->predicate) result |= 1u << lane;
    for (int lane = 0; lane < WARP_SIZE; lane++)
        if (mask >> lane & 1) lanes[lane]->result = result;
}

unsigned ballot(unsigned mask, bool predicate, const char* name) {
    Vote mine{predicate, 0};
    warp_collective(name, EMULATOR_SITE, mask, &mine, execute_vote, false);
    return mine.result;
}

// ---- atomics. They also order all accesses of their threads, which a GPU guarantees only with
// fences: a missing __threadfence is not detected.

static std::map<uintptr_t, Clock> atomic_clocks;
static void forget_atomics() {
    static uint64_t launch_number = 0;
    if (launch_number != machine.launch_number) atomic_clocks.clear();
    launch_number = machine.launch_number;
}
static Registration registration(nullptr, forget_atomics);

static uint64_t combined(char how, uint64_t old, uint64_t operand, uint64_t compare, int bytes,
                         bool is_signed) {
    const bool less = is_signed && bytes == 4
                          ? static_cast<int32_t>(old) < static_cast<int32_t>(operand)
                          : old < operand;
    switch (how) {
        case '+': return old + operand;
        case 'x': return operand;
        case 'c': return old == compare ? operand : old;
        case '<': return less ? old : operand;
        default: return less ? operand : old;
    }
}

uint64_t atomic(void* address, int bytes, char how, uint64_t operand, uint64_t compare,
                bool is_signed) {
    const Site site = EMULATOR_SITE;
    Clock& clock = atomic_clocks[reinterpret_cast<uintptr_t>(address)];
    acquire_from(clock);
    require_aligned(address, bytes, site);
    read(address, bytes, site);
    write(address, bytes, site);
    uint64_t old = 0;
    memcpy(&old, address, bytes);
    const uint64_t result = combined(how, old, operand, compare, bytes, is_signed);
    memcpy(address, &result, bytes);
    release_into(clock);
    return old;
}

void thread_fence() {}

}  // namespace emulator
