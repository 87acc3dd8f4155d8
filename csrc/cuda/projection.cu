// The rows of many matrices times a thin matrix each, [rows, n] x [n, k], on the fp64 tensor cores: products of fp32
// values are exact there, and the sums are the reference's chains in order of n.
#include <cuda_runtime.h>

#include "cuda/fp64.cuh"
#include "cuda/launch.h"
#include "cuda/spectral.h"
#include "cuda/tensor.cuh"

namespace mtlora::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kWarpRows = 16, kBlockRows = 1024;
// A warp's rows are copied ahead in the background where 16-byte copies can, in two stages, or in four of short rows.
constexpr int kStagedBytes = 256, kShortBytes = 64;
constexpr int kAhead = 4;  // products of four columns that one instruction makes
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

// Bytes between staged rows: an odd number of 16-byte chunks, so that eight rows lie in all banks.
__host__ __device__ constexpr int staged_pitch(int row_bytes) {
    return (row_bytes / 16 | 1) * 16;
}

struct ProjectionArgs {
    Projection p;
    bool whole;  // k = 8 kBlocks and out is aligned to a lane's results
};

template <class T, class Out, int kBlocks, int kStages>  // kStages = 0: straight from memory
__global__ void __launch_bounds__(kThreads, kBlocks <= 2 ? 3 : 1) projection_kernel(const ProjectionArgs args) {
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
    double* scale = w + depth * kPitch<kBlocks>;
    if (thread < 8 * kBlocks) scale[thread] = p.scale && thread < p.k ? p.scale[matrix * p.k + thread] : p.factor;
    const bool any_null = __syncthreads_or(thread < p.k && scale[thread] == 0);

    const T* a = static_cast<const T*>(p.a) + layer * p.a_layer + expert * p.a_expert;
    Out* out = static_cast<Out*>(p.out) + layer * p.out_layer + expert * p.out_expert;
    const int first_col = lane % 4 * 2 * kBlocks;
    const float dloss = p.dloss ? *p.dloss : 1.0f;
    int largest = 0;  // bits of magnitudes order as integers, NaN above all
    const int64_t end = min(int64_t(chunk + 1) * kBlockRows, p.rows);
    const int64_t start = int64_t(chunk) * kBlockRows + warp * kWarpRows;
    const int pitch = staged_pitch(p.n * int(sizeof(T))), stage_bytes = kWarpRows * pitch;
    char* stages = reinterpret_cast<char*>(scale + 8 * kBlocks) + warp * kStages * stage_bytes;
    const Cells first_chunk(lane, kWarp, kStages > 0 ? p.n * int(sizeof(T)) / 16 : 1);
    const auto copy = [&](int64_t top, int stage) {
        const uint32_t to = uint32_t(__cvta_generic_to_shared(stages + stage * stage_bytes));
#pragma unroll 2
        for (Cells at = first_chunk; at.row < kWarpRows; at.next()) {
            const bool inside = top + at.row < end;
            copy16(to + at.row * pitch + at.col * 16,
                   inside ? a + (top + at.row) * p.a_row + at.col * (16 / int(sizeof(T))) : a, inside);
        }
        copy_commit();
    };
    if constexpr (kStages > 0) {
        for (int stage = 0; stage < kStages - 1; ++stage) copy(start + stage * kWarps * kWarpRows, stage);
    }
    int stage = 0;
    for (int64_t top = start; top < end; top += kWarps * kWarpRows) {
        double acc[2][kBlocks][2] = {};
        const int64_t row[2] = {top + lane / 4, top + lane / 4 + 8};
        const auto multiply = [&](int k, const double (&low)[kAhead], const double (&high)[kAhead]) {
            const double* factors = w + k * kPitch<kBlocks> + lane / 4;
#pragma unroll
            for (int b = 0; b < kBlocks; ++b) {
                double factor[kAhead];
#pragma unroll
                for (int step = 0; step < kAhead; ++step) factor[step] = factors[4 * step * kPitch<kBlocks> + 8 * b];
                mma16<kAhead>(acc[0][b], acc[1][b], low, high, factor);
            }
        };
        if constexpr (kStages > 0) {
            copy_wait<kStages - 2>();
            __syncwarp();  // the rows of all lanes are there, and the stage before this one has been read
            copy(top + (kStages - 1) * kWarps * kWarpRows, stage == 0 ? kStages - 1 : stage - 1);
            const T* x = reinterpret_cast<const T*>(stages + stage * stage_bytes + lane / 4 * pitch);
            const T* y = x + 8 * pitch / int(sizeof(T));
            for (int k = lane % 4; k - lane % 4 < p.n; k += 4 * kAhead) {
                double low[kAhead], high[kAhead];
#pragma unroll
                for (int step = 0; step < kAhead; ++step) {
                    const bool inside = k + 4 * step < p.n;
                    low[step] = inside ? to_double(x[k + 4 * step]) : 0;
                    high[step] = inside ? to_double(y[k + 4 * step]) : 0;
                }
                multiply(k, low, high);
            }
            stage = stage == kStages - 1 ? 0 : stage + 1;
        } else {
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
                double low[kAhead], high[kAhead];
#pragma unroll
                for (int step = 0; step < kAhead; ++step) {
                    low[step] = to_double(x[0][step]);
                    high[step] = to_double(x[1][step]);
                }
                multiply(k, low, high);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (row[half] >= end) continue;
            Elements<Out, 2 * kBlocks, true> results;
#pragma unroll
            for (int i = 0; i < 2 * kBlocks; ++i) {
                const int col = first_col + i;
                const float rounded_once = float(acc[half][i / 2][i % 2] * scale[col]);
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
            if (!any_null) continue;
            for (int i = 0; i < 2 * kBlocks; ++i) {
                const int col = first_col + i;
                if (col >= p.k || scale[col] != 0) continue;
                to[i] = rounded_to<Out>(float(normal(uint32_t(row[half]), uint32_t(col), kFill, p.seed)));
            }
        }
    }
    if (!p.largest) return;
#pragma unroll
    for (int half = kWarp / 2; half; half /= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, half));
    int* of_warps = reinterpret_cast<int*>(w);
    __syncthreads();
    if (lane == 0) of_warps[warp] = largest;
    __syncthreads();
    if (thread == 0) {
        for (int i = 1; i < kWarps; ++i) largest = max(largest, of_warps[i]);
        p.largest[blockIdx.x] = __int_as_float(largest);
    }
}

