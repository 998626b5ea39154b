/* Work-stealing threads that spin for 0.15 to 0.3 ms, then sleep.

   A call is cut into pieces. Each thread owns a contiguous share of them, so one call's data in
   a core's caches serves the next call. A thread without pieces of its own steals the last of
   another's. A call therefore ends without the threads that did not get a core in time.

   A training step calls a kernel every few hundred microseconds. The next call usually finds the
   threads awake, and between steps they cost nothing. */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { SPINS = 6000, YIELDS = 50, ALIGNMENT = 64, PIECES_A_THREAD = 8 };

/* Nanoseconds until a worker yields its core to other processes, between two pieces. Otherwise
   the system preempts it after 3 to 4 ms, within a piece, and all threads wait for it. */
enum { TURN = 2000000 };

typedef struct {
    Pool *pool;
    int number;
    pthread_t thread;
} Worker;

/* Unclaimed pieces of one thread: the first in the upper half, the end in the lower. */
typedef struct {
    _Alignas(ALIGNMENT) atomic_uint_fast64_t pieces;
    float *memory; /* its scratch */
    size_t num_floats;
    int64_t held;
} Share;

struct Pool {
    int size;    /* threads asked for; divides a call */
    int running; /* threads that could be started, the calling one included */
    pid_t owner; /* a forked child has none of the threads */
    Worker *workers;
    Share *shares;
    atomic_int taken, short_of_memory;

    /* The current call: written while no piece is claimed, read after claiming one. */
    RangeFunction *function;
    const void *state;
    int64_t num_items, num_pieces;

    atomic_int_fast64_t left; /* pieces that are not done */
    atomic_uint generation;
    atomic_int stop;

    pthread_mutex_t lock;
    pthread_cond_t wake, done;
    atomic_int sleepers; /* workers in pthread_cond_wait, or about to be */
    atomic_int caller_sleeps;
};

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Claim a piece of a share: its owner the first, others the last. Return -1 if none is left. */
static int64_t claim(Share *share, int owner) {
    uint_fast64_t pieces = atomic_load(&share->pieces);
    for (;;) {
        const uint64_t first = pieces >> 32, end = pieces & UINT32_MAX;
        if (first == end) return -1;
        const uint_fast64_t rest = owner ? (first + 1) << 32 | end : first << 32 | (end - 1);
        if (atomic_compare_exchange_weak(&share->pieces, &pieces, rest))
            return (int64_t)(owner ? first : end - 1);
    }
}

static void run_piece(Pool *pool, int64_t piece, int thread) {
    const int64_t start = pool->num_items * piece / pool->num_pieces;
    const int64_t stop = pool->num_items * (piece + 1) / pool->num_pieces;
    pool->function(pool, pool->state, start, stop, thread);
}

/* Count `number` pieces as done, and wake the caller after the last. */
static void report(Pool *pool, int64_t number) {
    if (!number || atomic_fetch_sub(&pool->left, number) != number) return;
    if (!atomic_load(&pool->caller_sleeps)) return;
    pthread_mutex_lock(&pool->lock);
    pthread_cond_signal(&pool->done);
    pthread_mutex_unlock(&pool->lock);
}

/* Run pieces until none is left: those of the thread's own share, then those of the others.
   `turn` is the start of a worker's turn, NULL for the caller. */
static void run_pieces(Pool *pool, int thread, int64_t *turn) {
    int64_t number = 0;
    for (int i = 0; i < pool->size; i++) {
        Share *share = &pool->shares[(thread + i) % pool->size];
        for (int64_t piece; (piece = claim(share, i == 0)) >= 0; number++) {
            run_piece(pool, piece, thread);
            if (!turn || nanoseconds() - *turn < TURN) continue;
            report(pool, number + 1);
            number = -1;
            sched_yield();
            *turn = nanoseconds();
        }
    }
    report(pool, number);
}

static unsigned wait_for_call(Pool *pool, unsigned seen, int64_t *turn) {
    for (int i = 0; i < SPINS + YIELDS; i++) {
        unsigned generation = atomic_load(&pool->generation);
        if (generation != seen) return generation;
        if (i < SPINS)
            pause_briefly();
        else
            sched_yield();
    }
    pthread_mutex_lock(&pool->lock);
    /* Precedes the last load of `generation`; the caller stores that before it loads `sleepers`. */
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->generation) == seen) pthread_cond_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->lock);
    *turn = nanoseconds();
    return atomic_load(&pool->generation);
}

static void *work(void *argument) {
    Worker *worker = argument;
    Pool *pool = worker->pool;
    int64_t turn = nanoseconds();
    for (unsigned seen = 0;;) {
        seen = wait_for_call(pool, seen, &turn);
        if (atomic_load(&pool->stop)) return NULL;
        run_pieces(pool, worker->number, &turn);
    }
}

