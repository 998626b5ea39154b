/* Deterministic sums: any thread may add any group, and the groups are added in one order.

   A group is a fixed number of items, so the number of threads changes no bit. Each group's sum
   has its own slot. At the end the sums of 64 groups are added in order, then those sums: many
   short sums round less than a long one. */
#ifndef MINILLM_GROUPS_H
#define MINILLM_GROUPS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "pool.h"
#include "vector.h"

typedef struct {
    int64_t num_items, size, number; /* items, items of a group (the last may be shorter), groups */
} Groups;

INLINE Groups groups_of(int64_t num_items, int64_t size) {
    return (Groups){num_items, size, (num_items + size - 1) / size};
}

/* Items [start, stop) of a group. */
typedef struct {
    int64_t start, stop;
} Group;

INLINE Group group_at(const Groups *g, int64_t number) {
    const int64_t start = number * g->size, stop = start + g->size;
    return (Group){start, stop < g->num_items ? stop : g->num_items};
}

/* Allocate `width` sums per group; NULL if memory is short. */
INLINE float *groups_memory(Pool *pool, const Groups *g, int64_t width) {
    const size_t size = (size_t)(g->number * width) * sizeof(float);
    float *sums = malloc(size ? size : 1);
    if (!sums) pool_out_of_memory(pool);
    return sums;
}

/* Sums of all groups [groups, width], and their total [width]. */
typedef struct {
    const Groups *groups;
    const float *sums;
    float *total;
    int64_t width;
} GroupTotal;

static void add_groups_columns(
    Pool *pool, const void *state, int64_t start, int64_t stop, int thread
) {
    const GroupTotal *t = state;
    const int64_t number = t->groups->number, width = t->width;
    enum { COLUMNS = 256, TOGETHER = 64 };
    for (int64_t column = start; column < stop; column += COLUMNS) {
        const int64_t n = stop - column < COLUMNS ? stop - column : COLUMNS;
        memset(t->total + column, 0, (size_t)n * sizeof(float));
        for (int64_t first = 0; first < number; first += TOGETHER) {
            const int64_t last = first + TOGETHER < number ? first + TOGETHER : number;
            float sum[COLUMNS] = {0};
            for (int64_t group = first; group < last; group++)
                add_to(sum, t->sums + group * width + column, n);
            add_to(t->total + column, sum, n);
        }
    }
}

static void add_groups(
    Pool *pool, const Groups *groups, const float *sums, int64_t width, float *total
) {
    const GroupTotal state = {groups, sums, total, width};
    pool_run(pool, add_groups_columns, &state, width, 2048);
}

#endif
