// Vector clocks: for each thread, the latest seen tick of every other. They decide if barriers
// order two accesses.
//
// Every thread has a tick. A barrier joins the clocks of its threads, including their ticks, and
// increments the ticks. An access by thread w at tick k is in the past of thread t if t's clock
// holds k or more for w (Mattern 1988; Flanagan and Freund 2009 keep, as memory.cpp does, only the
// last accesses to each place).
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "internal.h"

namespace emulator {

constexpr int MAX_AGENTS = 128;
static int num_agents;

Clock::Data* Clock::allocate() {
    void* memory = malloc(sizeof(Data) + sizeof(Tick) * machine.num_clocks);
    Data* data = static_cast<Data*>(memory);
    data->references = 1;
    return data;
}

void Clock::release(Data* data) {
    if (data && --data->references == 0) free(data);
}

Clock::Clock(const Clock& other) : data_(other.data_) {
    if (data_) data_->references++;
}

Clock& Clock::operator=(Clock other) {
    std::swap(data_, other.data_);
    return *this;
}

Clock::~Clock() { release(data_); }

// Make the data this object's alone, so that they can be changed.
void Clock::own() {
    if (data_ && data_->references == 1) return;
    Data* fresh = allocate();
    if (data_)
        memcpy(fresh->tick, data_->tick, sizeof(Tick) * machine.num_clocks);
    else
        memset(fresh->tick, 0, sizeof(Tick) * machine.num_clocks);
    release(data_);
    data_ = fresh;
}

void Clock::join(const Clock& other) {
    if (!other.data_ || data_ == other.data_) return;
    if (!data_) {
        *this = other;
        return;
    }
    own();
    for (int i = 0; i < machine.num_clocks; i++)
        data_->tick[i] = std::max(data_->tick[i], other.data_->tick[i]);
}

void Clock::raise(int who, Tick tick) {
    if ((*this)[who] >= tick) return;
    own();
    data_->tick[who] = tick;
}

void release_thread_into(int thread, Clock& clock) {
    Fiber& fiber = machine.fibers[thread];
    clock.join(fiber.seen);
    clock.raise(thread, fiber.now);
    machine.latest = std::max(machine.latest, ++fiber.now);
}

void acquire_thread_from(int thread, const Clock& clock) {
    Fiber& fiber = machine.fibers[thread];
    // Threads that leave a barrier together mostly had equal clocks, so they share the result.
    static Clock before, with, result;
    if (!(before.same_as(fiber.seen) && with.same_as(clock))) {
        before = fiber.seen;
        with = clock;
        result = fiber.seen;
        result.join(clock);
    }
    fiber.seen = result;
}

void release_into(Clock& clock) { release_thread_into(machine.running, clock); }
void acquire_from(const Clock& clock) { acquire_thread_from(machine.running, clock); }

void fence_async_proxy() {
    Fiber& me = running_fiber();
    me.fenced = me.now++;
    machine.latest = std::max(machine.latest, me.now);
}

int new_agent() {
    if (num_agents == MAX_AGENTS)
        fail("too much for the emulator", nullptr, "a block uses more than %d mbarriers",
             MAX_AGENTS);
    return machine.num_threads + num_agents++;
}

Tick agent_tick(uint32_t count) {
    const Tick tick = machine.block_start + count;
    machine.latest = std::max(machine.latest, tick);
    return tick;
}

// Ticks increase from block to block, which distinguishes the accesses of earlier blocks from those
// of the current one.
void prepare_block_clocks() {
    machine.num_clocks = std::min(machine.num_threads + MAX_AGENTS, MAX_CLOCKS + MAX_AGENTS);
    machine.block_start = ++machine.latest;
    num_agents = 0;
    for (int t = 0; t < machine.num_threads; t++) {
        Fiber& fiber = machine.fibers[t];
        fiber.seen = Clock();
        fiber.now = machine.block_start;
        fiber.fenced = 0;
    }
    acquire_thread_from(0, Clock());  // forget the last launch's shared result
}

}  // namespace emulator
