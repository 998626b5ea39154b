// What emulated CUDA code and the parts of the emulator call: threads as fibers, meeting points, and checked memory.
//
// A kernel is compiled by the host compiler with -fsanitize=thread, which puts a call before every access to memory; sanitizer.cpp answers
// those calls. The emulator's own .cpp files are compiled without it, so what they read and write is checked only where they ask for it.
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

// End the launch with a report: `kind` in a few words ("out of bounds"), then a text for printf. "@%p@" in it, with a Site, becomes
// "file:line".
[[noreturn]] void fail(const char* kind, Site site, const char* format, ...) __attribute__((format(printf, 3, 4)));
// The same, with another thread named as the one at fault.
[[noreturn]] void fail_for(int thread, const char* kind, Site site, const char* format, ...) __attribute__((format(printf, 4, 5)));

// Switch to another thread; the running one stays ready.
void yield();
// Suspend the thread until a call of wake(thread). In a deadlock the report says that it waits in `what` (and `detail`).
void suspend(const char* what, Site site, const char* detail = "");
void wake(int thread);
// `poll` is called every few switches, and with idle = true when no thread can run; it returns whether it did anything.
void add_poll(bool (*poll)(bool idle));
// `reset` is called before each block.
void add_reset(void (*reset)());
// `finish` is called when all threads of a block have returned; it may still call fail_for().
void add_finish(void (*finish)());
struct Registration {  // static Registration registration(poll, reset, finish);
    Registration(bool (*poll)(bool idle), void (*reset)(), void (*finish)() = nullptr);
};

// ---- meeting points (collectives.cpp)

// Collective of the lanes in `mask`, which call it with the same name and mask. The last one to arrive runs
// execute(operands by lane, mask, warp); then all return.
// `aligned`: the hardware wants all lanes at the same instruction, not just at one of the same kind.
void warp_collective(const char* name, Site site, unsigned mask, void* operands, void (*execute)(void** operands, unsigned mask, int warp),
                     bool aligned = true);
// The same for `count` threads from `first` on, such as a warpgroup.
void group_collective(const char* name, Site site, int first, int count, void* operands, void (*execute)(void** operands, int first));
// Barrier `id` of the block for `threads` threads (0, all threads: __syncthreads). Combines `value` of all: sum, and, or.
struct Votes {
    int sum, all, any;
};
// `line`: of the source, which all lanes of a warp must agree in.
Votes barrier_sync(int id, int threads, Site site, const char* name, int value = 0, int line = 0);
void barrier_arrive(int id, int threads, Site site);

// ---- order of accesses (clocks.cpp): a vector clock per thread says what it has seen of every other thread's past

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

// What the running thread did so far becomes part of `clock`; whoever acquires from it has seen that.
void release_into(Clock& clock);
void acquire_from(const Clock& clock);
void release_thread_into(int thread, Clock& clock);
void acquire_thread_from(int thread, const Clock& clock);
// The running thread's ordinary writes so far may be read by TMA and wgmma once a barrier has passed.
void fence_async_proxy();
int new_agent();                     // a virtual thread for asynchronous accesses
Tick agent_tick(uint32_t count);     // the tick for the count-th thing that an agent does in this block

// ---- checked memory (memory.cpp)

// Check an access of the running thread, as its own loads and stores are checked, and note it.
void read(const void* address, size_t bytes, Site site);
void write(void* address, size_t bytes, Site site);
// A vector access: the address must be a multiple of `bytes`.
void require_aligned(const void* address, size_t bytes, Site site);
void require_shared(const void* address, size_t bytes, Site site, const char* what);
void require_global(const void* address, size_t bytes, Site site, const char* what);
// What `shared_address` of ampere.cuh gives: bytes from the start of dynamic shared memory; static shared memory follows that.
uint32_t shared_address(const void* pointer);
// Bytes that an asynchronous copy of the running thread brings: a write that is no instruction of its own.
void write_landed(void* address, size_t bytes, Site site);
// Mark as awaited from an asynchronous copy: reading it is an error until it is written or marked as landed.
void mark_in_flight(void* address, size_t bytes, Site site);
void mark_landed(void* address, size_t bytes);

// An access by hardware that runs beside the threads, started by `thread` when it had seen `seen`.
struct Async {
    int thread;
    Site site;
    Clock seen;
};
Async begin_async(Site site);
// `agent` and `tick` (of agent_tick) date the access: it has been seen by whoever's clock holds `tick` or more for `agent`. Reads by the
// asynchronous proxy need a fence after ordinary writes.
void async_access(const Async& by, void* address, size_t bytes, bool is_write, int agent, Tick tick, const char* what);

// ---- what a reader asked to see

// `type`: 'f', 'i' or 'u'; `shape`: four sizes, 0 from the rank on.
void watch(const char* name, char type, int element_bytes, const void* data, size_t count, const int* shape);

}  // namespace emulator
