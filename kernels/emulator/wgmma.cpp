// Products of a warpgroup, as late as allowed: a wgmma runs when a warp waits for it. Until then
// its accumulators hold NaN and its tiles must not change, so a kernel that lacks a wait or a fence
// gets NaN or a report.
//
// A warp's part of a product reads tiles as a virtual thread (an agent), at a tick of its clock,
// which the warp's lanes have seen after their wait. A warp may thus release a tile for itself
// only.
#include <cstdio>
#include <cstring>
#include <vector>

#include "elements.h"
#include "hopper.h"
#include "internal.h"
#include "swizzle.h"

using namespace emulator;

namespace {

constexpr int DEPTH = 16;  // of a product of 16-bit elements
constexpr uint32_t POISON = 0x7fbadbad;  // a NaN

struct Started : Product {
    uint32_t a_when_started[4];
    int group;
    Site site;
    Async by;
};
// Accumulator of products in flight.
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

// Operands that the four warps of a warpgroup must agree on.
struct Issued {
    int n;
    bool transpose_b, accumulate, from_registers;
    uint64_t a, b;
    bool operator==(const Issued& o) const {
        const bool same_kind = n == o.n && transpose_b == o.transpose_b &&
                               accumulate == o.accumulate && from_registers == o.from_registers;
        return same_kind && a == o.a && b == o.b;
    }
};
std::vector<std::vector<Issued>> issued;  // by warpgroup

InFlight* in_flight(Thread& me, const float* d) {
    for (InFlight& one : me.in_flight)
        if (one.d == d) return &one;
    return nullptr;
}

float element(uint16_t bits, bool is_bfloat16) {
    return is_bfloat16 ? to_float(::bfloat16{bits}) : to_float(::float16{bits});
}

// Fields of a descriptor, and the offset of a chunk of 8 elements ("Matrix Descriptor Format" and
// the canonical layouts of the PTX manual).
struct Descriptor {
    size_t start, leading, stride;
    int swizzle_bytes;

    explicit Descriptor(uint64_t bits)
        : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4),
          stride((bits >> 32 & 0x3fff) << 4) {
        constexpr int BYTES[4] = {0, 128, 64, 32};
        swizzle_bytes = BYTES[bits >> 62];
    }
    // Elements k .. k + 7 of a row: the dim that is summed over is contiguous.
    size_t chunk_of_row(int row, int k) const {
        const size_t within =
            swizzle_bytes ? row % 8 * swizzle_bytes + k / 8 * 16 : row % 8 * 16 + k / 8 * leading;
        return exchanged(start + row / 8 * stride + within, swizzle_bytes);
    }
    // Elements n .. n + 7 at depth k: the other dim is contiguous.
    size_t chunk_of_depth(int k, int n) const {
        if (!swizzle_bytes) return start + n / 8 * stride + k / 8 * leading + k % 8 * 16;
        const int panel = swizzle_bytes / 2;
        return exchanged(
            start + n / panel * leading + k / 8 * stride + k % 8 * swizzle_bytes + n % panel * 2,
            swizzle_bytes);
    }
};

struct Execution {
    const Started& product;  // as lane 0 issued it
    int agent;
    Tick tick;

    void read_chunk(size_t offset, float (&out)[8]) const {
        if (offset + 16 > dynamic_shared_bytes())
            fail_for(product.by.thread, "out of bounds", product.site,
                     "wgmma reads byte %zu of %zu bytes of dynamic shared memory", offset,
                     dynamic_shared_bytes());
        char* address = shared_start() + offset;
        async_access(product.by, address, 16, false, agent, tick, "wgmma");
        uint16_t bits[8];
        memcpy(bits, address, sizeof bits);
        for (int i = 0; i < 8; i++) out[i] = element(bits[i], product.is_bfloat16);
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
                read_chunk(product.transpose_b ? descriptor.chunk_of_depth(k, n)
                                               : descriptor.chunk_of_row(n, k),
                           chunk);
                for (int i = 0; i < 8; i++)
                    (product.transpose_b ? b[k * product.n + n + i] : b[(k + i) * product.n + n]) =
                        chunk[i];
            }
    }
};

// Gather a warp's left factor from its lanes' registers: a lane holds two neighbouring columns of a
// row, and those 8 rows and columns on.
void gather_left(int warp, size_t index, float (&a)[16][DEPTH]) {
    for (int lane = 0; lane < WARP_SIZE; lane++) {
        const Started& product = threads[warp * WARP_SIZE + lane].started[index];
        if (memcmp(product.a_registers, product.a_when_started, sizeof product.a_when_started))
            fail_for(warp * WARP_SIZE + lane, "register race", product.site,
                     "the left factor was changed before warpgroup_wait");
        for (int i = 0; i < 4; i++)
            for (int half = 0; half < 2; half++)
                a[lane / 4 + i % 2 * 8][lane % 4 * 2 + half + i / 2 * 8] =
                    element(product.a_when_started[i] >> 16 * half & 0xffff, product.is_bfloat16);
    }
}

