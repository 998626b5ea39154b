/* Micro-kernel of all matrix products: sums a TILE_ROWS x PANEL tile in registers along the
   depth.

        sum[r][:] += a[r][k] * panel[k][:]

   The right operand is packed into panels, [depth][PANEL] each. The left one is read in place,
   by any two strides. Every element is the sum over k in order, independent of the tile that
   holds it.

   Sources: Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication"; Van
   Zee and van de Geijn 2015, "BLIS: a framework for rapidly instantiating BLAS functionality". */
#ifndef MINILLM_TILE_H
#define MINILLM_TILE_H

#include <string.h>

#include "vector.h"

enum {
    PANEL = 2 * LANES,
    /* Fills the registers with 2 vectors per row: 32 of 64 bytes, or 16 of 32 or 16 bytes. */
    TILE_ROWS = VECTOR_BYTES == 64 ? 12 : 6,
};

INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Matrix with any strides, in elements. */
typedef struct {
    const float *start;
    int64_t row, column;
} Matrix;

/* Addend of a tile: the result so far, or with stride 0 one row for all. `start` may be NULL. */
typedef struct {
    const float *start;
    int64_t row;
} Addend;

/* Compute c [rows, vectors * LANES] = a [rows, depth] times a panel, plus the addend, which may
   be c. */
INLINE void tile_product(
    const int rows, const int vectors, int64_t depth, Matrix a, const float *panel, float *c,
    int64_t stride_c, Addend plus
) {
    Vector sum[TILE_ROWS][2] = {{{0}}};
#if VECTOR_BYTES == 64 /* others have too few registers for two steps at once */
#pragma GCC unroll 2
#endif
    for (int64_t k = 0; k < depth; k++) {
        const Vector left = load(panel + k * PANEL), right = load(panel + k * PANEL + LANES);
        const float *column = a.start + k * a.column;
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const float factor = column[r * a.row];
            sum[r][0] += left * factor;
            if (vectors == 2) sum[r][1] += right * factor;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            if (plus.start) sum[r][v] += load(plus.start + r * plus.row + v * LANES);
            store(c + r * stride_c + v * LANES, sum[r][v]);
        }
    }
}

/* Compute the product for 1 to TILE_ROWS rows, and 1 or 2 vectors. */
static void tile(
    int rows, int vectors, int64_t depth, Matrix a, const float *panel, float *c, int64_t stride_c,
    Addend plus
) {
    switch (rows) {
#define ROWS(n) \
    case n: \
        if (vectors == 2) \
            tile_product(n, 2, depth, a, panel, c, stride_c, plus); \
        else \
            tile_product(n, 1, depth, a, panel, c, stride_c, plus); \
        break;
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
#if VECTOR_BYTES == 64
        ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#endif
#undef ROWS
    }
}

/* Pack x [rows, columns] into panels of PANEL columns, [rows][PANEL] each; pad the last with
   zeros. */
static void pack(const float *x, int64_t stride, int64_t rows, int64_t columns, float *panels) {
    for (int64_t first = 0; first < columns; first += PANEL) {
        const int64_t n = least(PANEL, columns - first);
        for (int64_t row = 0; row < rows; row++, panels += PANEL) {
            const float *from = x + row * stride + first;
            if (n == PANEL) {
                store(panels, load(from));
                store(panels + LANES, load(from + LANES));
                continue;
            }
            memcpy(panels, from, (size_t)n * sizeof(float));
            for (int64_t i = n; i < PANEL; i++) panels[i] = 0;
        }
    }
}

/* Pack scale * x^T, x [rows, columns], into panels of PANEL rows of x, [columns][PANEL] each;
   pad the last with zeros. */
static void pack_transposed(
    const float *x, int64_t stride, int64_t rows, int64_t columns, float scale, float *panels
) {
    for (int64_t first = 0; first < rows; first += PANEL, panels += columns * PANEL) {
        const int64_t n = least(PANEL, rows - first);
        if (n < PANEL) memset(panels, 0, (size_t)(columns * PANEL) * sizeof(float));
        for (int64_t i = 0; i < n; i += LANES) {
            const float *from = x + (first + i) * stride;
            const int64_t whole = n - i >= LANES ? columns - columns % LANES : 0;
            for (int64_t column = 0; column < whole; column += LANES)
                transpose(from + column, stride, scale, panels + column * PANEL + i, PANEL);
            for (int64_t column = whole; column < columns; column++)
                for (int64_t j = i; j < least(n, i + LANES); j++)
                    panels[column * PANEL + j] = scale * x[(first + j) * stride + column];
        }
    }
}

#endif
