/* One pool of threads per rank: a handle, no static state. The calling thread works as well. */
#ifndef MINILLM_POOL_H
#define MINILLM_POOL_H

#include <stddef.h>
#include <stdint.h>

typedef struct Pool Pool;

/* Works on the range [start, stop) of the items, as thread number `thread` of the pool. Ranges may
   run on any thread and in any order: what a range computes must depend on the range alone. */
typedef void RangeFunction(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
);

/* Make a pool of up to `num_threads` threads, fewer if the system starts no more. NULL if memory is
   short. */
Pool *pool_create(int num_threads);
void pool_destroy(Pool *pool);

/* Threads asked for, and threads that run. */
int pool_size(const Pool *pool);
int pool_running(const Pool *pool);

/* Call `function` on contiguous ranges that cover 0 to `num_items`, for at most one thread per
   `grain` items. */
void pool_run(
    Pool *pool, RangeFunction *function, const void *state, int64_t num_items, int64_t grain
);

/* The same for `num_pieces` ranges of equal length. The first `threads` threads begin with equal
   shares of them. With one thread, there is one range. */
void pool_run_pieces(
    Pool *pool, RangeFunction *function, const void *state, int64_t num_items, int64_t num_pieces,
    int threads
);

/* Return `num_floats` floats on a 64-byte boundary, a thread's own until its next call; NULL if
   memory is short. */
float *pool_scratch(Pool *pool, int thread, size_t num_floats);

/* Return the function's note of what a thread's scratch holds. It may be set before a call. */
int64_t *pool_held(Pool *pool, int thread);

/* Remember that memory was short; module.c turns it into MemoryError. */
void pool_out_of_memory(Pool *pool);
int pool_take_error(Pool *pool);

/* Only one call at a time may use a pool: 1 if it was free and is now taken. */
int pool_acquire(Pool *pool);
void pool_release(Pool *pool);

#endif
