// Hopper's copy engine and its barriers. A tile lands at a random time after its request and counts
// as unwritten until then, so a kernel that lacks a wait gets a report.
//
// Copies access memory as a virtual thread (an agent), at a tick of its clock. A thread that has
// waited for them as the PTX manual requires has seen that tick; others must not access the same
// memory.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

#include "hopper.h"
#include "internal.h"
#include "swizzle.h"

using namespace emulator;

// ---- mbarrier

namespace {

struct Barrier {
    int count = 0;           // arrivals of a phase
    int missing = 0;         // missing arrivals
    int64_t bytes = 0;       // missing bytes
    uint32_t phase = 0;
    Clock gathered, done;    // clocks of the arrivals in this phase and the last one
    int agent = 0;           // agent that writes its tiles
    uint32_t landed = 0;     // number of tiles written
    int made_by = 0;
    bool fenced = false;
    std::vector<int> waiters;
};
std::map<const void*, Barrier> barriers;

Barrier& barrier_at(uint64_t* address, Site site) {
    require_shared(address, 8, site, "an mbarrier");
    const auto found = barriers.find(address);
    if (found == barriers.end())
        fail("no mbarrier", site, "there is no mbarrier at this place: it was never initialised");
    read(address, 8, site);
    return found->second;
}

void wake_waiters(Barrier& barrier) {
    for (int waiter : barrier.waiters) wake(waiter);
    barrier.waiters.clear();
}

void complete_if_nothing_is_missing(Barrier& barrier) {
    if (barrier.missing == 0 && barrier.bytes == 0) {
        barrier.phase++;
        barrier.missing = barrier.count;
        barrier.done = barrier.gathered;
        barrier.gathered = Clock();
    }
    wake_waiters(barrier);  // including those of an unfinished phase, whose wait text has changed
}

void arrive(Barrier& barrier, int bytes, Site site) {
    if (barrier.missing == 0)
        fail("wrong mbarrier", site,
             "more than the %d arrivals that the mbarrier was made for, in phase %u", barrier.count,
             barrier.phase);
    barrier.missing--;
    barrier.bytes += bytes;
    release_into(barrier.gathered);
    complete_if_nothing_is_missing(barrier);
}

}  // namespace

void mbarrier_init(uint64_t* address, int count) {
    const Site site = EMULATOR_SITE;
    require_shared(address, 8, site, "an mbarrier");
    require_aligned(address, 8, site);
    write(address, 8, site);
    if (count < 1) fail("wrong mbarrier", site, "an mbarrier for %d arrivals", count);
    Barrier& barrier = barriers[address];
    barrier = Barrier();
    barrier.count = barrier.missing = count;
    barrier.agent = new_agent();
    barrier.made_by = thread();
}

void mbarrier_expect(uint64_t* address, int bytes) {
    arrive(barrier_at(address, EMULATOR_SITE), bytes, EMULATOR_SITE);
}
void mbarrier_arrive(uint64_t* address) {
    arrive(barrier_at(address, EMULATOR_SITE), 0, EMULATOR_SITE);
}

void mbarrier_wait(uint64_t* address, int parity) {
    const Site site = EMULATOR_SITE;
    if (parity != 0 && parity != 1) fail("wrong mbarrier", site, "a wait for parity %d", parity);
    Barrier& barrier = barrier_at(address, site);
    while (static_cast<int>(barrier.phase % 2) == parity) {
        barrier.waiters.push_back(thread());
        char detail[96];
        snprintf(detail, sizeof detail, "phase %u at offset %td lacks %d arrivals and %lld bytes",
                 barrier.phase, reinterpret_cast<char*>(address) - shared_start(), barrier.missing,
                 static_cast<long long>(barrier.bytes));
        suspend("mbarrier_wait", site, detail);
    }
    acquire_from(barrier.done);
}

void fence_barrier_init() {
    for (auto& [address, barrier] : barriers) barrier.fenced |= barrier.made_by == thread();
}

// ---- TMA

