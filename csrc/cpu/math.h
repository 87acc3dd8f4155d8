// The sums, the exponential and the random numbers of mtlora_kernels/reference/{arithmetic,philox}.py.
//
// Where the reference pads a sum with zeros, only the sign of a zero could differ without the padding, and no
// result depends on that sign. For the same reason the trees here are always 32 lanes wide.
#pragma once

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace mtlora::cpu::MTLORA_ISA {

constexpr int64_t kSumLanes = 32;
constexpr int64_t kSumRows = 256;

static inline int64_t next_power_of_two(int64_t n) {
    int64_t power = 1;
    while (power < n) power *= 2;
    return power;
}

// ---- tree_sum: lanes strided by 32 in order, then halves ----

static inline float sum_lanes(vec s) {
    for (int half = VW / 2; half >= 1; half /= 2) s += __builtin_shuffle(s, kLane + half);
    return s[0];
}

// Sum of n values, of which value(j) gives the VW that start at j; what it returns past n is ignored.
template <class Value>
static inline float tree_sum(int64_t n, Value value) {
    const auto masked = [&](int64_t j) { return n - j >= VW ? value(j) : kLane < int32_t(n - j) ? value(j) : vec{}; };
    if (n <= VW) return sum_lanes(masked(0));
    constexpr int VECS = kSumLanes / VW;
    vec s[VECS] = {};
    for (int64_t start = 0; start < n; start += kSumLanes)
        for (int j = 0; j < VECS && start + j * VW < n; ++j) s[j] += masked(start + j * VW);
    for (int half = VECS / 2; half >= 1; half /= 2)
        for (int j = 0; j < half; ++j) s[j] += s[j + half];
    return sum_lanes(s[0]);
}

// The same tree over the rows of [rows, n], left in row 0; the others are overwritten. Room for 32 rows.
template <class T>
static inline void tree_sum_rows(T* v, int64_t rows, int64_t n) {
    for (int64_t row = kSumLanes; row < rows; row += kSumLanes)
        for (int64_t i = 0; i < min(kSumLanes, rows - row) * n; ++i) v[i] += v[row * n + i];
    int64_t lanes = min(kSumLanes, next_power_of_two(rows));
    for (int64_t i = rows * n; i < lanes * n; ++i) v[i] = 0;
    while (lanes > 1) {
        lanes /= 2;
        const T* upper = v + lanes * n;
        int64_t i = 0;
        for (; i + WIDTH<T> <= lanes * n; i += WIDTH<T>) store(v + i, load(v + i) + load(upper + i));
        for (; i < lanes * n; ++i) v[i] += upper[i];
    }
}

// ---- sum_rows: runs of 256 rows in order, then the run sums the same way ----

// load(row, dst) writes the n values of one row.
template <class Load>
static void sum_rows(int threads, int64_t rows, int64_t n, Load load, float* sum) {
    const int64_t runs = ceil_div(rows, kSumRows);
    float* partial = scratch(runs * n + threads * n);
    parallel_for(threads, runs, partial + runs * n, n, [&](int64_t run, float* row) {
        float* s = partial + run * n;
        load(run * kSumRows, s);
        for (int64_t i = run * kSumRows + 1; i < min(rows, (run + 1) * kSumRows); ++i) {
            load(i, row);
            for (int64_t j = 0; j < n; ++j) s[j] += row[j];
        }
    });
    for (int64_t left = runs; left > 1; left = ceil_div(left, kSumRows)) {
        for (int64_t i = 0; i < left; ++i) {
            float* s = partial + i / kSumRows * n;
            for (int64_t j = 0; j < n; ++j) s[j] = i % kSumRows ? s[j] + partial[i * n + j] : partial[i * n + j];
        }
    }
    for (int64_t j = 0; j < n; ++j) sum[j] = rows ? partial[j] : 0;
}

// ---- Softmax ----

// exp of a value that is not positive, as Portable.exp.
static inline vec exp_nonpositive(vec v) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to the nearest integer
    const vec n = (v * float(1.4426950408889634) + magic) - magic;
    const vec f = (v - n * 0.693359375f) - n * float(-2.12194440e-4);
    vec p = f * float(1.0 / 5040) + float(1.0 / 720);
    const float coefficients[] = {float(1.0 / 120), float(1.0 / 24), float(1.0 / 6), 0.5f, 1.0f, 1.0f};
    for (const float coefficient : coefficients) p = p * f + coefficient;
    vec exponent = n < -126.0f ? (vec{} - 126.0f) : n;
    exponent = n == n ? exponent : vec{};
    const vec power = (vec)((__builtin_convertvector(exponent, ivec) + 127) << 23);
    return v < -87.0f ? vec{} : p * power;
}

// In place; the row is readable and writable up to a multiple of VW.
static inline void softmax_row(float* row, int64_t n) {
    const float lowest = -__builtin_inff();
    vec highest = vec{} + lowest;
    for (int64_t j = 0; j < n; j += VW) {
        const vec v = kLane < int32_t(n - j) ? load(row + j) : highest;
        highest = (v > highest) | (v != v) ? v : highest;  // NaN wins and stays
    }
    float largest = highest[0];
    for (int j = 1; j < VW; ++j) largest = highest[j] > largest || highest[j] != highest[j] ? highest[j] : largest;
    for (int64_t j = 0; j < n; j += VW) store(row + j, exp_nonpositive(load(row + j) - largest));
    const float sum = tree_sum(n, [&](int64_t j) { return load(row + j); });
    for (int64_t j = 0; j < n; j += VW) store(row + j, load(row + j) / sum);
}

// ---- Random numbers ----

// Philox 4x32-10 on BLOCKS counters; the words replace the counters.
template <int BLOCKS>
static inline void philox(uint64_t seed, uint32_t (&c)[4][BLOCKS]) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < BLOCKS; ++i) {
            const uint64_t p0 = uint64_t(c[0][i]) * 0xD2511F53u, p1 = uint64_t(c[2][i]) * 0xCD9E8D57u;
            c[0][i] = uint32_t(p1 >> 32) ^ c[1][i] ^ k0;
            c[1][i] = uint32_t(p1);
            c[2][i] = uint32_t(p0 >> 32) ^ c[3][i] ^ k1;
            c[3][i] = uint32_t(p0);
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// row[i] = keep_scale * row[i] where element (token, first + i) is kept, else 0; first is a multiple of 4.
static inline void dropout_row(const RoutedLora& p, int64_t token, int64_t first, int64_t n, float* row) {
    constexpr int BLOCKS = 16;
    const uint64_t seed = *p.seed;
    const uint32_t threshold = p.drop_threshold;
    const float keep_scale = p.keep_scale;
    for (int64_t start = 0; start < n; start += 4 * BLOCKS) {
        uint32_t c[4][BLOCKS];
        for (int i = 0; i < BLOCKS; ++i) {
            const uint64_t block = (first + start) / 4 + i;
            c[0][i] = uint32_t(block);
            c[1][i] = uint32_t(token);
            c[2][i] = c[3][i] = 0;
        }
        philox(seed, c);
        for (int64_t i = 0; i < min(4 * BLOCKS, n - start); ++i) {
            const bool kept = c[i % 4][i / 4] >= threshold;
            row[start + i] = kept ? row[start + i] * keep_scale : 0;
        }
    }
}

}  // namespace mtlora::cpu::MTLORA_ISA
