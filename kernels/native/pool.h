/* Thread pool, one per rank: a handle, no static state. The calling thread is a worker. */
#ifndef MINILLM_POOL_H
#define MINILLM_POOL_H

#include <stddef.h>
#include <stdint.h>

typedef struct Pool Pool;

/* Process the range [start, stop) of the items, as thread number `thread` of the pool. Ranges
   run on any thread and in any order: a range's result must depend on the range alone. */
typedef void RangeFunction(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
);

/* Make a pool of up to `num_threads` threads, fewer if the system starts no more. NULL if memory is
   short. */
Pool *pool_create(int num_threads);
void pool_destroy(Pool *pool);

/* Return the threads asked for, and the threads that run. */
int pool_size(const Pool *pool);
int pool_running(const Pool *pool);

/* Call `function` on contiguous ranges that cover 0 to `num_items`, for at most one thread per
   `grain` items. */
void pool_run(
    Pool *pool, RangeFunction *function, const void *state, int64_t num_items, int64_t grain
);

/* Call `function` on `num_pieces` ranges of equal length. The first `threads` threads start with
   equal shares of them. One thread gets a single range. */
void pool_run_pieces(
    Pool *pool, RangeFunction *function, const void *state, int64_t num_items, int64_t num_pieces,
    int threads
);

/* Return `num_floats` floats on a 64-byte boundary, valid until the thread's next call; NULL if
   memory is short. */
float *pool_scratch(Pool *pool, int thread, size_t num_floats);

/* Return the slot for the function's note on its scratch. A caller may set it before a call. */
int64_t *pool_held(Pool *pool, int thread);

/* Remember that memory was short; module.c turns it into MemoryError. */
void pool_out_of_memory(Pool *pool);
int pool_take_error(Pool *pool);

/* Take the pool, which serves one call at a time: 1 if it was free. */
int pool_acquire(Pool *pool);
void pool_release(Pool *pool);

#endif