static void wake_workers(Pool *pool) {
    atomic_fetch_add(&pool->generation, 1);
    if (!atomic_load(&pool->sleepers)) return;
    pthread_mutex_lock(&pool->lock);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->lock);
}

static void wait_for_pieces(Pool *pool) {
    for (int i = 0; i < SPINS + YIELDS; i++) {
        if (!atomic_load(&pool->left)) return;
        if (i < SPINS)
            pause_briefly();
        else
            sched_yield();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->caller_sleeps, 1);
    while (atomic_load(&pool->left)) pthread_cond_wait(&pool->done, &pool->lock);
    atomic_store(&pool->caller_sleeps, 0);
    pthread_mutex_unlock(&pool->lock);
}

void pool_run_pieces(
    Pool *pool, RangeFunction *function, const void *state, int64_t num_items, int64_t num_pieces,
    int threads
) {
    if (num_items <= 0) return;
    if (num_pieces <= 1 || threads <= 1) {
        function(pool, state, 0, num_items, 0);
        return;
    }
    pool->function = function;
    pool->state = state;
    pool->num_items = num_items;
    pool->num_pieces = num_pieces;
    if (pool->running == 1 || getpid() != pool->owner) {
        for (int64_t piece = 0; piece < num_pieces; piece++) run_piece(pool, piece, 0);
        return;
    }
    atomic_store(&pool->left, num_pieces);
    for (int i = 0; i < threads; i++) {
        const uint64_t first = (uint64_t)(num_pieces * i / threads);
        const uint64_t end = (uint64_t)(num_pieces * (i + 1) / threads);
        atomic_store(&pool->shares[i].pieces, first << 32 | end);
    }
    wake_workers(pool);
    run_pieces(pool, 0, NULL);
    wait_for_pieces(pool);
}

void pool_run(
    Pool *pool, RangeFunction *function, const void *state, int64_t num_items, int64_t grain
) {
    const int64_t most = num_items / (grain < 1 ? 1 : grain);
    const int threads = most < pool->size ? (int)most : pool->size;
    const int64_t pieces = (int64_t)PIECES_A_THREAD * threads, finest = (grain + 3) / 4;
    const int64_t enough = num_items / (finest < 1 ? 1 : finest);
    pool_run_pieces(pool, function, state, num_items, pieces < enough ? pieces : enough, threads);
}

Pool *pool_create(int num_threads) {
    Pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pool->size = num_threads;
    pool->running = 1;
    pool->owner = getpid();
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->workers = calloc((size_t)num_threads, sizeof *pool->workers);
    pool->shares = aligned_alloc(ALIGNMENT, (size_t)num_threads * sizeof *pool->shares);
    if (!pool->workers || !pool->shares) {
        pool_destroy(pool);
        return NULL;
    }
    for (int i = 0; i < num_threads; i++) pool->shares[i] = (Share){0};
    for (; pool->running < num_threads; pool->running++) {
        Worker *worker = &pool->workers[pool->running];
        *worker = (Worker){.pool = pool, .number = pool->running};
        if (pthread_create(&worker->thread, NULL, work, worker)) break;
    }
    return pool;
}

void pool_destroy(Pool *pool) {
    if (pool->running > 1 && getpid() == pool->owner) {
        atomic_store(&pool->stop, 1);
        wake_workers(pool);
        for (int i = 1; i < pool->running; i++) pthread_join(pool->workers[i].thread, NULL);
    }
    for (int i = 0; pool->shares && i < pool->size; i++) free(pool->shares[i].memory);
    free(pool->shares);
    free(pool->workers);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

int pool_size(const Pool *pool) { return pool->size; }

int pool_running(const Pool *pool) { return pool->running; }

float *pool_scratch(Pool *pool, int thread, size_t num_floats) {
    Share *share = &pool->shares[thread];
    if (share->num_floats < num_floats) {
        size_t bytes = (num_floats * sizeof(float) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        free(share->memory);
        share->memory = aligned_alloc(ALIGNMENT, bytes);
        share->num_floats = share->memory ? num_floats : 0;
        if (!share->memory) pool_out_of_memory(pool);
    }
    return share->memory;
}

int64_t *pool_held(Pool *pool, int thread) { return &pool->shares[thread].held; }

void pool_out_of_memory(Pool *pool) { atomic_store(&pool->short_of_memory, 1); }

int pool_take_error(Pool *pool) { return atomic_exchange(&pool->short_of_memory, 0); }

int pool_acquire(Pool *pool) { return atomic_exchange(&pool->taken, 1) == 0; }

void pool_release(Pool *pool) { atomic_store(&pool->taken, 0); }
