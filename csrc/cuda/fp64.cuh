// What the fp64 kernels of the spectral side share: loads, tensor-core products, tree sums, normal numbers.
#pragma once

#include <cstdint>

#include "cuda/elements.cuh"

namespace mtlora::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// All dynamic: static shared memory would count against what `launch` asks for.
__device__ inline double* shared_memory() {
    extern __shared__ __align__(16) double memory[];
    return memory;
}

template <class T>
__device__ inline double to_double(T v) {
    return double(to_float(v));
}

template <class T>
__device__ inline T rounded_to(float v) {
    if constexpr (std::is_same_v<T, float>)
        return v;
    else
        return rounded<T>(v);
}

// Walks the cells of a grid that thread 0, 1, ... of `threads` owns, without a division a step.
struct Cells {
    int row, col, row_step, col_step, cols;

    __device__ Cells(int thread, int threads, int cols)
        : row(thread / cols), col(thread % cols), row_step(threads / cols), col_step(threads % cols), cols(cols) {}
    __device__ void next() {
        row += row_step;
        col += col_step;
        if (col >= cols) {
            col -= cols;
            ++row;
        }
    }
};

// count contiguous elements, moved as one access where their alignment allows it.
template <class T, int count, bool aligned>
struct alignas(aligned ? sizeof(T) * count : sizeof(T)) Elements {
    T at[count];
};

// c [8, 8] += a [8, 4] b [4, 8] on the tensor cores. Lane t holds a[t / 4][t % 4], b[t % 4][t / 4] and
// c[t / 4][2 (t % 4) + {0, 1}]. Each sum is a chain of fused multiply-adds in the order of k (Xie et al., arXiv
// 2511.10909, on every generation that has the instruction), so with exact products it is the reference's sum.
__device__ inline void mma(double (&c)[2], double a, double b) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(c[0]), "+d"(c[1])
                 : "d"(a), "d"(b));
}

// c [16, 8] += a [16, 4 kSteps] b [4 kSteps, 8], Hopper's shapes: `low` and `high` are the results of rows t / 4 and
// t / 4 + 8, a and b what `mma` takes, step by step.
template <int kSteps>
__device__ inline void mma16(double (&low)[2], double (&high)[2], const double (&a_low)[kSteps],
                             const double (&a_high)[kSteps], const double (&b)[kSteps]) {
#if __CUDA_ARCH__ >= 900
    if constexpr (kSteps == 4) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7, %8, %9, %10, %11}, "
            "{%12, %13, %14, %15}, {%0, %1, %2, %3};"
            : "+d"(low[0]), "+d"(low[1]), "+d"(high[0]), "+d"(high[1])
            : "d"(a_low[0]), "d"(a_high[0]), "d"(a_low[1]), "d"(a_high[1]), "d"(a_low[2]), "d"(a_high[2]),
              "d"(a_low[3]), "d"(a_high[3]), "d"(b[0]), "d"(b[1]), "d"(b[2]), "d"(b[3]));
    } else if constexpr (kSteps == 2) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+d"(low[0]), "+d"(low[1]), "+d"(high[0]), "+d"(high[1])
            : "d"(a_low[0]), "d"(a_high[0]), "d"(a_low[1]), "d"(a_high[1]), "d"(b[0]), "d"(b[1]));
    } else {
        static_assert(kSteps == 1);
        asm volatile(
            "mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+d"(low[0]), "+d"(low[1]), "+d"(high[0]), "+d"(high[1])
            : "d"(a_low[0]), "d"(a_high[0]), "d"(b[0]));
    }
#else
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        mma(low, a_low[step], b[step]);
        mma(high, a_high[step], b[step]);
    }
#endif
}

// The sum over the lanes of a warp, in every lane: the halving tree of `tree_sum` in reference/arithmetic.py.
__device__ inline double tree_sum(double v) {
#pragma unroll
    for (int half = kWarp / 2; half; half /= 2) v += __shfl_xor_sync(kAllLanes, v, half);
    return v;
}

// tree_sum of count values, the lanes' strided sums first.
template <class Value>
__device__ inline double tree_sum(int count, Value value) {
    const int lane = int(threadIdx.x) % kWarp;
    double sum = lane < count ? value(lane) : 0;
    for (int i = lane + kWarp; i < count; i += kWarp) sum += value(i);
    return tree_sum(sum);
}

// `normal` of reference/rsvd.py: nearly Gaussian, from Philox 4x32-10. Exact in fp32.
__device__ inline double normal(uint32_t row, uint32_t column, uint32_t stream, uint64_t seed) {
    uint32_t c[4] = {column, row, 0, stream}, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(c[0]) * 0xD2511F53u, p1 = uint64_t(c[2]) * 0xCD9E8D57u;
        c[0] = uint32_t(p1 >> 32) ^ c[1] ^ k0;
        c[1] = uint32_t(p1);
        c[2] = uint32_t(p0 >> 32) ^ c[3] ^ k1;
        c[3] = uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    int32_t halves = -4 * 0xFFFF;
    for (const uint32_t word : c) halves += int32_t((word & 0xFFFF) + (word >> 16));
    return halves * 0x1p-16;
}

}  // namespace mtlora::cuda
