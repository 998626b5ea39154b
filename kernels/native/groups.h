/* Deterministic sums: any thread may add any group, and the groups are added in one order.

   The items are cut into parts, and each part into groups of equal size; the last of a part may
   be shorter. Each group's sum has its own slot. At the end the sums of a part are added in
   order, then the parts. */
#ifndef MINILLM_GROUPS_H
#define MINILLM_GROUPS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "pool.h"
#include "vector.h"

typedef struct {
    int64_t num_items, size, num_parts, in_part; /* in_part: groups in the longest part */
} Groups;

/* Return at most `most` parts, each of at least `grain` items. */
INLINE Groups groups_of(int64_t num_items, int64_t size, int64_t most, int64_t grain) {
    const int64_t enough = num_items / grain, parts = enough < most ? enough : most;
    const int64_t num_parts = parts < 1 ? 1 : parts;
    const int64_t longest = (num_items + num_parts - 1) / num_parts;
    return (Groups){num_items, size, num_parts, (longest + size - 1) / size};
}

/* Items [start, stop) of a group; empty if a part has fewer groups than the longest. */
typedef struct {
    int64_t start, stop;
} Group;

INLINE Group group_at(const Groups *g, int64_t number) {
    const int64_t part = number / g->in_part;
    const int64_t end = g->num_items * (part + 1) / g->num_parts;
    const int64_t start = g->num_items * part / g->num_parts + number % g->in_part * g->size;
    return (Group){start < end ? start : end, start + g->size < end ? start + g->size : end};
}

/* Allocate `width` sums per group; NULL if memory is short. */
INLINE float *groups_memory(Pool *pool, const Groups *g, int64_t width) {
    const size_t size = (size_t)(g->num_parts * g->in_part * width) * sizeof(float);
    float *sums = malloc(size ? size : 1);
    if (!sums) pool_out_of_memory(pool);
    return sums;
}

/* Sums of all groups, [parts, groups, width], and their total [width]. */
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
    const int64_t in_part = t->groups->in_part, width = t->width;
    enum { COLUMNS = 256 };
    for (int64_t column = start; column < stop; column += COLUMNS) {
        const int64_t n = stop - column < COLUMNS ? stop - column : COLUMNS;
        memset(t->total + column, 0, (size_t)n * sizeof(float));
        for (int64_t part = 0; part < t->groups->num_parts; part++) {
            float sum[COLUMNS] = {0};
            for (int64_t group = part * in_part; group < (part + 1) * in_part; group++)
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
