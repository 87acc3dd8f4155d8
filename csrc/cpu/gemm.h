// The one matrix product of the CPU kernels, in float or double: k in order, a separate multiply and add, vectors
// across columns.
#pragma once

#include "cpu/simd.h"

namespace mtlora::cpu::MTLORA_ISA {

// A register tile is MR rows of VECS vectors, of 32 or 16 registers. Measured on a Zen 4 core, of 57 GMAC/s that a
// multiply and an add a cycle give: AVX-512 16 x 1 57, 14 x 1 57, 8 x 1 51, 20 x 1 45, 6 x 2 39, 12 x 2 39 (beside
// one vector the compiler broadcasts a[i, p] inside the multiply, beside two it spends an instruction on it);
// AVX2 6 x 2 53, 4 x 2 51, 8 x 1 42, 8 x 2 35.
#if defined(__AVX512F__)
constexpr int MR = 16, VECS = 1;
#else
constexpr int MR = 6, VECS = 2;
#endif
template <class T>
constexpr int TILE = VECS * WIDTH<T>;
constexpr int NR = TILE<float>;

// Scratch rows hold whole register tiles, and their pitch is an odd number of cache lines, so that a column of
// tiles spreads over all sets of the L1 cache.
static inline int64_t pitch(int64_t cols) {
    return round_up(cols, 32) + 16;
}

template <int ROWS, int COLS, class T>
static void tile(int64_t k, const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, T* c, int64_t ldc,
                 bool resume) {
    Vector<T> acc[ROWS][COLS];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLS; ++j) acc[i][j] = resume ? load(c + i * ldc + j * WIDTH<T>) : Vector<T>{};
    for (int64_t p = 0; p < k; ++p) {
        Vector<T> columns[COLS];
        for (int j = 0; j < COLS; ++j) columns[j] = load(b + j * WIDTH<T>);
        for (int i = 0; i < ROWS; ++i)
            for (int j = 0; j < COLS; ++j) acc[i][j] += a[i * a_row] * columns[j];
        a += a_k;
        b += ldb;
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLS; ++j) store(c + i * ldc + j * WIDTH<T>, acc[i][j]);
}

template <int ROWS, int COLS, class T>
static inline void tile_of(int64_t rows, int64_t k, const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb,
                           T* c, int64_t ldc, bool resume) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return tile_of<ROWS - 1, COLS>(rows, k, a, a_row, a_k, b, ldb, c, ldc, resume);
    }
    tile<ROWS, COLS>(k, a, a_row, a_k, b, ldb, c, ldc, resume);
}

// c [m, n] = sum over k of a[i, p] b[p, j], continuing from c when resume, so that K may come in blocks.
// a[i, p] is at a + i * a_row + p * a_k. Rows of b and c are read and written up to a multiple of TILE<T> columns.
template <class T>
static void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t ldb, T* c,
                 int64_t ldc, bool resume) {
    const int64_t step = ceil_div(m, ceil_div(m, MR));  // tiles of about equal height
    for (int64_t j = 0; j < n; j += TILE<T>) {
        for (int64_t i = 0; i < m; i += step) {
            const int64_t rows = min(step, m - i);
            const T* a_i = a + i * a_row;
            T* c_ij = c + i * ldc + j;
            if (VECS == 1 || n - j <= WIDTH<T>) {
                tile_of<MR, 1>(rows, k, a_i, a_row, a_k, b + j, ldb, c_ij, ldc, resume);
            } else {
                tile_of<MR, VECS>(rows, k, a_i, a_row, a_k, b + j, ldb, c_ij, ldc, resume);
            }
        }
    }
}

// ---- Transposition ----

#if defined(__AVX512F__)
constexpr ivec kInterleaveLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
constexpr ivec kInterleaveHigh = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
#elif defined(__AVX2__)
constexpr ivec kInterleaveLow = {0, 8, 1, 9, 2, 10, 3, 11};
constexpr ivec kInterleaveHigh = {4, 12, 5, 13, 6, 14, 7, 15};
#else
constexpr ivec kInterleaveLow = {0, 4, 1, 5};
constexpr ivec kInterleaveHigh = {2, 6, 3, 7};
#endif

// Each round rotates the bits of (row, column) by one place; log2(VW) rounds swap row and column.
static inline void transpose_square(vec (&rows)[VW]) {
    for (int round = 1; round < VW; round *= 2) {
        vec next[VW];
        for (int i = 0; i < VW / 2; ++i) {
            next[2 * i] = __builtin_shuffle(rows[i], rows[i + VW / 2], kInterleaveLow);
            next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + VW / 2], kInterleaveHigh);
        }
        for (int i = 0; i < VW; ++i) rows[i] = next[i];
    }
}

// dst[j][i] = src[i][j] for i < rows, j < cols. Reads whole vectors of src and writes whole vectors of dst.
static inline void transpose(const float* src, int64_t ld_src, int64_t rows, int64_t cols, float* dst, int64_t ld_dst) {
    for (int64_t i0 = 0; i0 < rows; i0 += VW) {
        for (int64_t j0 = 0; j0 < cols; j0 += VW) {
            vec square[VW];
            if (rows - i0 >= VW) {
                for (int i = 0; i < VW; ++i) square[i] = load(src + (i0 + i) * ld_src + j0);
            } else {
                for (int i = 0; i < VW; ++i) square[i] = i0 + i < rows ? load(src + (i0 + i) * ld_src + j0) : vec{};
            }
            transpose_square(square);
            if (cols - j0 >= VW) {
                for (int j = 0; j < VW; ++j) store(dst + (j0 + j) * ld_dst + i0, square[j]);
            } else {
                for (int j = 0; j < cols - j0; ++j) store(dst + (j0 + j) * ld_dst + i0, square[j]);
            }
        }
    }
}

}  // namespace mtlora::cpu::MTLORA_ISA