namespace {

// Contents of a TensorMap (tensor_map.py), 128 bytes. Dims and coordinates: the contiguous one
// first.
struct Map {
    uint32_t magic;
    uint8_t rank, element_bytes;
    uint16_t swizzle_bytes;
    uint64_t address;
    uint64_t strides[4];  // in bytes, of dims 1 ..
    uint32_t sizes[5];
    uint16_t box[5];
    uint16_t is_float32;
};
static_assert(sizeof(Map) <= 128, "a TensorMap has 128 bytes");
constexpr uint32_t MAP_MAGIC = 0x50414d54;

struct Copy {
    enum Kind { load, store } kind;
    Map map;
    char* shared;
    uint64_t* barrier;  // of a load
    int coordinates[5];
    Async by;
    int group;          // of a store: number of earlier groups of its thread
};
std::vector<Copy> copies;  // under way

// The stores of one thread.
struct Stores {
    int agent = 0;
    uint32_t landed = 0;
    int groups = 0;           // committed
    std::map<int, Tick> last; // when the last store of a group landed
};
std::map<int, Stores> stores_of;

size_t box_bytes(const Map& map) {
    size_t bytes = map.element_bytes;
    for (int i = 0; i < map.rank; i++) bytes *= map.box[i];
    return bytes;
}

// Copy one row of a box, at `position` [dims 1 ..]; elements outside the array are zero in the tile
// and are not written.
void copy_row(const Copy& copy, const int* position, size_t tile_offset, int agent, Tick tick) {
    const Map& map = copy.map;
    bool inside = true;
    int64_t offset = 0;
    for (int i = 1; i < map.rank; i++) {
        inside &= position[i] >= 0 && position[i] < static_cast<int64_t>(map.sizes[i]);
        offset += position[i] * static_cast<int64_t>(map.strides[i - 1]);
    }
    constexpr int CHUNK = 16;
    const int row_bytes = map.box[0] * map.element_bytes;
    const int64_t size = int64_t(map.sizes[0]) * map.element_bytes,
                  first = int64_t(position[0]) * map.element_bytes;
    for (int c = 0; c < row_bytes; c += CHUNK) {
        char* tile = shared_start() +
                     exchanged(copy.shared - shared_start() + tile_offset + c, map.swizzle_bytes);
        char* global = reinterpret_cast<char*>(map.address + offset + first + c);
        const int64_t from = std::max<int64_t>(0, -(first + c)),
                      to = std::min<int64_t>(CHUNK, size - first - c);
        const bool any = inside && from < to;
        if (copy.kind == Copy::load) async_access(copy.by, tile, CHUNK, true, agent, tick, "TMA");
        if (any && copy.kind != Copy::load)
            async_access(copy.by, tile + from, to - from, false, agent, tick, "TMA");
        if (any)
            async_access(copy.by, global + from, to - from, copy.kind != Copy::load, agent, tick,
                         "TMA");
        if (copy.kind == Copy::load) {
            memset(tile, 0, CHUNK);
            if (any) memcpy(tile + from, global + from, to - from);
        } else if (any) {
            memcpy(global + from, tile + from, to - from);
        }
    }
}

void copy_box(const Copy& copy, int agent, Tick tick) {
    const Map& map = copy.map;
    const size_t row_bytes = size_t(map.box[0]) * map.element_bytes,
                 rows = box_bytes(map) / row_bytes;
    for (size_t row = 0; row < rows; row++) {
        int position[5] = {copy.coordinates[0]};
        size_t rest = row;
        for (int i = 1; i < map.rank; i++) {
            position[i] = copy.coordinates[i] + static_cast<int>(rest % map.box[i]);
            rest /= map.box[i];
        }
        copy_row(copy, position, row * row_bytes, agent, tick);
    }
}

void land(size_t index) {
    const Copy copy = copies[index];
    copies.erase(copies.begin() + index);
    if (copy.kind == Copy::load) {
        Barrier& barrier = barriers[copy.barrier];
        const Tick tick = agent_tick(++barrier.landed);
        mark_landed(copy.shared, box_bytes(copy.map));
        copy_box(copy, barrier.agent, tick);
        barrier.gathered.raise(barrier.agent, tick);
        barrier.bytes -= box_bytes(copy.map);
        complete_if_nothing_is_missing(barrier);
    } else {
        Stores& stores = stores_of[copy.by.thread];
        const Tick tick = agent_tick(++stores.landed);
        copy_box(copy, stores.agent, tick);
        stores.last[copy.group] = tick;
    }
}

void start_copy(Copy::Kind kind, const void* shared, const TensorMap* tensor_map, uint64_t* barrier,
                int rank, const int* coordinates, Site site) {
    Copy copy{};
    copy.kind = kind;
    memcpy(&copy.map, tensor_map, sizeof copy.map);
    if (copy.map.magic != MAP_MAGIC)
        fail("no tensor map", site, "the map of this copy was not made by tensor_map()");
    if (copy.map.rank != rank)
        fail("wrong tensor map", site, "a copy in %d dims by a map of %d dims", rank,
             copy.map.rank);
    copy.shared = static_cast<char*>(const_cast<void*>(shared));
    require_shared(shared, box_bytes(copy.map), site, "the tile of a TMA copy");
    require_aligned(shared, 128, site);
    copy.barrier = barrier;
    memcpy(copy.coordinates, coordinates, rank * sizeof(int));
    if (kind == Copy::load) {
        const Barrier& counts = barrier_at(barrier, site);
        if (!counts.fenced)
            fail("missing fence", site,
                 "the copy engine may not know this mbarrier: no fence_barrier_init() after "
                 "mbarrier_init");
        mark_in_flight(copy.shared, box_bytes(copy.map), site);
    } else {
        const auto [stores, fresh] = stores_of.try_emplace(thread());
        if (fresh) stores->second.agent = new_agent();
        copy.group = stores->second.groups;
    }
    copy.by = begin_async(site);
    copies.push_back(copy);
}

bool poll(bool idle) {
    if (copies.empty() || (!idle && random_below(4))) return false;
    land(random_below(copies.size()));
    return true;
}

}  // namespace

