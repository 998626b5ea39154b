// Checked memory: every load and store of a kernel passes here first.
//
// Known regions are the launch's arrays, the block's shared memory (static and dynamic), the stacks
// of the fibers, and the constants of the library. Arrays and shared memory have shadow cells, one
// per element or two bytes. A cell records whether it was written, its last write and the reads
// since. Two accesses to a cell, one of them a write, are a race unless the vector clocks order
// them.
#include <link.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "shadow.h"

// Ends of the section of static shared variables (cuda.h), set by the linker.
extern "C" char __start_minillm_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_minillm_shared[] __attribute__((weak, visibility("hidden")));

namespace emulator {

std::vector<Region> regions;
std::vector<Site> sites;
static std::vector<uint32_t> site_table;  // open addressing: where in `sites` a code address is

static unsigned number_of_site(Site site) {
    const size_t mask = site_table.size() - 1;
    for (size_t i = (reinterpret_cast<uintptr_t>(site) * 0x9e3779b97f4a7c15ull >> 44) & mask;;
         i = (i + 1) & mask) {
        if (!site_table[i]) {
            sites.push_back(site);
            return site_table[i] = static_cast<uint32_t>(sites.size() - 1);
        }
        if (sites[site_table[i]] == site) return site_table[i];
    }
}

static Region* last_region;
static std::vector<char> arena;

static void add_region(uintptr_t begin, size_t bytes, Kind kind, int item_bytes, std::string name,
                       bool written) {
    if (!bytes) return;
    Region region;
    region.begin = begin;
    region.end = begin + bytes;
    region.kind = kind;
    region.item_bytes = item_bytes;
    region.name = std::move(name);
    region.shift = kind == GLOBAL ? (item_bytes >= 4 ? 2 : item_bytes == 2 ? 1 : 0) : 1;
    if (!written) region.written.assign(region.num_cells(), NEVER);
    if (!written) region.awaited.assign(region.num_cells(), 0);
    region.cells.reset(static_cast<Cell*>(calloc(region.num_cells(), sizeof(Cell))));
    regions.push_back(std::move(region));
}

// Add the arrays, merging those that overlap (q, k, v of one projection) into one region.
static void add_arrays(const Launch& launch) {
    std::vector<Array> arrays(launch.arrays, launch.arrays + launch.num_arrays);
    std::sort(arrays.begin(), arrays.end(),
              [](const Array& a, const Array& b) { return a.address < b.address; });
    for (size_t i = 0; i < arrays.size();) {
        Array all = arrays[i];
        std::string name = all.name;
        size_t j = i + 1;
        for (; j < arrays.size() && arrays[j].address < all.address + all.bytes; j++) {
            all.bytes = std::max(all.bytes, arrays[j].address + arrays[j].bytes - all.address);
            all.written &= arrays[j].written;
            if (name.find(arrays[j].name) == std::string::npos)
                name += std::string(" / ") + arrays[j].name;
        }
        add_region(all.address, all.bytes, GLOBAL, all.item_bytes, name, all.written);
        i = j;
    }
}

void prepare_memory(const Launch& launch) {
    sites.assign(1, nullptr);
    site_table.assign(1 << 16, 0);
    regions.clear();
    last_region = nullptr;
    add_arrays(launch);
    for (int64_t i = 0; i < launch.num_shared_variables; i++) {
        const Array& variable = launch.shared_variables[i];
        add_region(variable.address, variable.bytes, STATIC_SHARED, 1, variable.name, false);
    }
    const uintptr_t begin = reinterpret_cast<uintptr_t>(__start_minillm_shared),
                    end = reinterpret_cast<uintptr_t>(__stop_minillm_shared);
    if (!launch.num_shared_variables)
        add_region(begin, end - begin, STATIC_SHARED, 1, "static shared memory", false);
    // No array of the launch is within a red zone.
    constexpr size_t ALIGNMENT = 1024, RED_ZONE = 4096;
    arena.resize(launch.shared_bytes + ALIGNMENT + 2 * RED_ZONE);
    const uintptr_t start = (reinterpret_cast<uintptr_t>(arena.data()) + RED_ZONE + ALIGNMENT - 1) /
                            ALIGNMENT * ALIGNMENT;
    machine.shared = reinterpret_cast<char*>(start);
    add_region(start, launch.shared_bytes, DYNAMIC_SHARED, 1, "dynamic shared memory", false);
}

// Fill shared memory for a new block with set bits, a NaN in every floating-point type.
void prepare_block_memory() {
    for (Region& region : regions) {
        if (!region.is_shared()) continue;
        memset(reinterpret_cast<void*>(region.begin), 0xff, region.bytes());
        std::fill(region.written.begin(), region.written.end(), NEVER);
    }
}

static Region* find_region(uintptr_t address) {
    if (last_region && address >= last_region->begin && address < last_region->end)
        return last_region;
    for (Region& region : regions)
        if (address >= region.begin && address < region.end) return last_region = &region;
    return nullptr;
}

// ---- checks

// Author of a checked access, and the clock that it had seen.
struct Author {
    int thread;       // blamed in reports
    int who;          // the thread itself or an agent, which dates the access
    Tick tick;
    bool asynchronous;
    Site site;
    const Clock& seen;
    Tick own;         // the thread's tick at the access: its own past counts as seen
    const char* subject;  // "started wgmma, which ", or nothing: the thread itself

