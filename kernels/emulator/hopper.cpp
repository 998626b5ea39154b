// Hopper's asynchronous machinery, as late as it may be: a tile copied by TMA lands at some random later moment, and a wgmma runs when its
// warpgroup waits for it. Until then tiles count as unwritten and accumulators hold NaN, so a kernel that lacks a wait computes nonsense or
// gets a report.
//
// Copies and products read and write for a virtual thread of their own (an agent), at a tick of its clock; whoever has waited for them in
// the way the PTX manual asks for has seen that tick, and only he may touch the same memory.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

#include "hopper.h"
#include "internal.h"

using namespace emulator;

// ---- mbarrier

namespace {

struct Barrier {
    int count = 0;           // arrivals that a phase needs,
    int missing = 0;         // and those that this one still lacks
    int64_t bytes = 0;       // that it still lacks
    uint32_t phase = 0;
    Clock gathered, done;    // what those knew who came in this phase, and in the last one
    int agent = 0;           // who writes the tiles that it counts,
    uint32_t landed = 0;     // and how many it has written
    int made_by = 0;
    bool fenced = false;
    std::vector<int> waiters;
};
std::map<const void*, Barrier> barriers;

Barrier& barrier_at(uint64_t* address, Site site) {
    require_shared(address, 8, site, "an mbarrier");
    const auto found = barriers.find(address);
    if (found == barriers.end()) fail("no mbarrier", site, "there is no mbarrier at this place: it was never initialised");
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
    wake_waiters(barrier);  // those of an unfinished phase, too: what they wait for has changed
}

void arrive(Barrier& barrier, int bytes, Site site) {
    if (barrier.missing == 0) fail("wrong mbarrier", site, "more than the %d arrivals that the mbarrier was made for, in phase %u", barrier.count, barrier.phase);
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

void mbarrier_expect(uint64_t* address, int bytes) { arrive(barrier_at(address, EMULATOR_SITE), bytes, EMULATOR_SITE); }
void mbarrier_arrive(uint64_t* address) { arrive(barrier_at(address, EMULATOR_SITE), 0, EMULATOR_SITE); }

void mbarrier_wait(uint64_t* address, int parity) {
    const Site site = EMULATOR_SITE;
    if (parity != 0 && parity != 1) fail("wrong mbarrier", site, "a wait for parity %d", parity);
    Barrier& barrier = barrier_at(address, site);
    while (static_cast<int>(barrier.phase % 2) == parity) {
        barrier.waiters.push_back(thread());
        char detail[96];
        snprintf(detail, sizeof detail, "phase %u at offset %td lacks %d arrivals and %lld bytes", barrier.phase,
                 reinterpret_cast<char*>(address) - static_cast<char*>(dynamic_shared()), barrier.missing, static_cast<long long>(barrier.bytes));
        suspend("mbarrier_wait", site, detail);
    }
    acquire_from(barrier.done);
}

void fence_barrier_init() {
    for (auto& [address, barrier] : barriers) barrier.fenced |= barrier.made_by == thread();
}

// ---- TMA

namespace {

// What tensor_map.py packs into the 128 bytes of a TensorMap. Dims and coordinates: the contiguous one first.
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
    enum Kind { load, store, add } kind;
    Map map;
    char* shared;
    uint64_t* barrier;  // of a load
    int coordinates[5];
    Async by;
    int group;          // of a store: how many groups its thread had committed before
};
std::vector<Copy> copies;  // under way

// The stores of one thread.
struct Stores {
    int agent;
    uint32_t landed;
    int groups;
};
std::map<int, Stores> stores_of;

size_t box_bytes(const Map& map) {
    size_t bytes = map.element_bytes;
    for (int i = 0; i < map.rank; i++) bytes *= map.box[i];
    return bytes;
}

// Where the byte at a place of a tile lies: TMA and wgmma exchange 16-byte chunks by the bits of the shared-memory address itself.
size_t exchanged(size_t offset, int swizzle_bytes) {
    const size_t mask = swizzle_bytes ? swizzle_bytes / 16 - 1 : 0;
    return offset ^ ((offset >> 7 & mask) << 4);
}

char* shared_start() { return static_cast<char*>(dynamic_shared()); }

// Copy one row of a box, at `position` [dims 1 ..]; what lies outside the array is zero in the tile and is not written.
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
    const int64_t size = int64_t(map.sizes[0]) * map.element_bytes, first = int64_t(position[0]) * map.element_bytes;
    for (int c = 0; c < row_bytes; c += CHUNK) {
        char* tile = shared_start() + exchanged(copy.shared - shared_start() + tile_offset + c, map.swizzle_bytes);
        char* global = reinterpret_cast<char*>(map.address + offset + first + c);
        const int64_t from = std::max<int64_t>(0, -(first + c)), to = std::min<int64_t>(CHUNK, size - first - c);
        const bool any = inside && from < to;
        if (copy.kind == Copy::load) async_access(copy.by, tile, CHUNK, true, agent, tick, "TMA");
        if (any && copy.kind != Copy::load) async_access(copy.by, tile + from, to - from, false, agent, tick, "TMA");
        if (any) async_access(copy.by, global + from, to - from, copy.kind != Copy::load, agent, tick, "TMA");
        if (copy.kind == Copy::load) {
            memset(tile, 0, CHUNK);
            if (any) memcpy(tile + from, global + from, to - from);
        } else if (any && copy.kind == Copy::store) {
            memcpy(global + from, tile + from, to - from);
        } else if (any) {
            for (int64_t i = from; i < to; i += sizeof(float)) {
                float sum, more;
                memcpy(&sum, global + i, sizeof sum), memcpy(&more, tile + i, sizeof more);
                sum += more;
                memcpy(global + i, &sum, sizeof sum);
            }
        }
    }
}

void copy_box(const Copy& copy, int agent, Tick tick) {
    const Map& map = copy.map;
    const size_t row_bytes = size_t(map.box[0]) * map.element_bytes, rows = box_bytes(map) / row_bytes;
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
        copy_box(copy, stores.agent, agent_tick(++stores.landed));
    }
}

