// The rows of many matrices times a thin matrix each, [rows, n] x [n, k], on the fp64 tensor cores: products of fp32
// values are exact there, and the sums are the reference's chains in order of n.
#include <cuda_runtime.h>

#include "cuda/fp64.cuh"
#include "cuda/launch.h"
#include "cuda/spectral.h"

namespace mtlora::cuda {
namespace {

constexpr int kThreads = 256, kWarpRows = 16, kBlockRows = 512;
constexpr int kAhead = 4;  // products of four columns whose elements are loaded together
constexpr uint32_t kFill = 2;

__host__ __device__ constexpr int padded_depth(int n) {
    return (n + 4 * kAhead - 1) / (4 * kAhead) * (4 * kAhead);
}
// Rows of w spread over the banks: a quarter-warp reads four rows of four elements.
template <int kBlocks>
constexpr int kPitch = 8 * kBlocks + 4;

// Column f of block b is this column of the result, so that a lane's results are contiguous.
template <int kBlocks>
__device__ constexpr int column_of(int b, int f) {
    return f / 2 * 2 * kBlocks + 2 * b + f % 2;
}

struct ProjectionArgs {
    Projection p;
    bool whole;  // k = 8 kBlocks and out is aligned to a lane's results
};

template <class T, class Out, int kBlocks>
__global__ void __launch_bounds__(kThreads) projection_kernel(const ProjectionArgs args) {
    const Projection& p = args.p;
    const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const int chunks = int((p.rows + kBlockRows - 1) / kBlockRows), chunk = int(blockIdx.x) % chunks;
    const int64_t matrix = blockIdx.x / chunks, layer = matrix / p.experts, expert = matrix % p.experts;
    const int depth = padded_depth(p.n);
    double* w = shared_memory();

    const float* source = p.w + matrix * p.n * p.k;
    for (int i = thread; i < depth * 8 * kBlocks; i += kThreads) {
        const int row = i / (8 * kBlocks), at = i % (8 * kBlocks), col = column_of<kBlocks>(at / 8, at % 8);
        const bool inside = row < p.n && col < p.k;
        const int offset = p.transposed ? col * p.n + row : row * p.k + col;
        w[row * kPitch<kBlocks> + at] = inside ? double(source[offset]) : 0;
    }
    __syncthreads();

    const T* a = static_cast<const T*>(p.a) + layer * p.a_layer + expert * p.a_expert;
    Out* out = static_cast<Out*>(p.out) + layer * p.out_layer + expert * p.out_expert;
    const int first_col = lane % 4 * 2 * kBlocks;
    const float dloss = p.dloss ? *p.dloss : 1.0f;
    int largest = 0;  // bits of magnitudes order as integers, NaN above all
    const int64_t end = min(int64_t(chunk + 1) * kBlockRows, p.rows);
    for (int64_t top = int64_t(chunk) * kBlockRows + warp * kWarpRows; top < end; top += kThreads / kWarp * kWarpRows) {
        double acc[2][kBlocks][2] = {};
        const int64_t row[2] = {top + lane / 4, top + lane / 4 + 8};
        for (int k = lane % 4; k - lane % 4 < p.n; k += 4 * kAhead) {
            T x[2][kAhead];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int step = 0; step < kAhead; ++step) {
                    const bool inside = row[half] < end && k + 4 * step < p.n;
                    x[half][step] = inside ? a[row[half] * p.a_row + k + 4 * step] : T(0.0f);
                }
            }
#pragma unroll
            for (int step = 0; step < kAhead; ++step) {
                const double low = to_double(x[0][step]), high = to_double(x[1][step]);
                const double* factors = w + (k + 4 * step) * kPitch<kBlocks> + lane / 4;
#pragma unroll
                for (int b = 0; b < kBlocks; ++b) {
                    const double factor = factors[8 * b];
                    mma(acc[0][b], low, factor);
                    mma(acc[1][b], high, factor);
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (row[half] >= end) continue;
            Elements<Out, 2 * kBlocks, true> results;
#pragma unroll
            for (int i = 0; i < 2 * kBlocks; ++i) {
                const int col = first_col + i;
                double value = acc[half][i / 2][i % 2];
                if (p.scale) {
                    const double scale = col < p.k ? p.scale[matrix * p.k + col] : 1;
                    value = scale == 0 ? normal(uint32_t(row[half]), uint32_t(col), kFill, p.seed) : value * scale;
                } else {
                    value *= p.factor;
                }
                const float rounded_once = float(value);
                if (col < p.k) largest = max(largest, __float_as_int(fabsf(rounded_once)));
                results.at[i] = rounded_to<Out>(p.dloss ? rounded_once * dloss : rounded_once);
            }
            Out* to = out + row[half] * p.out_row + first_col;
            if (args.whole) {
                constexpr int kVector = 2 * kBlocks * int(sizeof(Out)) > 16 ? 16 / int(sizeof(Out)) : 2 * kBlocks;
                using Vector = Elements<Out, kVector, true>;
#pragma unroll
                for (int i = 0; i < 2 * kBlocks; i += kVector)
                    *reinterpret_cast<Vector*>(to + i) = *reinterpret_cast<const Vector*>(results.at + i);
            } else {
#pragma unroll
                for (int i = 0; i < 2 * kBlocks; ++i)
                    if (first_col + i < p.k) to[i] = results.at[i];
            }
        }
    }
    if (!p.largest) return;
#pragma unroll
    for (int half = kWarp / 2; half; half /= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, half));
    int* of_warps = reinterpret_cast<int*>(w + depth * kPitch<kBlocks>);
    if (lane == 0) of_warps[warp] = largest;
    __syncthreads();
    if (thread == 0) {
        for (int i = 1; i < kThreads / kWarp; ++i) largest = max(largest, of_warps[i]);
        p.largest[blockIdx.x] = __int_as_float(largest);
    }
}

template <class T, class Out, int kBlocks>
void start(const Projection& p, void* stream) {
    const int64_t lane_bytes = 2 * kBlocks * int64_t(sizeof(Out)), bytes = lane_bytes < 16 ? lane_bytes : 16;
    const int64_t strides = p.out_layer | p.out_expert | p.out_row;
    const bool whole = p.k == 8 * kBlocks && reinterpret_cast<uintptr_t>(p.out) % bytes == 0 &&
                       strides * int64_t(sizeof(Out)) % bytes == 0;
    const dim3 grid{unsigned(p.layers * p.experts * projection_blocks(p.rows))};
    const int shared = padded_depth(p.n) * kPitch<kBlocks> * int(sizeof(double)) + kThreads / kWarp * int(sizeof(int));
    launch<projection_kernel<T, Out, kBlocks>>("projection", grid, kThreads, shared, stream, false,
                                               ProjectionArgs{p, whole});
}

template <class T, class Out>
void start(const Projection& p, void* stream) {
    if (p.k <= 8) return start<T, Out, 1>(p, stream);
    if (p.k <= 16) return start<T, Out, 2>(p, stream);
    if (p.k <= 32) return start<T, Out, 4>(p, stream);
    start<T, Out, 8>(p, stream);
}

template <class T>
void start(const Projection& p, void* stream) {
    p.out_dtype == DType::f32 ? start<T, float>(p, stream) : start<T, T>(p, stream);
}

}  // namespace

int64_t projection_blocks(int64_t rows) {
    return (rows + kBlockRows - 1) / kBlockRows;
}

void project(const Projection& p, void* stream) {
    for_dtype(p.dtype, [&](auto element) { start<decltype(element)>(p, stream); });
}

}  // namespace mtlora::cuda
