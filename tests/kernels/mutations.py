"""Bugs to plant into the CUDA kernels, as data: each is a plausible mistake."""

from __future__ import annotations

from dataclasses import dataclass

from minillm.kernels.emulator.examples import Sizes

# Two query heads on one key-value head; 200 times are two and more tiles and end within one.
ATTENTION = Sizes(T=200, heads=2, kv_heads=1, head_width=64)
# Keys enough that the ring of tiles comes round.
WIDE_ATTENTION = Sizes(T=600, heads=1, kv_heads=1, head_width=128)
LONG_ATTENTION = Sizes(T=520, heads=2, kv_heads=1, head_width=64)
# Key lengths and a window that hide whole tiles and parts of others: the last queries see nothing,
# some warpgroups of a block, and then others of the next part.
MASKED_ATTENTION = Sizes(
    T=450, batch=2, heads=2, kv_heads=1, head_width=64, padding=300, window=140
)
ROWS = Sizes(T=37, width=200)
WIDE_ROWS = Sizes(T=5, width=3000)


@dataclass(frozen=True)
class Mutation:
    """Planted bug: `old`, which stands once in `file`, becomes `new`.

    `file` is a path in kernels/. The bug is seen when `op` runs as `variant`.
    """

    name: str
    file: str
    old: str
    new: str
    op: str
    variant: str = "v1"
    sizes: Sizes = ATTENTION
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.file.rpartition('.')[0].replace('/', '-')}-{self.name.replace(' ', '-')}"


def _v1(name: str, old: str, new: str) -> Mutation:
    return Mutation(name, "attention/v1.cu", old, new, "attention_forward", dtype="float32")


def _v1_back(name: str, old: str, new: str, file: str = "v1.cu") -> Mutation:
    return Mutation(name, f"attention/{file}", old, new, "attention_backward", dtype="float32")


def _v2(name: str, old: str, new: str, file: str = "v2_forward.cu") -> Mutation:
    return Mutation(name, f"attention/{file}", old, new, "attention_forward", "v2")


def _v2_tiles(name: str, old: str, new: str) -> Mutation:
    return _v2(name, old, new, "v2_common.cuh")


def _v2_back(name: str, old: str, new: str) -> Mutation:
    return Mutation(name, "attention/v2_backward.cu", old, new, "attention_backward", "v2")


def _v3(
    name: str,
    old: str,
    new: str,
    file: str = "attention/v3_forward.cu",
    op: str = "attention_forward",
) -> Mutation:
    return Mutation(name, file, old, new, op, "v3", WIDE_ATTENTION)


def _v3_back(name: str, old: str, new: str) -> Mutation:
    file = "attention/v3_backward_keys.cuh"
    return Mutation(name, file, old, new, "attention_backward", "v3", LONG_ATTENTION)


def _masked(
    name: str, file: str, old: str, new: str, op: str = "attention_forward", variant: str = "v1"
) -> Mutation:
    dtype = "float32" if variant == "v1" else "bfloat16"
    return Mutation(name, f"attention/{file}", old, new, op, variant, MASKED_ATTENTION, dtype)


def _step(
    name: str, file: str, old: str, new: str, op: str, sizes: Sizes = ROWS, dtype: str = "bfloat16"
) -> Mutation:
    return Mutation(name, file, old, new, op, "v1", sizes, dtype)