void finish_accumulator(int thread, const Started& product) {
    Thread& me = threads[thread];
    InFlight* accumulator = in_flight(me, product.d);
    if (--accumulator->products) return;
    for (int i = 0; i < product.n / 2; i++) {
        uint32_t bits;
        memcpy(&bits, &product.d[i], sizeof bits);
        if (bits == POISON) continue;
        fail_for(thread, "register race", product.site,
                 "accumulator %d was written between wgmma and warpgroup_wait", i);
    }
    memcpy(product.d, accumulator->value.data(), accumulator->value.size() * sizeof(float));
    me.in_flight.erase(me.in_flight.begin() + (accumulator - me.in_flight.data()));
}

// Run product number `index` of those that a warp has in flight.
void run_product(int warp, size_t index) {
    const int first = warp * WARP_SIZE;
    const Started& product = threads[first].started[index];
    Warp& state = warps[warp];
    const Issued mine{product.n,          product.transpose_b,
                      product.accumulate, product.a_registers != nullptr,
                      product.a,          product.b};
    for (int lane = 1; lane < WARP_SIZE; lane++) {
        const Started& other = threads[first + lane].started[index];
        if (!(mine == Issued{other.n, other.transpose_b, other.accumulate,
                             other.a_registers != nullptr, other.a, other.b}))
            fail_for(first + lane, "diverged", other.site,
                     "the lanes of a warp issue different products");
    }
    std::vector<Issued>& group = issued[warp / 4];
    if (state.products == group.size()) group.push_back(mine);
    if (!(mine == group[state.products]))
        fail_for(first, "diverged", product.site,
                 "product %u of this warp is not that of its warpgroup's others", state.products);

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
            for (int n = 0; n < product.n; n++)
                rows[r * product.n + n] += a[r][k] * b[k * product.n + n];
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

// Run the products that all lanes of a warp wait for, the oldest first.
void run_products(void** operands, unsigned mask, int warp) {
    const int first = warp * WARP_SIZE, pending = *static_cast<int*>(operands[0]);
    if (mask != ~0u) fail("diverged", nullptr, "warpgroup_wait by a part of a warp");
    Warp& state = warps[warp];
    if (state.agent < 0) state.agent = new_agent();
    size_t count = 0;
    for (const Started& product : threads[first].started)
        count += product.group < threads[first].groups - pending;
    for (int lane = 1; lane < WARP_SIZE; lane++)
        if (threads[first + lane].started.size() != threads[first].started.size() ||
            threads[first + lane].groups != threads[first].groups)
            fail_for(first + lane, "diverged", nullptr,
                     "the lanes of a warp have issued different numbers of products");
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
    return (offset & 0x3ffff) >> 4 | uint64_t(leading_bytes >> 4) << 16 |
           uint64_t(stride_bytes >> 4) << 32 | uint64_t(swizzle) << 62;
}

void warpgroup_fence() { threads[thread()].fenced = true; }
void warpgroup_commit() { threads[thread()].groups++; }

void emulator::start_product(const Product& product) {
    const Site site = EMULATOR_SITE;
    Thread& me = threads[thread()];
    InFlight* accumulator = in_flight(me, product.d);
    if (!me.fenced && (!accumulator || product.a_registers))
        fail("missing fence", site,
             "wgmma reads registers that may have been written since the last warpgroup_wait: no "
             "warpgroup_fence()");
    if (!accumulator) {
        me.in_flight.push_back(
            {product.d, product.n, 0, std::vector<float>(product.d, product.d + product.n / 2)});
        accumulator = &me.in_flight.back();
        for (int i = 0; i < product.n / 2; i++) memcpy(&product.d[i], &POISON, sizeof POISON);
    }
    accumulator->products++;
    Started started{};
    static_cast<Product&>(started) = product;
    if (product.a_registers)
        memcpy(started.a_when_started, product.a_registers, sizeof started.a_when_started);
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
    threads.assign(num_threads(), {});
    warps.assign((num_threads() + WARP_SIZE - 1) / WARP_SIZE, {});
    issued.assign((warps.size() + 3) / 4, {});
}

void check_at_end() {
    for (int t = 0; t < num_threads(); t++) {
        const std::vector<Started>& left = threads[t].started;
        if (!left.empty())
            fail_for(t, "not waited for", left[0].site,
                     "a product was still under way when the thread returned");
    }
    for (size_t w = 0; w < warps.size(); w++)
        if (warps[w].products != issued[w / 4].size())
            fail_for(static_cast<int>(w) * WARP_SIZE, "diverged", nullptr,
                     "this warp issued %u products, and another of its warpgroup %zu",
                     warps[w].products, issued[w / 4].size());
}

Registration registration{nullptr, reset, check_at_end};

}  // namespace
