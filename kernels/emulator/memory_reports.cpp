// Error reports of checked memory: accesses out of bounds, too early, unordered or unfenced.
#include <cstdio>
#include <string>

#include "shadow.h"

namespace emulator {

const char* verb(bool is_write) { return is_write ? "writes" : "reads"; }

std::string place(const Region& region, uintptr_t address) {
    const size_t offset = address - region.begin;
    char text[200];
    if (region.item_bytes > 1)
        snprintf(text, sizeof text, "element %zu (byte %zu) of %s", offset / region.item_bytes,
                 offset, region.name.c_str());
    else
        snprintf(text, sizeof text, "byte %zu of %s", offset, region.name.c_str());
    return text;
}

void report_outside(uintptr_t address, size_t bytes, bool is_write, int who, Site site) {
    const Region* nearest = nullptr;
    size_t best = SIZE_MAX;
    for (const Region& region : regions) {
        const size_t distance =
            address < region.begin ? region.begin - address : address - region.end;
        if (distance < best) best = distance, nearest = &region;
    }
    if (address < 4096)
        fail_for(who, "out of bounds", site, "%s %zu bytes at address %zu: a null pointer",
                 verb(is_write), bytes, size_t(address));
    if (!nearest || best > (64u << 20))
        fail_for(who, "out of bounds", site,
                 "%s %zu bytes at address 0x%zx, far from any array of this launch and from shared "
                 "memory",
                 verb(is_write), bytes, size_t(address));
    if (address < nearest->begin)
        fail_for(who, "out of bounds", site,
                 "%s %zu bytes that begin %zu bytes before the start of %s", verb(is_write), bytes,
                 best, nearest->name.c_str());
    const size_t offset = address - nearest->begin;
    if (nearest->item_bytes > 1)
        fail_for(who, "out of bounds", site, "%s %zu bytes at element %zu of %s, which has %zu",
                 verb(is_write), bytes, offset / nearest->item_bytes, nearest->name.c_str(),
                 nearest->bytes() / nearest->item_bytes);
    fail_for(who, "out of bounds", site, "%s %zu bytes at byte %zu of %s, which has %zu",
             verb(is_write), bytes, offset, nearest->name.c_str(), nearest->bytes());
}

void report_unwritten(const Region& region, size_t cell, int who, Site site, const char* subject) {
    const uintptr_t address = region.begin + (cell << region.shift);
    if (region.written[cell] == IN_FLIGHT) {
        const Event starter = region.awaited[cell];
        fail_for(who, "read before it arrived", site,
                 "%sreads %s while an asynchronous copy, started by %s at @%p@, is still in "
                 "flight: no thread has waited for it",
                 subject, place(region, address).c_str(), describe_thread(who_of(starter)).c_str(),
                 sites[site_of(starter)]);
    }
    fail_for(who, "uninitialised read", site, "%sreads %s, which nothing has written%s", subject,
             place(region, address).c_str(), region.is_shared() ? " in this block" : "");
}

static std::string name_of(Event e) {
    return who_of(e) < machine.num_threads ? describe_thread(who_of(e))
                                           : std::string("an asynchronous copy");
}

void report_race(const Region& region, size_t cell, int who, Site site, bool is_write, Event other,
                 bool other_wrote, const char* subject) {
    const uintptr_t address = region.begin + (cell << region.shift);
    if (tick_of(other) < machine.block_start)
        fail_for(who, "race between blocks", site,
                 "%s%s %s, which another block %s at @%p@: blocks have no order", subject,
                 verb(is_write), place(region, address).c_str(), other_wrote ? "wrote" : "read",
                 sites[site_of(other)]);
    fail_for(who, "race", site, "%s%s %s, which %s %s at @%p@: no barrier lies between the two",
             subject, verb(is_write), place(region, address).c_str(), name_of(other).c_str(),
             other_wrote ? "wrote" : "read", sites[site_of(other)]);
}

void report_unfenced(const Region& region, size_t cell, int who, Site site, Event writer,
                     const char* subject) {
    const uintptr_t address = region.begin + (cell << region.shift);
    fail_for(who, "missing proxy fence", site,
             "%sreads %s through the asynchronous proxy; %s wrote it with an ordinary store at "
             "@%p@ and has not called "
             "fence_async_proxy() since",
             subject, place(region, address).c_str(), name_of(writer).c_str(),
             sites[site_of(writer)]);
}

}  // namespace emulator