    bool knows(Event e) const {
        if (who_of(e) == who) return true;
        if (who_of(e) == thread) return tick_of(e) <= own;
        return seen[who_of(e)] >= tick_of(e);
    }
};

// Return true if two accesses lack an order. Only atomics order blocks.
static bool conflicts(const Region& region, const Author& by, Event other) {
    if (!other) return false;
    if (tick_of(other) < machine.block_start)
        return region.kind == GLOBAL && by.seen[who_of(other)] < tick_of(other);
    return !by.knows(other);
}

static void check_unfenced(const Region& region, size_t cell, const Author& by, Event writer) {
    if (!by.asynchronous || !writer || is_asynchronous(writer) ||
        tick_of(writer) < machine.block_start)
        return;
    if (machine.fibers[who_of(writer)].fenced < tick_of(writer))
        report_unfenced(region, cell, by.thread, by.site, writer, by.subject);
}

static void check_read(Region& region, size_t first, size_t last, const Author& by) {
    if (machine.launch->checks & 2 && !region.written.empty())
        for (size_t cell = first; cell <= last; cell++)
            if (region.written[cell] != WRITTEN)
                report_unwritten(region, cell, by.thread, by.site, by.subject);
    if (!(machine.launch->checks & 1)) return;
    const Event event = make_event(by.who, by.asynchronous, number_of_site(by.site), by.tick);
    const int slot = (by.who + by.who / WARP_SIZE) % READERS;
    Event fine = 0;  // a writer already found to be in the past
    for (size_t cell = first; cell <= last; cell++) {
        Cell& at = region.cells[cell];
        if (at.writer != fine) {
            if (conflicts(region, by, at.writer))
                report_race(region, cell, by.thread, by.site, false, at.writer, true, by.subject);
            if (region.is_shared()) check_unfenced(region, cell, by, at.writer);
            fine = at.writer;
        }
        at.readers[slot] = event;
    }
}

static void check_write(Region& region, size_t first, size_t last, const Author& by) {
    if (machine.launch->checks & 1) {
        const Event event = make_event(by.who, by.asynchronous, number_of_site(by.site), by.tick);
        Event fine = 0, fine_reader = 0;
        for (size_t cell = first; cell <= last; cell++) {
            Cell& at = region.cells[cell];
            if (at.writer != fine) {
                if (conflicts(region, by, at.writer))
                    report_race(region, cell, by.thread, by.site, true, at.writer, true,
                                by.subject);
                fine = at.writer;
            }
            for (Event& reader : at.readers) {
                if (!reader) continue;
                if (reader != fine_reader && conflicts(region, by, reader))
                    report_race(region, cell, by.thread, by.site, true, reader, false, by.subject);
                fine_reader = reader;
                reader = 0;
            }
            at.writer = event;
        }
    }
    if (!region.written.empty())
        std::fill(region.written.begin() + first, region.written.begin() + last + 1, WRITTEN);
}

static void log_access(std::vector<Access>& log, uintptr_t address, size_t bytes, bool is_write,
                       const Region& region, const Author& by) {
    const uint8_t flags =
        (is_write ? 1 : 0) | (region.is_shared() ? 2 : 0) | (by.asynchronous ? 4 : 0);
    log.push_back({reinterpret_cast<uint64_t>(by.site), address, machine.block_number,
                   static_cast<uint16_t>(by.thread),
                   static_cast<uint8_t>(std::min<size_t>(bytes, 255)), flags});
}

// Fill in the bytes of a write, which are known at the thread's next access.
static void complete_trace() {
    if (!machine.trace_lacks_data) return;
    Traced& last = machine.trace.back();
    memcpy(last.data, reinterpret_cast<const void*>(last.access.address),
           std::min<size_t>(last.access.bytes, sizeof last.data));
    machine.trace_lacks_data = false;
}

static void log_and_trace(uintptr_t address, size_t bytes, bool is_write, const Region& region,
                          const Author& by) {
    const Launch& launch = *machine.launch;
    if (launch.log_block == machine.block_number)
        log_access(machine.log, address, bytes, is_write, region, by);
    if (launch.watch_block != machine.block_number || launch.watch_thread != by.thread) return;
    complete_trace();
    std::vector<Access> row;
    log_access(row, address, bytes, is_write, region, by);
    machine.trace.push_back({row[0], {}});
    machine.trace_lacks_data = true;
    if (!is_write) complete_trace();
}

static void check(uintptr_t address, size_t bytes, bool is_write, const Author& by,
                  bool logged = true) {
    Region* region = find_region(address);
    if (!region) report_outside(address, bytes, is_write, by.thread, by.site);
    if (address + bytes > region->end)
        report_outside(region->end, address + bytes - region->end, is_write, by.thread, by.site);
    if (logged) log_and_trace(address, bytes, is_write, *region, by);
    const size_t first = (address - region->begin) >> region->shift,
                 last = (address + bytes - 1 - region->begin) >> region->shift;
    // Part of a cell, whose rest may belong to other threads: no check for races.
    if (bytes < (1u << region->shift)) {
        if (is_write) {
            if (!region->written.empty()) region->written[first] = WRITTEN;
        } else if (machine.launch->checks & 2 && !region->written.empty() &&
                   region->written[first] != WRITTEN) {
            report_unwritten(*region, first, by.thread, by.site, by.subject);
        }
        return;
    }
    is_write ? check_write(*region, first, last, by) : check_read(*region, first, last, by);
}

void finish_memory() { complete_trace(); }

// ---- accesses of the running thread

static bool in_library(uintptr_t address);
static bool in_arguments(uintptr_t address) {
    return address - reinterpret_cast<uintptr_t>(machine.launch->args) < machine.launch->args_bytes;
}

static void access(uintptr_t address, size_t bytes, bool is_write, Site site) {
    const int me = machine.running;
    Fiber& fiber = machine.fibers[me];
    const uintptr_t stack = reinterpret_cast<uintptr_t>(fiber.stack);
    if (address - stack < STACK_BYTES) return;  // its own local variables
    if (address >= reinterpret_cast<uintptr_t>(machine.stacks_begin) &&
        address < reinterpret_cast<uintptr_t>(machine.stacks_end))
        fail("out of bounds", site, "%s %zu bytes of another thread's local variables",
             verb(is_write), bytes);
    // Constants and tables.
    if (!find_region(address) && (in_library(address) || in_arguments(address))) return;
    check(address, bytes, is_write,
          Author{me, me, fiber.now, false, site, fiber.seen, fiber.now, ""});
}

void access_of_kernel(void* address, size_t bytes, bool is_write, Site site) {
    if (machine.running < 0) return;  // the library's own start
    access(reinterpret_cast<uintptr_t>(address), bytes, is_write, site);
    if (machine.launch->preempt && !random_below(machine.launch->preempt)) yield();
}

void read(const void* address, size_t bytes, Site site) {
    access(reinterpret_cast<uintptr_t>(address), bytes, false, site);
}
void write(void* address, size_t bytes, Site site) {
    access(reinterpret_cast<uintptr_t>(address), bytes, true, site);
}

void write_landed(void* address, size_t bytes, Site site) {
    const Fiber& me = running_fiber();
    const Author author{machine.running, machine.running, me.now, false, site, me.seen, me.now, ""};
    check(reinterpret_cast<uintptr_t>(address), bytes, true, author, false);
}

void require_aligned(const void* address, size_t bytes, Site site) {
    const uintptr_t a = reinterpret_cast<uintptr_t>(address);
    if (a % bytes == 0) return;
    const Region* region = find_region(a);
    fail("misaligned access", site,
         "accesses %zu bytes at once at %s, and the address 0x%zx is no multiple of %zu", bytes,
         region ? place(*region, a).c_str() : "memory of no array", static_cast<size_t>(a), bytes);
}

static void require(const void* address, size_t bytes, Site site, const char* what, bool shared) {
    const uintptr_t a = reinterpret_cast<uintptr_t>(address);
    const Region* region = find_region(a);
    if (region && region->is_shared() == shared && a + bytes <= region->end) return;
    if (region && region->is_shared() != shared)
        fail("wrong memory", site, "%s takes an address in %s memory, and this is %s", what,
             shared ? "shared" : "global", place(*region, a).c_str());
    report_outside(region ? region->end : a, region ? a + bytes - region->end : bytes, false,
                   machine.running, site);
}
void require_shared(const void* address, size_t bytes, Site site, const char* what) {
    require(address, bytes, site, what, true);
}
void require_global(const void* address, size_t bytes, Site site, const char* what) {
    require(address, bytes, site, what, false);
}

uint32_t shared_address(const void* pointer) {
    const Region* region = find_region(reinterpret_cast<uintptr_t>(pointer));
    if (!region || !region->is_shared())
        fail("wrong memory", EMULATOR_SITE, "shared_address of an address outside shared memory");
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    if (region->kind == DYNAMIC_SHARED) return static_cast<uint32_t>(address - region->begin);
    return static_cast<uint32_t>(machine.launch->shared_bytes + address -
                                 reinterpret_cast<uintptr_t>(__start_minillm_shared));
}

// ---- asynchronous accesses

void mark_in_flight(void* address, size_t bytes, Site site) {
    const uintptr_t a = reinterpret_cast<uintptr_t>(address);
    Region* region = find_region(a);
    if (!region || a + bytes > region->end) report_outside(a, bytes, true, machine.running, site);
    memset(address, 0xff, bytes);
    if (region->written.empty()) return;
    const size_t first = (a - region->begin) >> region->shift,
                 last = (a + bytes - 1 - region->begin) >> region->shift;
    std::fill(region->written.begin() + first, region->written.begin() + last + 1, IN_FLIGHT);
    const Event starter =
        make_event(machine.running, true, number_of_site(site), running_fiber().now);
    std::fill(region->awaited.begin() + first, region->awaited.begin() + last + 1, starter);
}

void mark_landed(void* address, size_t bytes) {
    const uintptr_t a = reinterpret_cast<uintptr_t>(address);
    Region* region = find_region(a);
    if (!region || region->written.empty()) return;
    const size_t first = (a - region->begin) >> region->shift,
                 last = (a + bytes - 1 - region->begin) >> region->shift;
    std::fill(region->written.begin() + first, region->written.begin() + last + 1, WRITTEN);
}

Async begin_async(Site site) {
    Fiber& me = running_fiber();
    Clock seen = me.seen;
    seen.raise(machine.running, me.now++);
    machine.latest = std::max(machine.latest, me.now);
    return Async{machine.running, site, seen};
}

void async_access(const Async& by, void* address, size_t bytes, bool is_write, int agent, Tick tick,
                  const char* what) {
    const std::string subject = std::string("started ") + what + ", which ";
    const Author author{by.thread,          agent,          tick, true, by.site, by.seen,
                        by.seen[by.thread], subject.c_str()};
    check(reinterpret_cast<uintptr_t>(address), bytes, is_write, author);
}

// ---- constants

static uintptr_t library_begin, library_end;

// Find the extent of this library (the kernel linked with the emulator) in memory.
static int find_library(dl_phdr_info* info, size_t, void* inside) {
    uintptr_t begin = UINTPTR_MAX, end = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
        const uintptr_t start = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
        begin = std::min(begin, start);
        end = std::max<uintptr_t>(end, start + info->dlpi_phdr[i].p_memsz);
    }
    const uintptr_t marker = reinterpret_cast<uintptr_t>(inside);
    if (marker < begin || marker >= end) return 0;
    library_begin = begin;
    library_end = end;
    return 1;
}

static bool in_library(uintptr_t address) {
    if (!library_end) dl_iterate_phdr(find_library, &library_end);
    return address >= library_begin && address < library_end;
}

}  // namespace emulator