void start_copy(Copy::Kind kind, const void* shared, const TensorMap* tensor_map, uint64_t* barrier, int rank, const int* coordinates, Site site) {
    Copy copy{};
    copy.kind = kind;
    memcpy(&copy.map, tensor_map, sizeof copy.map);
    if (copy.map.magic != MAP_MAGIC) fail("no tensor map", site, "the map of this copy was not made by tensor_map()");
    if (copy.map.rank != rank) fail("wrong tensor map", site, "a copy in %d dims by a map of %d dims", rank, copy.map.rank);
    copy.shared = static_cast<char*>(const_cast<void*>(shared));
    require_shared(shared, box_bytes(copy.map), site, "the tile of a TMA copy");
    require_aligned(shared, 128, site);
    copy.barrier = barrier;
    memcpy(copy.coordinates, coordinates, rank * sizeof(int));
    if (kind == Copy::load) {
        const Barrier& counts = barrier_at(barrier, site);
        if (!counts.fenced) fail("missing fence", site, "the copy engine may not know this mbarrier: no fence_barrier_init() after mbarrier_init");
        mark_in_flight(copy.shared, box_bytes(copy.map), site);
    } else {
        const auto [stores, fresh] = stores_of.try_emplace(thread(), Stores{0, 0, 0});
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
void tma_load_4d(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
    const int c[] = {c0, c1, c2, c3};
    start_copy(Copy::load, shared, map, barrier, 4, c, EMULATOR_SITE);
}
void tma_load_5d(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3, int c4) {
    const int c[] = {c0, c1, c2, c3, c4};
    start_copy(Copy::load, shared, map, barrier, 5, c, EMULATOR_SITE);
}
void tma_store_4d(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3) {
    const int c[] = {c0, c1, c2, c3};
    start_copy(Copy::store, shared, map, nullptr, 4, c, EMULATOR_SITE);
}
void tma_reduce_add_4d(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3) {
    const int c[] = {c0, c1, c2, c3};
    start_copy(Copy::add, shared, map, nullptr, 4, c, EMULATOR_SITE);
}

void tma_commit() {
    const auto stores = stores_of.find(thread());
    if (stores != stores_of.end()) stores->second.groups++;
}

// Both kinds of wait: a store that has read its tile has been written here, too.
void emulator::wait_for_stores(int pending) {
    const auto found = stores_of.find(thread());
    if (found == stores_of.end()) return;
    Stores& stores = found->second;
    bool all = true;
    for (size_t i = 0; i < copies.size();) {
        const bool mine = copies[i].kind != Copy::load && copies[i].by.thread == thread();
        if (mine && copies[i].group < stores.groups - pending)
            land(i);
        else
            all &= !mine, i++;
    }
    if (all) {  // what landed early, though not waited for, is not told apart from the rest
        Clock clock;
        clock.raise(stores.agent, agent_tick(stores.landed));
        acquire_from(clock);
    }
}

// ---- named barriers and fences

void named_barrier_sync(int id, int threads) { barrier_sync(id, threads, EMULATOR_SITE, "named_barrier_sync"); }
void named_barrier_arrive(int id, int threads) { barrier_arrive(id, threads, EMULATOR_SITE); }

// ---- wgmma

namespace {

constexpr int DEPTH = 16;  // of a product of 16-bit elements
constexpr uint32_t POISON = 0x7fbadbad;  // a NaN

struct Started : Product {
    uint32_t a_when_started[4];
    int group;
    Site site;
    Async by;
};
// An accumulator that products still write to.
struct InFlight {
    float* d;
    int n, products;
    std::vector<float> value;
};
struct Thread {
    std::vector<Started> started;
    std::vector<InFlight> in_flight;
    int groups = 0;        // committed
    bool fenced = false;   // since the last wait
};
std::vector<Thread> threads;

struct Warp {
    int agent = -1;
    uint32_t products = 0;
};
std::vector<Warp> warps;

// What the four warps of a warpgroup must issue alike.
struct Issued {
    int n;
    bool transpose_b, accumulate, from_registers;
    uint64_t a, b;
    bool operator==(const Issued& o) const {
        return n == o.n && transpose_b == o.transpose_b && accumulate == o.accumulate && from_registers == o.from_registers && a == o.a && b == o.b;
    }
};
std::vector<std::vector<Issued>> issued;  // by warpgroup

InFlight* in_flight(Thread& me, const float* d) {
    for (InFlight& one : me.in_flight)
        if (one.d == d) return &one;
    return nullptr;
}

float to_float(uint16_t bits, bool is_bfloat16) {
    if (is_bfloat16) {
        const uint32_t wide = uint32_t(bits) << 16;
        float x;
        memcpy(&x, &wide, sizeof x);
        return x;
    }
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24));
}

// A descriptor's fields, and where it says that a chunk of 8 elements lies ("Matrix Descriptor Format" and the canonical layouts of the
// PTX manual).
struct Descriptor {
    size_t start, leading, stride;
    int swizzle_bytes;

    explicit Descriptor(uint64_t bits)
        : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
        constexpr int BYTES[4] = {0, 128, 64, 32};
        swizzle_bytes = BYTES[bits >> 62];
    }
    // Elements k .. k + 7 of a row: the dim that is summed over is contiguous.
    size_t chunk_of_row(int row, int k) const {
        const size_t within = swizzle_bytes ? row % 8 * swizzle_bytes + k / 8 * 16 : row % 8 * 16 + k / 8 * leading;
        return exchanged(start + row / 8 * stride + within, swizzle_bytes);
    }
    // Elements n .. n + 7 at depth k: the other dim is contiguous.
    size_t chunk_of_depth(int k, int n) const {
        if (!swizzle_bytes) return start + n / 8 * stride + k / 8 * leading + k % 8 * 16;
        const int panel = swizzle_bytes / 2;
        return exchanged(start + n / panel * leading + k / 8 * stride + k % 8 * swizzle_bytes + n % panel * 2, swizzle_bytes);
    }
};