template <class T, class Out, int kBlocks>
void start(const Projection& p, void* stream) {
    const int64_t lane_bytes = 2 * kBlocks * int64_t(sizeof(Out)), bytes = lane_bytes < 16 ? lane_bytes : 16;
    const int64_t strides = p.out_layer | p.out_expert | p.out_row;
    const bool whole = p.k == 8 * kBlocks && reinterpret_cast<uintptr_t>(p.out) % bytes == 0 &&
                       strides * int64_t(sizeof(Out)) % bytes == 0;
    const int row_bytes = p.n * int(sizeof(T));
    const bool staged = row_bytes % 16 == 0 && row_bytes <= kStagedBytes &&
                        reinterpret_cast<uintptr_t>(p.a) % 16 == 0 &&
                        (p.a_layer | p.a_expert | p.a_row) * int64_t(sizeof(T)) % 16 == 0;
    const dim3 grid{unsigned(p.layers * p.experts * projection_blocks(p.rows))};
    const int factors = (padded_depth(p.n) * kPitch<kBlocks> + 8 * kBlocks) * int(sizeof(double));
    const ProjectionArgs args{p, whole};
    const int stage_bytes = kWarps * kWarpRows * staged_pitch(row_bytes);
    if (staged && row_bytes <= kShortBytes)
        return launch<projection_kernel<T, Out, kBlocks, 4>>("projection", grid, kThreads, factors + 4 * stage_bytes,
                                                             stream, false, args);
    if (staged)
        return launch<projection_kernel<T, Out, kBlocks, 2>>("projection", grid, kThreads, factors + 2 * stage_bytes,
                                                             stream, false, args);
    launch<projection_kernel<T, Out, kBlocks, 0>>("projection", grid, kThreads, factors, stream, false, args);
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