void tma_load_2d(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1) {
    const int c[] = {c0, c1};
    start_copy(Copy::load, shared, map, barrier, 2, c, EMULATOR_SITE);
}
void tma_load_3d(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
    const int c[] = {c0, c1, c2};
    start_copy(Copy::load, shared, map, barrier, 3, c, EMULATOR_SITE);
}
void tma_load_4d(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2,
                 int c3) {
    const int c[] = {c0, c1, c2, c3};
    start_copy(Copy::load, shared, map, barrier, 4, c, EMULATOR_SITE);
}
void tma_store_4d(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3) {
    const int c[] = {c0, c1, c2, c3};
    start_copy(Copy::store, shared, map, nullptr, 4, c, EMULATOR_SITE);
}

void tma_commit() {
    const auto stores = stores_of.find(thread());
    if (stores != stores_of.end()) stores->second.groups++;
}

// Both kinds of wait are equal here: a store reads its tile and writes memory at once.
void emulator::wait_for_stores(int pending) {
    const auto found = stores_of.find(thread());
    if (found == stores_of.end()) return;
    Stores& stores = found->second;
    const int end = stores.groups - pending;  // of the groups waited for
    for (size_t i = 0; i < copies.size();) {
        if (copies[i].kind != Copy::load && copies[i].by.thread == thread() &&
            copies[i].group < end)
            land(i);
        else
            i++;
    }
    Clock clock;
    for (const auto& [group, tick] : stores.last)
        if (group < end) clock.raise(stores.agent, tick);
    acquire_from(clock);
}

// ---- named barriers

void named_barrier_sync(int id, int threads) {
    barrier_sync(id, threads, EMULATOR_SITE, "named_barrier_sync");
}
void named_barrier_arrive(int id, int threads) { barrier_arrive(id, threads, EMULATOR_SITE); }

// ---- from block to block

namespace {

void reset() {
    barriers.clear();
    copies.clear();
    stores_of.clear();
}

// All threads have returned: nothing may be under way in the memory that the next block gets.
void check_at_end() {
    for (const Copy& copy : copies) {
        const char* what = copy.kind == Copy::load ? "load" : "store";
        fail_for(copy.by.thread, "not waited for", copy.by.site,
                 "a TMA %s was still under way when the block ended", what);
    }
    for (const auto& [address, barrier] : barriers)
        if (barrier.bytes)
            fail_for(barrier.made_by, "wrong byte count", nullptr,
                     "the mbarrier at offset %td ends with %lld bytes announced that did not come",
                     static_cast<const char*>(address) - shared_start(),
                     static_cast<long long>(barrier.bytes));
}

Registration registration{poll, reset, check_at_end};

}  // namespace