struct Execution {
    const Started& product;  // as lane 0 issued it
    int agent;
    Tick tick;

    void read_chunk(size_t offset, float (&out)[8]) const {
        if (offset + 16 > dynamic_shared_bytes())
            fail_for(product.by.thread, "out of bounds", product.site, "wgmma reads shared memory at offset %zu, of %zu bytes", offset, dynamic_shared_bytes());
        char* address = shared_start() + offset;
        async_access(product.by, address, 16, false, agent, tick, "wgmma");
        uint16_t bits[8];
        memcpy(bits, address, sizeof bits);
        for (int i = 0; i < 8; i++) out[i] = to_float(bits[i], product.is_bfloat16);
    }

    void read_left(int first_row, float (&a)[16][DEPTH]) const {
        const Descriptor descriptor(product.a);
        for (int r = 0; r < 16; r++)
            for (int k = 0; k < DEPTH; k += 8) {
                float chunk[8];
                read_chunk(descriptor.chunk_of_row(first_row + r, k), chunk);
                memcpy(&a[r][k], chunk, sizeof chunk);
            }
    }

    void read_right(std::vector<float>& b) const {  // [DEPTH][n]
        const Descriptor descriptor(product.b);
        float chunk[8];
        for (int k = 0; k < DEPTH; k += product.transpose_b ? 1 : 8)
            for (int n = 0; n < product.n; n += product.transpose_b ? 8 : 1) {
                read_chunk(product.transpose_b ? descriptor.chunk_of_depth(k, n) : descriptor.chunk_of_row(n, k), chunk);
                for (int i = 0; i < 8; i++) (product.transpose_b ? b[k * product.n + n + i] : b[(k + i) * product.n + n]) = chunk[i];
            }
    }
};

