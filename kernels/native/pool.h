/* One pool of threads per rank: a handle, no static state. The calling thread works too. */
#ifndef MINILLM_POOL_H
#define MINILLM_POOL_H

#include <stddef.h>
#include <stdint.h>

typedef struct Pool Pool;

/* Works on the range [start, stop) of the items, as thread number `thread` of the pool. */
typedef void RangeFunction(Pool *pool, const void *state, int64_t start, int64_t stop, int thread);

/* NULL if memory or threads cannot be had. */
Pool *pool_create(int num_threads);
void pool_destroy(Pool *pool);
int pool_size(const Pool *pool);

/* Call `function` on contiguous ranges that cover 0 to `num_items`, at most one per thread and each of at least `grain` items. The cut
   depends on the numbers alone, so that results repeat. Range i is always run by thread i. */
void pool_run(Pool *pool, RangeFunction *function, const void *state, int64_t num_items, int64_t grain);

/* `num_floats` floats on a 64-byte boundary that belong to one thread until its next call; NULL if memory is short. */
float *pool_scratch(Pool *pool, int thread, size_t num_floats);

/* Remember that memory was short; module.c turns it into MemoryError. */
void pool_out_of_memory(Pool *pool);
int pool_take_error(Pool *pool);

/* Only one call at a time may use a pool: 1 if it was free and is now taken. */
int pool_acquire(Pool *pool);
void pool_release(Pool *pool);

#endif
