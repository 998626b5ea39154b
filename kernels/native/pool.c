/* Threads that spin for about 0.3 ms, then sleep: a training step calls a kernel every few hundred microseconds, so the next call usually finds
   them awake, and between steps they cost nothing. */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

enum { SPINS = 6000, YIELDS = 50, ALIGNMENT = 64 };

typedef struct {
    Pool *pool;
    int number;
    pthread_t thread;
} Worker;

typedef struct {
    float *memory;
    size_t num_floats;
} Scratch;

struct Pool {
    int size;
    pid_t owner; /* a forked child has none of the threads */
    Worker *workers;
    Scratch *scratch;
    atomic_int taken, short_of_memory;

    /* The current call: written before `generation` moves on, read after. */
    RangeFunction *function;
    const void *state;
    int64_t num_items;
    int num_parts;

    atomic_uint generation;
    atomic_int pending; /* workers that have not finished the current call */
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

static void run_part(Pool *pool, int part) {
    int64_t start = pool->num_items * part / pool->num_parts, stop = pool->num_items * (part + 1) / pool->num_parts;
    pool->function(pool, pool->state, start, stop, part);
}

static unsigned wait_for_call(Pool *pool, unsigned seen) {
    for (int i = 0; i < SPINS + YIELDS; i++) {
        unsigned generation = atomic_load(&pool->generation);
        if (generation != seen) return generation;
        if (i < SPINS)
            pause_briefly();
        else
            sched_yield();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->sleepers, 1); /* before the last look at `generation`, which the caller moves before it looks for sleepers */
    while (atomic_load(&pool->generation) == seen) pthread_cond_wait(&pool->wake, &pool->lock);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->lock);
    return atomic_load(&pool->generation);
}

static void *work(void *argument) {
    Worker *worker = argument;
    Pool *pool = worker->pool;
    for (unsigned seen = 0;;) {
        seen = wait_for_call(pool, seen);
        if (atomic_load(&pool->stop)) return NULL;
        if (worker->number < pool->num_parts) run_part(pool, worker->number);
        if (atomic_fetch_sub(&pool->pending, 1) == 1 && atomic_load(&pool->caller_sleeps)) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->lock);
        }
    }
}

static void start_call(Pool *pool) {
    atomic_store(&pool->pending, pool->size - 1);
    atomic_fetch_add(&pool->generation, 1);
    if (atomic_load(&pool->sleepers)) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->lock);
    }
}

static void finish_call(Pool *pool) {
    for (int i = 0; i < SPINS + YIELDS; i++) {
        if (!atomic_load(&pool->pending)) return;
        if (i < SPINS)
            pause_briefly();
        else
            sched_yield();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->caller_sleeps, 1);
    while (atomic_load(&pool->pending)) pthread_cond_wait(&pool->done, &pool->lock);
    atomic_store(&pool->caller_sleeps, 0);
    pthread_mutex_unlock(&pool->lock);
}

void pool_run(Pool *pool, RangeFunction *function, const void *state, int64_t num_items, int64_t grain) {
    int64_t parts = num_items / (grain < 1 ? 1 : grain);
    if (num_items <= 0) return;
    if (parts > pool->size) parts = pool->size;
    if (parts <= 1 || getpid() != pool->owner) {
        function(pool, state, 0, num_items, 0);
        return;
    }
    pool->function = function;
    pool->state = state;
    pool->num_items = num_items;
    pool->num_parts = (int)parts;
    start_call(pool);
    run_part(pool, 0);
    finish_call(pool);
}

Pool *pool_create(int num_threads) {
    Pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pool->size = 1;
    pool->owner = getpid();
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->workers = calloc((size_t)num_threads, sizeof *pool->workers);
    pool->scratch = calloc((size_t)num_threads, sizeof *pool->scratch);
    if (!pool->workers || !pool->scratch) {
        pool_destroy(pool);
        return NULL;
    }
    for (; pool->size < num_threads; pool->size++) {
        Worker *worker = &pool->workers[pool->size];
        *worker = (Worker){.pool = pool, .number = pool->size};
        if (pthread_create(&worker->thread, NULL, work, worker)) {
            pool_destroy(pool);
            return NULL;
        }
    }
    return pool;
}

void pool_destroy(Pool *pool) {
    if (pool->workers && getpid() == pool->owner) {
        atomic_store(&pool->stop, 1);
        start_call(pool);
        for (int i = 1; i < pool->size; i++) pthread_join(pool->workers[i].thread, NULL);
    }
    for (int i = 0; pool->scratch && i < pool->size; i++) free(pool->scratch[i].memory);
    free(pool->scratch);
    free(pool->workers);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

int pool_size(const Pool *pool) { return pool->size; }

float *pool_scratch(Pool *pool, int thread, size_t num_floats) {
    Scratch *scratch = &pool->scratch[thread];
    if (scratch->num_floats < num_floats) {
        size_t bytes = (num_floats * sizeof(float) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        free(scratch->memory);
        scratch->memory = aligned_alloc(ALIGNMENT, bytes);
        scratch->num_floats = scratch->memory ? num_floats : 0;
        if (!scratch->memory) pool_out_of_memory(pool);
    }
    return scratch->memory;
}

void pool_out_of_memory(Pool *pool) { atomic_store(&pool->short_of_memory, 1); }

int pool_take_error(Pool *pool) { return atomic_exchange(&pool->short_of_memory, 0); }

int pool_acquire(Pool *pool) { return atomic_exchange(&pool->taken, 1) == 0; }

void pool_release(Pool *pool) { atomic_store(&pool->taken, 0); }
