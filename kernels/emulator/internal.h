// State of the emulator, shared by its .cpp files alone.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <string>
#include <vector>

#include "runtime.h"

namespace emulator {

enum class Order { round_robin, greedy_warp, reversed, random };
enum class State : uint8_t { ready, waiting, done };

struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    State state = State::done;
    const char* what = nullptr;  // it waits in this,
    Site site = nullptr;         // called from here,
    char detail[96] = "";        // for that
    Index index{};
    Clock seen;      // of all other threads
    Tick now = 1;    // its own tick
    Tick fenced = 0; // its own tick at its last fence_async_proxy
};

// Interface to Python: structs.py mirrors these structs with ctypes.
struct Array {
    uint64_t address, bytes;
    int32_t written;  // 0: holds nothing yet, so that reading it before writing is an error
    int32_t item_bytes;
    char name[96];
};
struct Access {  // one row of the log
    uint64_t site, address;
    uint32_t block;
    uint16_t thread;
    uint8_t bytes, flags;  // flags: 1 write, 2 shared memory, 4 asynchronous
};
struct Traced {  // an access of the watched thread, with the bytes it read or wrote
    Access access;
    unsigned char data[16];
};
struct Watched {  // a header in the log of watched values; the data follow, padded to 8 bytes
    uint64_t site, count;
    char name[24];
    char type[4];  // 'f', 'i', 'u'
    int32_t element_bytes;
    int32_t shape[4];  // 0 from its rank on
};
struct Launch {
    void (*kernel)(void** args);
    void** args;  // as many pointers as there are parameters, then the values they point to
    uint64_t args_bytes;
    Index grid, block;
    uint64_t shared_bytes;
    int32_t order;
    int32_t checks;  // bit 0 races, bit 1 uninitialised reads
    uint64_t seed;
    uint32_t preempt;  // switch threads at one memory access in so many; 0: never
    int32_t num_arrays;
    const Array* arrays;
    const Array* shared_variables;  // the static ones, where known
    int64_t num_shared_variables;
    int64_t only_block;    // -1: all
    int64_t log_block;     // log the accesses of this block; -1: none
    int64_t watch_block;
    int32_t watch_thread;  // -1: none
    int32_t num_stacks;
    // Stacks of the fibers. One set serves all libraries of a process; a launch that needs more
    // replaces it.
    char* stacks;
};
struct Report {
    char kind[64];
    char text[6000];
    uint64_t site;
    uint32_t block[3], thread[3];
    uint64_t num_accesses, watched_bytes, switches, num_divergent;
    // Pairs of sites at which lanes of a warp met in one aligned instruction.
    uint64_t divergent[16][2];
    const Access* accesses;
    const char* watched;
    const Traced* trace;
    uint64_t num_traced, dynamic_shared;  // how many, and where dynamic shared memory was
};

struct Machine {
    Launch* launch = nullptr;
    Report* report = nullptr;
    std::vector<Fiber> fibers;
    int num_threads = 0, num_warps = 0, running = -1, left = 0, num_clocks = 0;
    Index block_index{};
    uint32_t block_number = 0;
    Tick block_start = 1;  // ticks below are of earlier blocks
    Tick latest = 1;       // the highest tick of all threads and agents
    std::vector<uint32_t> ready;  // a bit for each lane, by warp
    uint64_t random_state = 1;
    void* scheduler_stack = nullptr;
    bool failed = false;
    uint64_t launch_number = 0;
    std::vector<Access> log;
    std::vector<char> watched;
    std::vector<Traced> trace;
    bool trace_lacks_data = false;  // of its last row, a write that was about to happen
    char* shared = nullptr;  // the arena of dynamic shared memory
    char *stacks_begin = nullptr, *stacks_end = nullptr;
};
extern Machine machine;
inline Fiber& running_fiber() { return machine.fibers[machine.running]; }

[[noreturn]] void stop_with_report(
    int thread, const char* kind, Site site, const char* format, va_list args
);
std::string describe_thread(int thread);

// Record an access in the kernel's own code, where preemption may switch threads.
void access_of_kernel(void* address, size_t bytes, bool is_write, Site site);

// Fibers. `emulator_switch` saves the running fiber's stack pointer and loads another's.
// `new_stack_pointer` returns the one of a fiber that begins with `entry`. `allocate_stacks`
// returns whether memory suffices for `count` stacks.
constexpr size_t STACK_BYTES = 256 << 10;
extern "C" void emulator_switch(void** save, void* load);
void* new_stack_pointer(char* top, void (*entry)());
bool allocate_stacks(Launch& launch, int count);
void to_scheduler();

void report_deadlock();

// Prepare each file's state for a launch and a block.
void prepare_memory(const Launch& launch);
void prepare_block_memory();
void finish_memory();
void prepare_block_clocks();
void prepare_block_collectives();

void note_divergence(Site one, Site other);
struct Stopped {};  // thrown to end the launch from where no thread runs

}  // namespace emulator
