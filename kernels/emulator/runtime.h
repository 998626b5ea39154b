// Interface for emulated CUDA code and the parts of the emulator: threads as fibers, meeting
// points, and checked memory.
//
// The host compiler compiles a kernel with -fsanitize=thread, which puts a call before every access
// to memory. sanitizer.cpp implements those calls. The emulator's own .cpp files are compiled
// without it, so their accesses are checked only on request.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emulator {

typedef void* Site;  // a code address in the kernel, from which reports find the source line
#define EMULATOR_SITE __builtin_return_address(0)

constexpr int WARP_SIZE = 32;
constexpr int MAX_THREADS = 1024;
constexpr int MAX_CLOCKS = 1024;  // threads and agents of a block

struct Index {
    unsigned x, y, z;
};

// ---- the running thread (runtime.cpp)

__attribute__((const)) Index thread_index();
__attribute__((const)) Index block_index();
__attribute__((const)) Index block_size();
__attribute__((const)) Index grid_size();
int thread();  // its number in the block, x fastest
int num_threads();
unsigned random_below(unsigned n);  // from the launch's seed
void* dynamic_shared();
size_t dynamic_shared_bytes();

// End the launch with a report: `kind` in a few words ("out of bounds"), then a text for printf.
// "@%p@" in it, with a Site, becomes "file:line".
[[noreturn]] void fail(const char* kind, Site site, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
// End the launch with a report that names another thread as the one at fault.
[[noreturn]] void fail_for(int thread, const char* kind, Site site, const char* format, ...)
    __attribute__((format(printf, 4, 5)));

// Switch to another thread; the running one stays ready.
void yield();
// Suspend the thread until a call of wake(thread). A deadlock report names `what` (and `detail`) as
// the event it waits for.
void suspend(const char* what, Site site, const char* detail = "");
void wake(int thread);
// Register `poll`, called every few switches, and with idle = true when no thread can run. It
// returns whether it did anything.
void add_poll(bool (*poll)(bool idle));
// Register `reset`, called before each block.
void add_reset(void (*reset)());
// Register `finish`, called after all threads of a block have returned; it may call fail_for().
void add_finish(void (*finish)());
struct Registration {  // static Registration registration(poll, reset, finish);
    Registration(bool (*poll)(bool idle), void (*reset)(), void (*finish)() = nullptr);
};

// ---- meeting points (collectives.cpp)

// Run a collective of the lanes in `mask`, which call it with the same name and mask. The last one
// to arrive runs execute(operands by lane, mask, warp); then all return. `aligned`: the hardware
// requires the same instruction of all lanes, not only the same kind.
void warp_collective(
    const char* name, Site site, unsigned mask, void* operands,
    void (*execute)(void** operands, unsigned mask, int warp), bool aligned = true
);
// Run a collective of `count` threads from `first` on, such as a warpgroup.
void group_collective(
    const char* name, Site site, int first, int count, void* operands,
    void (*execute)(void** operands, int first)
);
// Combination of the `value` of all threads at a barrier: sum, and, or.
struct Votes {
    int sum, all, any;
};
// Wait at barrier `id` of the block for `threads` threads (0, all threads: __syncthreads). `line`
// is the source line, the same for all lanes of a warp.
Votes barrier_sync(int id, int threads, Site site, const char* name, int value = 0, int line = 0);
void barrier_arrive(int id, int threads, Site site);

// ---- order of accesses (clocks.cpp): a vector clock per thread of every other thread's past

typedef uint32_t Tick;

class Clock {  // a shared, immutable snapshot; copying is cheap
  public:
    Clock() : data_(nullptr) {}
    Clock(const Clock& other);
    Clock(Clock&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
    Clock& operator=(Clock other);
    ~Clock();
    Tick operator[](int who) const { return data_ ? data_->tick[who] : 0; }
    bool same_as(const Clock& other) const { return data_ == other.data_; }
    void join(const Clock& other);     // pointwise maximum
    void raise(int who, Tick tick);    // at least `tick` for one
  private:
    struct Data {
        int references;
        Tick tick[1];  // in fact as many as there are threads and agents
    };
    Data* data_;
    void own();
    static Data* allocate();
    static void release(Data* data);
};

// Join the running thread's past into `clock`; an acquire from it then sees that past.
void release_into(Clock& clock);
void acquire_from(const Clock& clock);
void release_thread_into(int thread, Clock& clock);
void acquire_thread_from(int thread, const Clock& clock);
// Allow TMA and wgmma to read the running thread's ordinary writes so far once a barrier has
// passed.
void fence_async_proxy();
int new_agent();                  // a virtual thread for asynchronous accesses
Tick agent_tick(uint32_t count);  // tick of an agent's count-th operation in this block

// ---- checked memory (memory.cpp)

// Check an access of the running thread like its own loads and stores, and record it.
void read(const void* address, size_t bytes, Site site);
void write(void* address, size_t bytes, Site site);
// Require that the address of a vector access is a multiple of `bytes`.
void require_aligned(const void* address, size_t bytes, Site site);
void require_shared(const void* address, size_t bytes, Site site, const char* what);
void require_global(const void* address, size_t bytes, Site site, const char* what);
// Return the shared_address of ampere.cuh: bytes from the start of dynamic shared memory, which
// static shared memory follows.
uint32_t shared_address(const void* pointer);
// Record bytes of the running thread's asynchronous copy: a write without an instruction of its
// own.
void write_landed(void* address, size_t bytes, Site site);
// Mark as in flight: reading it is an error until it is written or marked as landed.
void mark_in_flight(void* address, size_t bytes, Site site);
void mark_landed(void* address, size_t bytes);

// Access by hardware beside the threads, started by `thread` with the clock `seen`.
struct Async {
    int thread;
    Site site;
    Clock seen;
};
Async begin_async(Site site);
// Record an asynchronous access. `agent` and `tick` (of agent_tick) date it: a clock that holds
// `tick` or more for `agent` has seen it. Reads by the asynchronous proxy need a fence after
// ordinary writes.
void async_access(
    const Async& by, void* address, size_t bytes, bool is_write, int agent, Tick tick,
    const char* what
);

// ---- watched values

// Log a watched value. `type`: 'f', 'i' or 'u'; `shape`: four sizes, 0 from the rank on.
void watch(
    const char* name, char type, int element_bytes, const void* data, size_t count, const int* shape
);

}  // namespace emulator
