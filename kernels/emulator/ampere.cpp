// The instructions of ampere.cuh: asynchronous copies, ldmatrix and the tensor cores.
#include <cstdio>
#include <cstring>
#include <deque>
#include <vector>

#include "ampere.h"
#include "elements.h"
#include "runtime.h"

namespace emulator {

// ---- cp.async: copied at the wait, not earlier

struct Copy {
    void* to;
    const void* from;
    int bytes;
};
struct Copies {
    std::vector<Copy> open;  // not committed yet
    std::deque<std::vector<Copy>> groups;
};
static std::vector<Copies> copies;  // by thread

static void forget_copies() { copies.assign(num_threads(), {}); }
static Registration registration(nullptr, forget_copies);

void cp_async(void* shared, const void* global, int bytes) {
    const Site site = EMULATOR_SITE;
    if (bytes < 0 || bytes > 16)
        fail("wrong operand", site, "cp_async_16 copies 0 to 16 bytes, and this asks for %d",
             bytes);
    require_shared(shared, 16, site, "the target of cp_async_16");
    require_aligned(shared, 16, site);
    require_aligned(global, 16, site);
    if (bytes) {
        require_global(global, bytes, site, "the source of cp_async_16");
        read(global, bytes, site);
    }
    write(shared, 16, site);
    mark_in_flight(shared, 16, site);
    copies[thread()].open.push_back({shared, global, bytes});
}

void cp_async_commit() {
    Copies& mine = copies[thread()];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}

void cp_async_wait(int still_under_way) {
    Copies& mine = copies[thread()];
    const Site site = EMULATOR_SITE;
    for (; static_cast<int>(mine.groups.size()) > still_under_way; mine.groups.pop_front()) {
        for (const Copy& copy : mine.groups.front()) {
            write_landed(copy.to, 16, site);
            memset(copy.to, 0, 16);
            memcpy(copy.to, copy.from, copy.bytes);
        }
    }
}

// ---- ldmatrix

struct Ldmatrix {
    uint32_t* to;
    const char* row;
    Site site;
};

template <int COUNT, bool TRANSPOSE> static void execute_ldmatrix(void** operands, unsigned, int) {
    const Ldmatrix* const* lanes = reinterpret_cast<const Ldmatrix* const*>(operands);
    uint16_t matrix[COUNT][8][8];
    for (int i = 0; i < COUNT * 8; i++) memcpy(matrix[i / 8][i % 8], lanes[i]->row, 16);
    for (int lane = 0; lane < WARP_SIZE; lane++) {
        for (int m = 0; m < COUNT; m++) {
            const int i = lane / 4, j = lane % 4 * 2;
            const uint32_t low = TRANSPOSE ? matrix[m][j][i] : matrix[m][i][j];
            const uint32_t high = TRANSPOSE ? matrix[m][j + 1][i] : matrix[m][i][j + 1];
            lanes[lane]->to[m] = low | high << 16;
        }
    }
}

template <int COUNT, bool TRANSPOSE> static void ldmatrix_of(uint32_t* to, const void* row,
                                                             Site site, const char* name) {
    if (thread() % WARP_SIZE < COUNT * 8) {
        require_shared(row, 16, site, "a row of ldmatrix");
        require_aligned(row, 16, site);
        read(row, 16, site);
    }
    Ldmatrix mine{to, static_cast<const char*>(row), site};
    warp_collective(name, site, ~0u, &mine, execute_ldmatrix<COUNT, TRANSPOSE>);
}

void ldmatrix(uint32_t* to, const void* row, int count, bool transpose) {
    const Site site = EMULATOR_SITE;
    if (count == 4 && transpose) return ldmatrix_of<4, true>(to, row, site, "ldmatrix_x4_trans");
    if (count == 4) return ldmatrix_of<4, false>(to, row, site, "ldmatrix_x4");
    if (transpose) return ldmatrix_of<2, true>(to, row, site, "ldmatrix_x2_trans");
    return ldmatrix_of<2, false>(to, row, site, "ldmatrix_x2");
}

// ---- mma

struct Mma {
    float* d;
    const uint32_t *a, *b;
};

// The 16 bits of register `both` at `half`, as a float.
template <typename T> static float half_of(uint32_t both, int half) {
    T element;
    element.bits = static_cast<uint16_t>(half ? both >> 16 : both);
    return to_float(element);
}

template <typename T> static void execute_mma(void** operands, unsigned, int) {
    const Mma* const* lanes = reinterpret_cast<const Mma* const*>(operands);
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < WARP_SIZE; lane++) {
        const int row = lane / 4, column = lane % 4 * 2;
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 4; i++)
                a[row + 8 * (i % 2)][column + 8 * (i / 2) + half] =
                    half_of<T>(lanes[lane]->a[i], half);
            for (int i = 0; i < 2; i++)
                b[column + 8 * i + half][row] = half_of<T>(lanes[lane]->b[i], half);
        }
        for (int i = 0; i < 4; i++) d[row + 8 * (i / 2)][column + i % 2] = lanes[lane]->d[i];
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < WARP_SIZE; lane++)
        for (int i = 0; i < 4; i++)
            lanes[lane]->d[i] = d[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2];
}

void mma(float* d, const uint32_t* a, const uint32_t* b, bool is_bfloat16) {
    Mma mine{d, a, b};
    warp_collective("mma_16x8x16", EMULATOR_SITE, ~0u, &mine,
                    is_bfloat16 ? execute_mma<bfloat16> : execute_mma<float16>);
}

}  // namespace emulator
