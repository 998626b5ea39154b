// Error reports of a launch: the fault with its thread and block, or, in a deadlock, the waits of
// all threads.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "internal.h"

namespace emulator {

std::string describe_thread(int thread) {
    char text[64];
    const Index i = machine.fibers[thread].index;
    if (machine.launch->block.y == 1 && machine.launch->block.z == 1)
        snprintf(text, sizeof text, "thread %u", i.x);
    else
        snprintf(text, sizeof text, "thread (%u, %u, %u)", i.x, i.y, i.z);
    return text;
}

void stop_with_report(int thread, const char* kind, Site site, const char* format, va_list args) {
    Report& report = *machine.report;
    snprintf(report.kind, sizeof report.kind, "%s", kind);
    vsnprintf(report.text, sizeof report.text, format, args);
    report.site = reinterpret_cast<uint64_t>(site);
    const Index b = machine.block_index, t = thread >= 0 ? machine.fibers[thread].index : Index{};
    report.block[0] = b.x, report.block[1] = b.y, report.block[2] = b.z;
    report.thread[0] = t.x, report.thread[1] = t.y, report.thread[2] = t.z;
    machine.failed = true;
    if (machine.running < 0) throw Stopped{};
    to_scheduler();  // it runs no thread after a failure
    __builtin_unreachable();
}

void fail(const char* kind, Site site, const char* format, ...) {
    va_list args;
    va_start(args, format);
    stop_with_report(machine.running, kind, site, format, args);
}

void fail_for(int thread, const char* kind, Site site, const char* format, ...) {
    va_list args;
    va_start(args, format);
    stop_with_report(thread, kind, site, format, args);
}

void note_divergence(Site one, Site other) {
    Report& report = *machine.report;
    const uint64_t pair[2] = {reinterpret_cast<uint64_t>(one), reinterpret_cast<uint64_t>(other)};
    for (uint64_t i = 0; i < report.num_divergent; i++)
        if (!memcmp(report.divergent[i], pair, sizeof pair)) return;
    if (report.num_divergent < 16)
        memcpy(report.divergent[report.num_divergent++], pair, sizeof pair);
}

// Return text such as "threads 0-31, 64 wait", of the threads for which `chosen` holds.
template <typename Chosen> static std::string thread_ranges(Chosen chosen, const char* one_does,
                                                            const char* several_do) {
    std::string text;
    int count = 0;
    for (int t = 0; t < machine.num_threads; t++) {
        if (!chosen(t)) continue;
        int last = t;
        while (last + 1 < machine.num_threads && chosen(last + 1)) last++;
        text += (text.empty() ? "" : ", ") + std::to_string(t) +
                (last > t ? "-" + std::to_string(last) : "");
        count += last - t + 1;
        t = last;
    }
    return (count == 1 ? "thread " : "threads ") + text + " " +
           (count == 1 ? one_does : several_do);
}

// Return whether two threads wait in the same call, for the same condition.
static bool wait_alike(const Fiber& one, const Fiber& other) {
    return other.state == State::waiting && other.what == one.what && other.site == one.site &&
           !strcmp(other.detail, one.detail);
}

// Report a deadlock: the places where threads wait, with the threads.
void report_deadlock() {
    std::string text = "No thread can continue.\n";
    std::vector<bool> told(machine.num_threads);
    const Fiber* first = &machine.fibers[0];
    for (int t = machine.num_threads - 1; t >= 0; t--)
        if (machine.fibers[t].state == State::waiting) first = &machine.fibers[t];
    for (int t = 0; t < machine.num_threads; t++) {
        const Fiber& fiber = machine.fibers[t];
        if (fiber.state != State::waiting || told[t]) continue;
        auto alike = [&](int u) { return wait_alike(fiber, machine.fibers[u]); };
        char place[64];
        snprintf(place, sizeof place, " at @%p@", fiber.site);
        text += "  " + thread_ranges(alike, "waits", "wait") + " in " + fiber.what + place;
        text += (fiber.detail[0] ? std::string(": ") + fiber.detail : "") + "\n";
        for (int u = t; u < machine.num_threads; u++) told[u] = told[u] || alike(u);
    }
    auto returned = [](int t) { return machine.fibers[t].state == State::done; };
    if (machine.left < machine.num_threads)
        text += "  " + thread_ranges(returned, "has", "have") + " returned from the kernel\n";
    Report& report = *machine.report;
    snprintf(report.kind, sizeof report.kind, "deadlock");
    snprintf(report.text, sizeof report.text, "%s", text.c_str());
    report.site = reinterpret_cast<uint64_t>(first->site);
    const Index b = machine.block_index;
    report.block[0] = b.x, report.block[1] = b.y, report.block[2] = b.z;
    report.thread[0] = first->index.x, report.thread[1] = first->index.y,
    report.thread[2] = first->index.z;
    machine.failed = true;
}

}  // namespace emulator