// The left factor of a warp from its lanes' registers: a lane holds two neighbouring columns of a row, and those 8 rows and columns on.
void gather_left(int warp, size_t index, float (&a)[16][DEPTH]) {
    for (int lane = 0; lane < WARP_SIZE; lane++) {
        const Started& product = threads[warp * WARP_SIZE + lane].started[index];
        if (memcmp(product.a_registers, product.a_when_started, sizeof product.a_when_started))
            fail_for(warp * WARP_SIZE + lane, "register race", product.site, "the left factor in registers was changed before warpgroup_wait");
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++)
                a[lane / 4 + i % 2 * 8][lane % 4 * 2 + half + i / 2 * 8] = to_float(product.a_when_started[i] >> 16 * half & 0xffff, product.is_bfloat16);
    }
}

void finish_accumulator(int thread, const Started& product) {
    Thread& me = threads[thread];
    InFlight* accumulator = in_flight(me, product.d);
    if (--accumulator->products) return;
    for (int i = 0; i < product.n / 2; i++) {
        uint32_t bits;
        memcpy(&bits, &product.d[i], sizeof bits);
        if (bits != POISON) fail_for(thread, "register race", product.site, "accumulator %d was written between wgmma and warpgroup_wait", i);
    }
    memcpy(product.d, accumulator->value.data(), accumulator->value.size() * sizeof(float));
    me.in_flight.erase(me.in_flight.begin() + (accumulator - me.in_flight.data()));
}

// Product number `index` of those a warp has under way.
void run_product(int warp, size_t index) {
    const int first = warp * WARP_SIZE;
    const Started& product = threads[first].started[index];
    Warp& state = warps[warp];
    const Issued mine{product.n, product.transpose_b, product.accumulate, product.a_registers != nullptr, product.a, product.b};
    for (int lane = 1; lane < WARP_SIZE; lane++) {
        const Started& other = threads[first + lane].started[index];
        if (!(mine == Issued{other.n, other.transpose_b, other.accumulate, other.a_registers != nullptr, other.a, other.b}))
            fail_for(first + lane, "diverged", other.site, "the lanes of a warp issue different products");
    }
    std::vector<Issued>& group = issued[warp / 4];
    if (state.products == group.size()) group.push_back(mine);
    if (!(mine == group[state.products]))
        fail_for(first, "diverged", product.site, "product %u of this warp is another than that of other warps of its warpgroup", state.products);

    const Execution execution{product, state.agent, agent_tick(++state.products)};
    float a[16][DEPTH];
    if (product.a_registers)
        gather_left(warp, index, a);
    else
        execution.read_left(warp % 4 * 16, a);
    std::vector<float> b(DEPTH * product.n);
    execution.read_right(b);
    std::vector<float> rows(16 * product.n);
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < DEPTH; k++)
            for (int n = 0; n < product.n; n++) rows[r * product.n + n] += a[r][k] * b[k * product.n + n];
    for (int lane = 0; lane < WARP_SIZE; lane++) {
        const Started& one = threads[first + lane].started[index];
        std::vector<float>& d = in_flight(threads[first + lane], one.d)->value;
        for (int i = 0; i < product.n / 2; i++) {
            const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            d[i] = (one.accumulate ? d[i] : 0) + rows[row * product.n + column];
        }
        finish_accumulator(first + lane, one);
    }
}