MUTATIONS = [
    # ---- attention v1
    _v1(
        "mask off by one",
        "s[i][j] = key < keys[i].end &&",
        "s[i][j] = key <= keys[i].end &&",
    ),
    _v1("missing rescale", "sums[i][c] *= shrink;", "sums[i][c] *= 1;"),
    _v1(
        "missing barrier before tiles are overwritten",
        "__syncthreads();  // all reads of the tiles are done",
        "",
    ),
    _v1("missing barrier after tiles are written", "__syncthreads();  // all has been written", ""),
    _v1("missing warp barrier", "__syncwarp();  // a row's scores come from this warp", ""),
    _v1("row beyond the end", "if (row >= end) return;", "if (row > end) return;"),
    _v1_back(
        "queries begin a tile too late",
        "return {causal ? first : 0, num_queries};",
        "return {causal ? first + rows : 0, num_queries};",
        "common.cuh",
    ),
    _v1_back(
        "queries of one head of a group only",
        "h < (kv_head + 1) * group; h++)",
        "h < kv_head * group + 1; h++)",
    ),
    _v1_back(
        "scores in the place of their gradients",
        "add_weighted_rows(k_sums, grad_scores, q_tile);",
        "add_weighted_rows(k_sums, scores, q_tile);",
    ),
    _v1_back(
        "row of statistics without its padding",
        "const int64_t at = int64_t(row_of_head) * padded",
        "const int64_t at = int64_t(row_of_head) * a.num_queries",
    ),
    # ---- attention v2
    _v2_tiles(
        "values read without swizzle",
        "ldmatrix_x4_trans(right, tile + further(at, c / 2));",
        "ldmatrix_x4_trans(right, tile + (first + LANE % 16) * 64 + 8 * (c + LANE / 16));",
    ),
    _v2_tiles("mask off by one", "if (8 * n + e >= end ||", "if (8 * n + e > end ||"),
    _v2("missing rescale", "sums[m][c][e] *= shrink[e / 2];", ";"),
    _v2("sum not rescaled", "of.l[m][half] * shrink[half] + sum", "of.l[m][half] + sum"),
    _v2(
        "wrong lane in the maximum",
        "return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));",
        "return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 4));",
    ),
    _v2("lane missing in the sum", "return x + __shfl_xor_sync(0xffffffffu, x, 2);", "return x;"),
    _v2(
        "missing barrier",
        "__syncthreads();  // this tile has arrived, and reads of the other are done",
        "",
    ),
    _v2(
        "copy not waited for",
        "cp_async_wait<0>();\n        __syncthreads();  // this tile",
        "cp_async_wait<1>();\n        __syncthreads();  // this tile",
    ),
    _v2("one buffer instead of two", "key += LOOP, buffer ^= 1) {", "key += LOOP, buffer ^= 0) {"),
    _v2_tiles(
        "missing warp barrier",
        "    __syncwarp();\n    for (int i = LANE; i < 16 * M * CHUNKS;",
        "    for (int i = LANE; i < 16 * M * CHUNKS;",
    ),
    _v2_tiles(
        "row read beyond the end",
        "const bool inside = first + row + r < end;",
        "const bool inside = first + row + r <= end;",
    ),
    _v2_tiles("row written beyond the end", "if (row + r < end)", "if (row + r <= end)"),
    _v2_tiles(
        "halves of a fragment exchanged",
        "place(first + LANE % 16, LANE / 16), step)",
        "place(first + LANE % 16, 1 - LANE / 16), step)",
    ),
    _v2_tiles(
        "group of chunks forgotten",
        "+ 8 * EXCHANGED * (step / STEPS_A_GROUP)",
        "+ 8 * EXCHANGED * (step % STEPS_A_GROUP)",
    ),
    _v2_back(
        "statistics of the other buffer",
        "const int at = buffer * LOOP + slice;",
        "const int at = slice;",
    ),
    _v2_back("queries of one head of a group only", "steps = group * tiles;", "steps = tiles;"),
    _v2_back("probability without its shift", "exp2_(p * scale - lse_2)", "exp2_(p * scale)"),
    _v2_back(
        "mask transposed",
        "if (16 * m + 8 * half >= end ||",
        "if (16 * m + 8 * half > end ||",
    ),
    _v2_back(
        "gradient not lowered by delta",
        "before * (grad_s * factor - delta)",
        "before * (grad_s * factor)",
    ),
    _v2_back("padding of queries not copied", "if (i < LOOP / 4) {", "if (i < LOOP / 8) {"),
    # ---- attention v3
    _v3(
        "wrong phase of an empty buffer",
        "mbarrier_wait(&shared.k_empty[at.stage], at.parity ^ 1);",
        "mbarrier_wait(&shared.k_empty[at.stage], at.parity);",
        "attention/v3_common.cuh",
    ),
    _v3(
        "wrong phase of the queries",
        "mbarrier_wait(&shared.q_full, round % 2);",
        "mbarrier_wait(&shared.q_full, round % 2 ^ 1);",
    ),
    _v3(
        "fewer bytes expected than come",
        "mbarrier_expect(&shared.k_full[at.stage], sizeof(Tile<KEYS>));",
        "mbarrier_expect(&shared.k_full[at.stage], sizeof(Tile<KEYS>) / 2);",
        "attention/v3_common.cuh",
    ),
    _v3(
        "more bytes expected than come",
        "mbarrier_expect(&shared.v_full[at.stage], sizeof(Tile<KEYS>));",
        "mbarrier_expect(&shared.v_full[at.stage], 2 * sizeof(Tile<KEYS>));",
        "attention/v3_common.cuh",
    ),
    _v3(
        "values used before they are there",
        "        mbarrier_wait(&shared.v_full[at.stage], at.parity);\n        start_sum",
        "        start_sum",
    ),
    _v3(
        "values given back while they are read",
        "        wait_for<0>(out);\n        release(&shared.v_empty[at.stage]);\n        rescale",
        "        release(&shared.v_empty[at.stage]);\n        wait_for<0>(out);\n        rescale",
    ),
    _v3(
        "sums read while they are computed",
        "        wait_for<0>(out);\n        release",
        "        release",
    ),
    _v3(
        "values never given back",
        "        wait_for<0>(out);\n        release(&shared.v_empty[at.stage]);\n        rescale",
        "        wait_for<0>(out);\n        rescale",
    ),
    _v3("missing rescale", "out[i] *= correction[i / 2 % 2];", ";"),
    _masked(
        "mask off by one",
        "v3_common.cuh",
        "column >= (i / 2 % 2 ? end_1 : end_0)",
        "column > (i / 2 % 2 ? end_1 : end_0)",
        variant="v3",
    ),
    _v3(
        "lane missing in the maximum",
        "        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));\n",
        "",
    ),
    _v3(
        "too few arrivals for an mbarrier",
        "mbarrier_init(&shared.q_empty, CONSUMERS * WARPS_PER_GROUP);",
        "mbarrier_init(&shared.q_empty, 1);",
    ),
    _v3("mbarriers not announced to the copy engine", "        fence_barrier_init();\n", ""),
    _v3(
        "mbarriers used before they are made",
        "    __syncthreads();\n    const int group",
        "    const int group",
    ),
    _v3(
        "tile stored before the fence", "    fence_async_proxy();\n", "", "attention/v3_common.cuh"
    ),
    _v3(
        "tile stored before all have written",
        "    fence_async_proxy();\n    named_barrier_sync(barrier, 128);",
        "    fence_async_proxy();",
        "attention/v3_common.cuh",
    ),
    _v3(
        "tile overwritten while it is stored",
        "    if (leader) tma_wait_read<OTHERS>();",
        "    if (false) tma_wait_read<OTHERS>();",
        "attention/v3_common.cuh",
    ),
    _v3(
        "wrong swizzle",
        "(column % PANEL_COLUMNS / 8) ^ (row % 8)",
        "(column % PANEL_COLUMNS / 8) ^ (row / 2 % 8)",
        "gpu/include/tiles.cuh",
    ),
    _v3(
        "wrong stride in a descriptor",
        "ROWS * PANEL_ROW_BYTES, PANEL_EIGHT_ROWS, SWIZZLE",
        "PANEL_EIGHT_ROWS, PANEL_EIGHT_ROWS, SWIZZLE",
        "gpu/include/tiles.cuh",
    ),
    _v3(
        "panel forgotten in a step",
        "return k / 4 * ROWS * PANEL_ROW_BYTES + k % 4 * 32;",
        "return k * 32;",
        "gpu/include/tiles.cuh",
    ),
    _v3(
        "half a step along the rows",
        "return k * 16 * PANEL_ROW_BYTES;",
        "return k * 8 * PANEL_ROW_BYTES;",
        "gpu/include/tiles.cuh",
    ),
    _v3(
        "rescaled only if every row has a new top",
        "if (!__any_sync(0xffffffffu, correction",
        "if (!__all_sync(0xffffffffu, correction",
    ),
    _masked(
        "log-sum-exp before the first query",
        "v3_forward.cu",
        "unsigned(query) < unsigned(p.num_queries)",
        "query < p.num_queries",
        variant="v3",
    ),
    _v3_back(
        "mask off by one", "if (i / 4 * 8 + i % 2 < distance", "if (i / 4 * 8 + i % 2 <= distance"
    ),
    _v3_back(
        "tile overwritten while it is stored",
        "store_rows<1>(grad_k_map",
        "store_rows<2>(grad_k_map",
    ),
    _v3_back(
        "statistics not expected",
        "sizeof(Tile<QUERIES>) + sizeof(shared.statistics[0]));",
        "sizeof(Tile<QUERIES>));",
    ),
    _v3_back(
        "queries given back while they are read",
        "    wait_for<0>(grad_k);\n    release(&shared.q_empty[at.stage]);",
        "    release(&shared.q_empty[at.stage]);\n    wait_for<0>(grad_k);",
    ),
    # ---- visible keys
    *(
        _masked(f"{name} in {variant}", "common.cuh", old, new, variant=variant)
        for variant in ("v1", "v2", "v3")
        for name, old, new in (
            ("document a key late", "{keys.v[0], keys.v[1]};", "{keys.v[0] + 1, keys.v[1]};"),
            ("window a key wide", "{keys.v[0], keys.v[1]};", "{max(keys.v[0] - 1, 0), keys.v[1]};"),
            ("length with <=", "{keys.v[0], keys.v[1]};", "{keys.v[0], keys.v[1] + 1};"),
            ("first tile left out", "min(seen.first, of.v[0])", "max(seen.first % 450, of.v[0])"),
            ("tile taken for clear", "key < open || key + n", "key + n"),
        )
        if (variant, name) != ("v1", "tile taken for clear")  # v1 compares every key
    ),
    *(
        _masked(f"{name} in {variant}", "common.cuh", old, new, "attention_backward", variant)
        for variant in ("v1", "v2", "v3")
        for name, old, new in (
            ("last reader left out", "max(queries.end, of.v[1])", "max(queries.end, of.v[1] - 16)"),
            ("readers of half the keys", "key < min(first + rows, num_keys)", "key < first + 16"),
        )
    ),
    _masked(
        "own first key hidden",
        "v1.cu",
        "key >= keys[i].first ? score(",
        "key > keys[i].first ? score(",
    ),
    _masked(
        "earlier keys seen", "v1.cu", " || key < query.keys.first) {", ") {", "attention_backward"
    ),
    _masked("earlier keys seen", "v2_common.cuh", " || 8 * n + e < first)", ")", variant="v2"),
    _masked(
        "later queries seen",
        "v2_backward.cu",
        " || 16 * m + 8 * half < first)",
        ")",
        "attention_backward",
        "v2",
    ),
    _masked(
        "earlier keys seen",
        "v3_common.cuh",
        " || column < (i / 2 % 2 ? first_1 : first_0))",
        ")",
        variant="v3",
    ),
    _masked(
        "last tile left out",
        "v3_common.cuh",
        "end_tile = max(num_blocks(seen.end, KEYS), first_tile);",
        "end_tile = max(seen.end / KEYS, first_tile);",
        "attention_backward",
        "v3",
    ),
    _masked(
        "bounds of another query",
        "v3_backward_keys.cuh",
        "2 * (first_query + accumulator_column());",
        "2 * first_query;",
        "attention_backward",
        "v3",
    ),
    _masked(
        "turn for a first tile",
        "v3_forward.cu",
        "if (i > 0) await_turn(consumer);",
        "await_turn(consumer);",
        variant="v3",
    ),
    _masked(
        "queries kept by those who see nothing",
        "v3_forward.cu",
        "release(&shared.q_empty);  // these queries see none of the keys",
        ";",
        variant="v3",
    ),
    # ---- the rest of a training step
    _step(
        "warp sum of half the lanes",
        "gpu/include/cuda.cuh",
        "distance > 0; distance /= 2)\n        x += __shfl",
        "distance > 1; distance /= 2)\n        x += __shfl",
        "layernorm_forward",
    ),
    _step(
        "missing barrier in a block sum",
        "gpu/include/vectors.cuh",
        "    if (LANE == 0) shared[WARP] = x;\n    __syncthreads();",
        "    if (LANE == 0) shared[WARP] = x;",
        "rmsnorm_forward",
        WIDE_ROWS,
    ),
    _step(
        "variance of columns beyond the end",
        "layernorm/v1.cu",
        "if (column(r) + i < D) squares",
        "squares",
        "layernorm_forward",
        dtype="float32",
    ),
    _step(
        "partial sums of rows race",
        "gpu/include/norms.cuh",
        "        }\n        __syncthreads();\n",
        "        }\n",
        "layernorm_backward",
    ),
    _step(
        "missing barrier in a column sum",
        "matmul/column_sum.cu",
        "    __syncthreads();\n",
        "",
        "column_sum",
    ),
    _step(
        "target overwritten before it is read",
        "softmax_xent/v1.cu",
        "    __syncthreads();\n    float sum = 0.0f;",
        "    float sum = 0.0f;",
        "xent_shifted_sum_",
        WIDE_ROWS,
    ),
    _step(
        "target written too early",
        "softmax_xent/v1.cu",
        "v[i] *= factor;\n        store_floats(row + c, v, V - c);\n    }\n    __syncthreads();",
        "v[i] *= factor;\n        store_floats(row + c, v, V - c);\n    }",
        "xent_grad_",
        WIDE_ROWS,
    ),
    _step(
        "missing barrier in a tree of sums",
        "grad_norm/v1.cu",
        "shared[threadIdx.x + half];\n        __syncthreads();",
        "shared[threadIdx.x + half];",
        "sum_of_squares",
    ),
    _step(
        "barrier in a branch",
        "grad_norm/v1.cu",
        "shared[threadIdx.x + half];\n        __syncthreads();",
        "shared[threadIdx.x + half], __syncthreads();",
        "sum_of_squares",
    ),
    _step(
        "run cut one too late",
        "gpu/include/vectors.cuh",
        "if (i < left) to[i]",
        "if (i <= left) to[i]",
        "add",
        Sizes(T=3, width=333),
    ),
    _step(
        "wide access from an odd place",
        "gpu/include/vectors.cuh",
        "return left >= N && (uint64_t)from % Run<T, N>::BYTES == 0;",
        "return left >= N;",
        "rope_",
        Sizes(head_width=36),
    ),
    _step(
        "turned the wrong way",
        "rope/v1.cu",
        "u[i] * cosine[i] - v[i] * sign * sine[i]",
        "u[i] * cosine[i] + v[i] * sign * sine[i]",
        "rope_",
    ),
    _step(
        "token of the next id added",
        "embedding/v1.cu",
        "i < end && sorted[i] == sorted[start]",
        "i < end && sorted[i] <= sorted[start] + 1",
        "embedding_backward_",
    ),
    _step(
        "two moments mixed up",
        "adamw/v1.cu",
        "v[i] = beta2 * v[i]",
        "v[i] = beta1 * v[i]",
        "adamw_",
        dtype="float32",
    ),
]
