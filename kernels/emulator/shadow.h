// Shadow memory: access events, cells and regions. memory.cpp keeps them; memory_reports.cpp
// describes their state.
#pragma once
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "internal.h"

namespace emulator {

// Access event in 64 bits: thread or agent (11 bits), asynchronous (1), index in `sites` (20), tick
// (32). 0: no event.
typedef uint64_t Event;
inline Event make_event(int who, bool asynchronous, unsigned site, Tick tick) {
    return static_cast<Event>(who) << 53 | static_cast<Event>(asynchronous) << 52 |
           static_cast<Event>(site) << 32 | tick;
}
inline int who_of(Event e) { return static_cast<int>(e >> 53); }
inline bool is_asynchronous(Event e) { return e >> 52 & 1; }
inline unsigned site_of(Event e) { return e >> 32 & 0xfffff; }
inline Tick tick_of(Event e) { return static_cast<Tick>(e); }

enum Kind { GLOBAL, STATIC_SHARED, DYNAMIC_SHARED };
enum Written : uint8_t { NEVER, WRITTEN, IN_FLIGHT };
constexpr int READERS = 4;  // of the readers of a cell since its last write, so many are remembered

struct Cell {
    Event writer, readers[READERS];
};

struct Region {
    uintptr_t begin, end;
    Kind kind;
    int shift;  // a cell is 1 << shift bytes
    int item_bytes;
    std::string name;
    std::unique_ptr<Cell[], void (*)(void*)> cells{nullptr, free};
    std::vector<Written> written;  // by cell; empty: all of it holds something
    std::vector<Event> awaited;    // by cell: the start of the copy in flight to it

    size_t bytes() const { return end - begin; }
    size_t num_cells() const { return (bytes() + (1u << shift) - 1) >> shift; }
    bool is_shared() const { return kind != GLOBAL; }
};

extern std::vector<Region> regions;
extern std::vector<Site> sites;

// Return "reads" or "writes".
const char* verb(bool is_write);
// Return "byte 128 of dynamic shared memory", or "element 5 (byte 20) of x: float32 [100]".
std::string place(const Region& region, uintptr_t address);

// End the launch with a report on thread `who`. `subject`: its asynchronous operation ("started
// wgmma, which "), or nothing.
[[noreturn]] void report_outside(
    uintptr_t address, size_t bytes, bool is_write, int who, Site site
);
[[noreturn]] void report_unwritten(
    const Region& region, size_t cell, int who, Site site, const char* subject
);
[[noreturn]] void report_race(
    const Region& region, size_t cell, int who, Site site, bool is_write, Event other,
    bool other_wrote, const char* subject
);
[[noreturn]] void report_unfenced(
    const Region& region, size_t cell, int who, Site site, Event writer, const char* subject
);

}  // namespace emulator
