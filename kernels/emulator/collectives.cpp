// Synchronization points: collectives of a warp or a warpgroup, and barriers of a block.
//
// Each participant passes the address of its operands, which are on its own stack. The last one to
// arrive computes the results of all.
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "internal.h"

namespace emulator {

typedef void (*Execute)(void** operands, unsigned mask, int warp);

// Lanes that wait for the rest of their mask.
struct Meeting {
    Execute execute;
    unsigned mask, arrived;
    void* operands[WARP_SIZE];
    Site sites[WARP_SIZE];
};
static std::vector<std::vector<Meeting>> meetings;  // by warp; several only if lanes have diverged

struct Group {
    int arrived;
    std::vector<void*> operands;
};
static std::map<std::pair<int, const char*>, Group> groups;  // by first thread and name

struct Waiter {
    int thread;
    Site site;
    int line;
    Votes* result;
};
struct Barrier {
    int threads = 0, arrived = 0, sum = 0;
    bool all = true, any = false;
    Clock seen;  // of arrivals without a wait
    std::vector<Waiter> waiters;
    Site first_site = nullptr;
};
static Barrier barriers[16];

void prepare_block_collectives() {
    meetings.assign(machine.num_warps, {});
    groups.clear();
    for (Barrier& barrier : barriers) barrier = Barrier();
}

// The lanes that a warp has: fewer than 32 in the last one of an odd block.
static unsigned existing_lanes(int warp) {
    const int lanes = machine.num_threads - warp * WARP_SIZE;
    return lanes >= WARP_SIZE ? ~0u : (1u << lanes) - 1;
}

static Meeting& join_meeting(int warp, Execute execute, unsigned mask) {
    for (Meeting& meeting : meetings[warp])
        if (meeting.execute == execute && meeting.mask == mask) return meeting;
    meetings[warp].push_back(Meeting{execute, mask, 0, {}, {}});
    return meetings[warp].back();
}

void warp_collective(const char* name, Site site, unsigned mask, void* operands, Execute execute,
                     bool aligned) {
    const int me = machine.running, warp = me / WARP_SIZE, lane = me % WARP_SIZE;
    if (!(mask >> lane & 1))
        fail("wrong mask", site, "lane %d calls %s with the mask 0x%08x, in which it is not", lane,
             name, mask);
    mask &= existing_lanes(warp);
    Meeting& meeting = join_meeting(warp, execute, mask);
    meeting.arrived |= 1u << lane;
    meeting.operands[lane] = operands;
    meeting.sites[lane] = site;
    if (meeting.arrived != mask) {
        char detail[96];
        snprintf(detail, sizeof detail, mask == ~0u ? "for its whole warp" : "for the lanes 0x%08x",
                 mask);
        suspend(name, site, detail);
        return;
    }
    Meeting complete = meeting;
    meetings[warp].erase(meetings[warp].begin() + (&meeting - meetings[warp].data()));
    execute(complete.operands, mask, warp);
    for (int l = 0; l < WARP_SIZE; l++) {
        if (!(mask >> l & 1)) continue;
        if (aligned && complete.sites[l] != site) note_divergence(complete.sites[l], site);
        if (l != lane) wake(warp * WARP_SIZE + l);
    }
}

void group_collective(const char* name, Site site, int first, int count, void* operands,
                      void (*execute)(void** operands, int first)) {
    Group& group = groups[{first, name}];
    if (group.operands.empty()) group = Group{0, std::vector<void*>(count)};
    group.operands[machine.running - first] = operands;
    if (++group.arrived < count) {
        char detail[96];
        snprintf(detail, sizeof detail, "for threads %d-%d", first, first + count - 1);
        suspend(name, site, detail);
        return;
    }
    const std::vector<void*> complete = std::move(group.operands);
    group = Group{0, {}};
    execute(const_cast<void**>(complete.data()), first);
    for (int t = first; t < first + count; t++)
        if (t != machine.running) wake(t);
}

// ---- barriers of a block

static void check_barrier(const Barrier& barrier, int id, int threads, Site site) {
    if (id < 0 || id > 15)
        fail("wrong barrier", site, "there are barriers 0 to 15, and this names %d", id);
    if (threads % WARP_SIZE && threads != machine.num_threads)
        fail("wrong barrier", site, "barrier %d is for %d threads, which is no multiple of 32", id,
             threads);
    if (barrier.arrived && barrier.threads != threads)
        fail("wrong barrier", site, "barrier %d is for %d threads here, and for %d at @%p@", id,
             threads, barrier.threads, barrier.first_site);
}

// Lanes of a warp must reach a barrier together, at one place.
static void check_together(const Waiter& one, const Waiter& other) {
    if (one.line != other.line)
        fail_for(other.thread, "divergent instruction", other.site,
                 "lanes of one warp meet in a barrier that the whole warp has to execute together, "
                 "some at line %d, some at line %d",
                 one.line, other.line);
    if (one.site != other.site) note_divergence(one.site, other.site);
}

static void complete_barrier(Barrier& barrier) {
    Clock joined = barrier.seen, last;
    for (const Waiter& waiter : barrier.waiters) {
        const Fiber& fiber = machine.fibers[waiter.thread];
        if (!last.same_as(fiber.seen)) joined.join(last = fiber.seen);
    }
    for (const Waiter& waiter : barrier.waiters)
        joined.raise(waiter.thread, machine.fibers[waiter.thread].now);
    std::vector<const Waiter*> first_of_warp(machine.num_warps);
    for (const Waiter& waiter : barrier.waiters) {
        Fiber& fiber = machine.fibers[waiter.thread];
        fiber.seen = joined;
        if (++fiber.now > machine.latest) machine.latest = fiber.now;
        *waiter.result = Votes{barrier.sum, barrier.all, barrier.any};
        if (waiter.thread != machine.running) wake(waiter.thread);
        const Waiter*& first = first_of_warp[waiter.thread / WARP_SIZE];
        if (first) check_together(*first, waiter);
        first = &waiter;
    }
    barrier = Barrier();
}

static void arrive(Barrier& barrier, int id, int threads, Site site, int value) {
    check_barrier(barrier, id, threads, site);
    if (!barrier.arrived) barrier.first_site = site;
    barrier.threads = threads;
    barrier.arrived++;
    barrier.sum += value != 0;
    barrier.all &= value != 0;
    barrier.any |= value != 0;
    for (const Waiter& waiter : barrier.waiters)
        if (waiter.thread == machine.running)
            fail("wrong barrier", site,
                 "the thread arrives twice at barrier %d before it completes", id);
}

Votes barrier_sync(int id, int threads, Site site, const char* name, int value, int line) {
    Barrier& barrier = barriers[id & 15];
    arrive(barrier, id, threads, site, value);
    Votes result{};
    barrier.waiters.push_back({machine.running, site, line, &result});
    if (barrier.arrived == threads) {
        complete_barrier(barrier);
        return result;
    }
    char detail[96] = "";
    if (id) snprintf(detail, sizeof detail, "barrier %d for %d threads", id, threads);
    suspend(name, site, detail);
    return result;
}

void barrier_arrive(int id, int threads, Site site) {
    Barrier& barrier = barriers[id & 15];
    arrive(barrier, id, threads, site, 0);
    release_into(barrier.seen);
    if (barrier.arrived == threads) complete_barrier(barrier);
}

}  // namespace emulator