// All lanes of a warp wait: run what they wait for, the oldest first.
void run_products(void** operands, unsigned mask, int warp) {
    const int first = warp * WARP_SIZE, pending = *static_cast<int*>(operands[0]);
    if (mask != ~0u) fail("diverged", nullptr, "warpgroup_wait by a part of a warp");
    Warp& state = warps[warp];
    if (state.agent < 0) state.agent = new_agent();
    size_t count = 0;
    for (const Started& product : threads[first].started) count += product.group < threads[first].groups - pending;
    for (int lane = 1; lane < WARP_SIZE; lane++)
        if (threads[first + lane].started.size() != threads[first].started.size() || threads[first + lane].groups != threads[first].groups)
            fail_for(first + lane, "diverged", nullptr, "the lanes of a warp have issued different numbers of products");
    for (size_t i = 0; i < count; i++) run_product(warp, i);
    Clock clock;
    clock.raise(state.agent, agent_tick(state.products));
    for (int lane = 0; lane < WARP_SIZE; lane++) {
        Thread& thread = threads[first + lane];
        thread.started.erase(thread.started.begin(), thread.started.begin() + count);
        thread.fenced = false;
        acquire_thread_from(first + lane, clock);
    }
}

}  // namespace

uint64_t shared_descriptor(const void* shared, int leading_bytes, int stride_bytes, int swizzle) {
    const Site site = EMULATOR_SITE;
    require_shared(shared, 16, site, "a descriptor");
    require_aligned(shared, 16, site);
    const uint64_t offset = static_cast<const char*>(shared) - shared_start();
    return (offset & 0x3ffff) >> 4 | uint64_t(leading_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 | uint64_t(swizzle) << 62;
}

void warpgroup_fence() { threads[thread()].fenced = true; }
void warpgroup_commit() { threads[thread()].groups++; }

void emulator::start_product(const Product& product) {
    const Site site = EMULATOR_SITE;
    Thread& me = threads[thread()];
    InFlight* accumulator = in_flight(me, product.d);
    if (!me.fenced && (!accumulator || product.a_registers))
        fail("missing fence", site, "wgmma reads registers that may have been written since the last warpgroup_wait: no warpgroup_fence()");
    if (!accumulator) {
        me.in_flight.push_back({product.d, product.n, 0, std::vector<float>(product.d, product.d + product.n / 2)});
        accumulator = &me.in_flight.back();
        for (int i = 0; i < product.n / 2; i++) memcpy(&product.d[i], &POISON, sizeof POISON);
    }
    accumulator->products++;
    Started started{};
    static_cast<Product&>(started) = product;
    if (product.a_registers) memcpy(started.a_when_started, product.a_registers, sizeof started.a_when_started);
    started.group = me.groups;
    started.site = site;
    started.by = begin_async(site);
    me.started.push_back(started);
}

void emulator::wait_for_products(int pending) {
    warp_collective("warpgroup_wait", EMULATOR_SITE, ~0u, &pending, run_products);
}

// ---- from block to block

namespace {

void reset() {
    barriers.clear();
    copies.clear();
    stores_of.clear();
    threads.assign(num_threads(), {});
    warps.assign((num_threads() + WARP_SIZE - 1) / WARP_SIZE, {});
    issued.assign((warps.size() + 3) / 4, {});
}

// All threads have returned: nothing may be under way in the memory that the next block gets.
void check_at_end() {
    for (const Copy& copy : copies)
        fail_for(copy.by.thread, "not waited for", copy.by.site, "a TMA %s was still under way when the block ended", copy.kind == Copy::load ? "load" : "store");
    for (const auto& [address, barrier] : barriers)
        if (barrier.bytes)
            fail_for(barrier.made_by, "wrong byte count", nullptr, "the mbarrier at offset %td ends with %lld bytes that were announced and did not come",
                     static_cast<const char*>(address) - shared_start(), static_cast<long long>(barrier.bytes));
    for (int t = 0; t < num_threads(); t++)
        if (!threads[t].started.empty()) fail_for(t, "not waited for", threads[t].started[0].site, "a product was still under way when the thread returned");
}

Registration registration{poll, reset, check_at_end};

}  // namespace
