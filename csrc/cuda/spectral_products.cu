// The two products of the pairwise penalty, all layers in one launch: C = X^T X, and X K with the gradient's scaling
// and layout in the epilogue. One accumulator along k, as `Cuda.dot` of reference/arithmetic.py: 16-bit elements on the
// tensor cores; fp32 as chains of fused multiply-adds over 256 of k, which are added in order.
#include <cuda_runtime.h>

#include "cuda/fp64.cuh"
#include "cuda/launch.h"
#include "cuda/spectral.h"
#include "cuda/tensor.cuh"

namespace mtlora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128, kDepth = 64;        // a block's tile of the result, and k per stage
constexpr int kStages = 3;                     // two blocks fit on a multiprocessor
constexpr int kWarpRows = 64, kWarpCols = 32;  // a warp's part: two by four warps
constexpr int kChunk = 8;                      // elements of a 16-byte copy
constexpr int kStageBytes = 2 * kTile * kDepth * 2;

// Rows of kWidth elements whose 16-byte chunks are permuted, so that eight rows of one column lie in all banks.
template <int kWidth>
__device__ inline uint32_t chunk_at(uint32_t base, int row, int chunk) {
    return base + uint32_t(row * kWidth * 2 + (chunk ^ (row & 7)) * 16);
}

// What a block multiplies: a is [rows, depth], or [depth, rows] if transposed; b is [depth, cols]. Row-major.
struct Operands {
    const void *a, *b;
    int rows, cols, depth, a_pitch, b_pitch;
};

template <class E, bool kTransposed>
struct Tile {
    static constexpr int kBytes = kStages * kStageBytes;

    float acc[kWarpRows / 16][kWarpCols / 8][4] = {};

    // A [height, kWidth] box of a row-major matrix, from (row, col).
    template <int kHeight, int kWidth>
    __device__ static void copy_box(uint32_t to, const void* from, int pitch, int row, int col, int rows, int cols) {
        constexpr int kChunks = kWidth / kChunk, kRows = kThreads / kChunks;
        static_assert(kRows % 8 == 0, "a thread's chunks keep their place in the permutation");
        const int y = int(threadIdx.x) / kChunks, x = int(threadIdx.x) % kChunks, offset = y * pitch + x * kChunk;
        const E* corner = static_cast<const E*>(from) + int64_t(row) * pitch + col;
        to = chunk_at<kWidth>(to, y, x);
#pragma unroll
        for (int i = 0; i < kHeight / kRows; ++i) {
            const bool inside = row + y + i * kRows < rows && col + x * kChunk < cols;
            copy16(to + i * kRows * kWidth * 2, inside ? corner + offset + i * kRows * pitch : corner, inside);
        }
    }

    __device__ static void copy_stage(const Operands& o, uint32_t to, int top, int left, int k) {
        if constexpr (kTransposed)
            copy_box<kDepth, kTile>(to, o.a, o.a_pitch, k, top, o.depth, o.rows);
        else
            copy_box<kTile, kDepth>(to, o.a, o.a_pitch, top, k, o.rows, o.depth);
        copy_box<kDepth, kTile>(to + kStageBytes / 2, o.b, o.b_pitch, k, left, o.depth, o.cols);
    }

    __device__ void multiply_stage(uint32_t a_at) {
        const int lane = int(threadIdx.x) % kWarp;
        const uint32_t b_at = a_at + kStageBytes / 2;
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) {
            uint32_t a[kWarpRows / 16][4], b[kWarpCols / 16][4];
#pragma unroll
            for (int i = 0; i < kWarpRows / 16; ++i) {
                const int row = warp_row() + 16 * i;
                if constexpr (kTransposed) {
                    const int of = k + lane / 16 * 8 + lane % 8;
                    load_matrices<true>(a[i], chunk_at<kTile>(a_at, of, row / 8 + lane / 8 % 2));
                } else {
                    load_matrices<false>(a[i], chunk_at<kDepth>(a_at, row + lane % 16, k / 8 + lane / 16));
                }
            }
#pragma unroll
            for (int j = 0; j < kWarpCols / 16; ++j) {
                const int of = k + lane / 8 % 2 * 8 + lane % 8;
                load_matrices<true>(b[j], chunk_at<kTile>(b_at, of, (warp_col() + 16 * j) / 8 + lane / 16));
            }
#pragma unroll
            for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
                for (int j = 0; j < kWarpCols / 8; ++j)
                    mma16<E>(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
    }

    // Where a warp's part begins in the tile.
    __device__ static int warp_row() { return int(threadIdx.x) / kWarp / (kTile / kWarpCols) * kWarpRows; }
    __device__ static int warp_col() { return int(threadIdx.x) / kWarp % (kTile / kWarpCols) * kWarpCols; }

    __device__ void multiply(const Operands& o, int top, int left) {
        const uint32_t base = uint32_t(__cvta_generic_to_shared(shared_memory()));
        const int steps = (o.depth + kDepth - 1) / kDepth;
#pragma unroll
        for (int stage = 0; stage < kStages - 1; ++stage) {
            if (stage < steps) copy_stage(o, base + stage * kStageBytes, top, left, stage * kDepth);
            copy_commit();
        }
        for (int step = 0; step < steps; ++step) {
            copy_wait<kStages - 2>();
            __syncthreads();
            const int next = step + kStages - 1;
            if (next < steps) copy_stage(o, base + next % kStages * kStageBytes, top, left, next * kDepth);
            copy_commit();
            multiply_stage(base + step % kStages * kStageBytes);
        }
    }

    // visit(row, col, two neighbouring results), from the tile's corner
    template <class Visit>
    __device__ void results(Visit visit) const {
        const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
        for (int i = 0; i < kWarpRows / 16; ++i) {
#pragma unroll
            for (int j = 0; j < kWarpCols / 8; ++j) {
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    visit(warp_row() + 16 * i + 8 * half + lane / 4, warp_col() + 8 * j + 2 * (lane % 4),
                          acc[i][j][2 * half], acc[i][j][2 * half + 1]);
            }
        }
    }
};

// The same for fp32. A thread owns two by two patches of 4 x 4 results.
template <bool kTransposed>
struct Tile<float, kTransposed> {
    static constexpr int kPatch = 4, kHalf = kTile / 2, kStep = 8, kPitch = kTile + kPatch, kChain = 256;
    static constexpr int kLoads = kStep * kTile / kThreads, kAcross = kHalf / kPatch;
    static constexpr int kBytes = 2 * 2 * kStep * kPitch * int(sizeof(float));  // two stages of both operands

    float acc[2 * kPatch][2 * kPatch] = {};

    // kLoads elements of a [kStep, kTile] box: x[k][i] if `along` is true, else x[i][k], row-major with this pitch.
    template <bool along>
    __device__ static void load(float (&to)[kLoads], const float* x, int pitch, int k, int i, int depth, int size) {
#pragma unroll
        for (int n = 0; n < kLoads; ++n) {
            const int of_k = k + (along ? int(threadIdx.x) / kTile + n * (kThreads / kTile) : int(threadIdx.x) % kStep);
            const int of_i = i + (along ? int(threadIdx.x) % kTile : int(threadIdx.x) / kStep + n * (kThreads / kStep));
            const int64_t at = along ? int64_t(of_k) * pitch + of_i : int64_t(of_i) * pitch + of_k;
            to[n] = of_k < depth && of_i < size ? x[at] : 0;
        }
    }
    template <bool along>
    __device__ static void store(float* to, const float (&from)[kLoads]) {
#pragma unroll
        for (int n = 0; n < kLoads; ++n) {
            const int k = along ? int(threadIdx.x) / kTile + n * (kThreads / kTile) : int(threadIdx.x) % kStep;
            const int i = along ? int(threadIdx.x) % kTile : int(threadIdx.x) / kStep + n * (kThreads / kStep);
            to[k * kPitch + i] = from[n];
        }
    }
    __device__ static void patches(float (&to)[2 * kPatch], const float* row, int patch) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float4 four = *reinterpret_cast<const float4*>(row + half * kHalf + patch * kPatch);
            to[half * kPatch] = four.x;
            to[half * kPatch + 1] = four.y;
            to[half * kPatch + 2] = four.z;
            to[half * kPatch + 3] = four.w;
        }
    }

    __device__ void multiply(const Operands& o, int top, int left) {
        float* stages = reinterpret_cast<float*>(shared_memory());
        const float *a = static_cast<const float*>(o.a), *b = static_cast<const float*>(o.b);
        float chain[2 * kPatch][2 * kPatch], of_a[kLoads], of_b[kLoads];
        load<kTransposed>(of_a, a, o.a_pitch, 0, top, o.depth, o.rows);
        load<true>(of_b, b, o.b_pitch, 0, left, o.depth, o.cols);
        for (int k = 0, stage = 0; k < o.depth; k += kStep, stage ^= 1) {
            float* at = stages + stage * 2 * kStep * kPitch;
            store<kTransposed>(at, of_a);
            store<true>(at + kStep * kPitch, of_b);
            __syncthreads();
            load<kTransposed>(of_a, a, o.a_pitch, k + kStep, top, o.depth, o.rows);
            load<true>(of_b, b, o.b_pitch, k + kStep, left, o.depth, o.cols);
            const bool first = k % kChain == 0, last = (k + kStep) % kChain == 0 || k + kStep >= o.depth;
#pragma unroll
            for (int step = 0; step < kStep; ++step) {
                float x[2 * kPatch], y[2 * kPatch];
                patches(x, at + step * kPitch, int(threadIdx.x) / kAcross);
                patches(y, at + (kStep + step) * kPitch, int(threadIdx.x) % kAcross);
#pragma unroll
                for (int i = 0; i < 2 * kPatch; ++i) {
#pragma unroll
                    for (int j = 0; j < 2 * kPatch; ++j)
                        chain[i][j] = __fmaf_rn(x[i], y[j], step == 0 && first ? 0 : chain[i][j]);
                }
            }
            if (!last) continue;
#pragma unroll
            for (int i = 0; i < 2 * kPatch; ++i) {
#pragma unroll
                for (int j = 0; j < 2 * kPatch; ++j) acc[i][j] = k < kChain ? chain[i][j] : acc[i][j] + chain[i][j];
            }
        }
    }

    template <class Visit>
    __device__ void results(Visit visit) const {
#pragma unroll
        for (int i = 0; i < 2 * kPatch; ++i) {
#pragma unroll
            for (int j = 0; j < 2 * kPatch; j += 2)
                visit(i / kPatch * kHalf + int(threadIdx.x) / kAcross * kPatch + i % kPatch,
                      j / kPatch * kHalf + int(threadIdx.x) % kAcross * kPatch + j % kPatch, acc[i][j], acc[i][j + 1]);
        }
    }
};

// The block's tile; tiles of one layer are neighbours.
struct Place {
    int64_t layer;
    int top, left;

    __device__ Place(int rows, int cols) {
        const int across = (cols + kTile - 1) / kTile, tiles = (rows + kTile - 1) / kTile * across;
        const int tile = int(blockIdx.x) % tiles;
        layer = blockIdx.x / tiles;
        top = tile / across * kTile;
        left = tile % across * kTile;
    }
};

struct CrossArgs {
    const void* x;  // [layers, rows, width]
    float* c;       // [layers, width, width]; experts' own blocks are 0
    int rows, width, rank;
};

template <class E>
__global__ void __launch_bounds__(kThreads) cross_product_kernel(const CrossArgs a) {
    const Place at(a.width, a.width);
    const E* x = static_cast<const E*>(a.x) + at.layer * a.rows * a.width;
    float* c = a.c + at.layer * a.width * a.width;
    Tile<E, true> tile;
    tile.multiply(Operands{x, x, a.width, a.width, a.rows, a.width, a.width}, at.top, at.left);
    tile.results([&](int tile_row, int tile_col, float first, float second) {
        const int row = at.top + tile_row, col = at.left + tile_col;
        if (row >= a.width || col >= a.width) return;
        const int expert = row / a.rank;
        const bool own = col / a.rank == expert, own_next = (col + 1) / a.rank == expert;
        float* to = c + int64_t(row) * a.width + col;
        if constexpr (std::is_same_v<E, float>) {  // of any width
            to[0] = own ? 0 : first;
            if (col + 1 < a.width) to[1] = own_next ? 0 : second;
        } else {
            *reinterpret_cast<float2*>(to) = make_float2(own ? 0 : first, own_next ? 0 : second);
        }
    });
}

struct GradientArgs {
    const void *x, *k;  // [layers, rows, width], [layers, width, width]
    const float *up, *dloss;
    void* gradient;  // [layers, experts, rows, rank]
    int rows, width, rank;
};

template <class E>
__global__ void __launch_bounds__(kThreads, std::is_same_v<E, float> ? 1 : 2)
    gradient_product_kernel(const GradientArgs a) {
    const Place at(a.rows, a.width);
    const E* x = static_cast<const E*>(a.x) + at.layer * a.rows * a.width;
    const E* k = static_cast<const E*>(a.k) + at.layer * a.width * a.width;
    E* gradient = static_cast<E*>(a.gradient) + at.layer * a.rows * a.width;
    Tile<E, false> tile;
    tile.multiply(Operands{x, k, a.rows, a.width, a.width, a.width, a.width}, at.top, at.left);
    const float factor = a.up[at.layer] * *a.dloss;
    const auto at_expert = [&](int row, int col) {
        const int expert = (at.left + col) / a.rank, of = at.left + col - expert * a.rank;
        return gradient + (int64_t(expert) * a.rows + at.top + row) * a.rank + of;
    };
    const auto inside = [&](int row, int col) { return at.top + row < a.rows && at.left + col < a.width; };
    if constexpr (std::is_same_v<E, float>) {
        tile.results([&](int row, int col, float first, float second) {
            if (inside(row, col)) *at_expert(row, col) = first * factor;
            if (inside(row, col + 1)) *at_expert(row, col + 1) = second * factor;
        });
    } else {
        // Through shared memory, so that neighbouring threads write neighbouring elements of an expert.
        constexpr int kPitch = kTile + kChunk;
        __syncthreads();
        E* results = reinterpret_cast<E*>(shared_memory());
        tile.results([&](int row, int col, float first, float second) {
            *reinterpret_cast<Pair<E>*>(results + row * kPitch + col) = rounded2<E>(first * factor, second * factor);
        });
        __syncthreads();
        if (a.rank % kChunk == 0) {
            for (int i = int(threadIdx.x); i < kTile * kTile / kChunk; i += kThreads) {
                const int row = i / 2 % kTile, col = i / (2 * kTile) * 2 * kChunk + i % 2 * kChunk;
                if (!inside(row, col)) continue;
                *reinterpret_cast<uint4*>(at_expert(row, col)) =
                    *reinterpret_cast<const uint4*>(results + row * kPitch + col);
            }
        } else {
            for (int i = int(threadIdx.x); i < kTile * kTile; i += kThreads) {
                const int row = i / kTile, col = i % kTile;
                if (inside(row, col)) *at_expert(row, col) = results[row * kPitch + col];
            }
        }
    }
}

template <class E>
void cross(const SpectralPenaltyFwd& p, const CrossArgs& a) {
    const int64_t across = (a.width + kTile - 1) / kTile;
    launch<cross_product_kernel<E>>("spectral_cross_product", dim3{unsigned(p.layers * across * across)}, kThreads,
                                    Tile<E, true>::kBytes, p.stream, false, a);
}

template <class E>
void gradient(const SpectralPenaltyBwd& p, const GradientArgs& a) {
    const int64_t across = (a.width + kTile - 1) / kTile, down = (a.rows + kTile - 1) / kTile;
    launch<gradient_product_kernel<E>>("spectral_gradient_product", dim3{unsigned(p.layers * down * across)}, kThreads,
                                       Tile<E, false>::kBytes, p.stream, false, a);
}

}  // namespace

void spectral_cross_product(const SpectralPenaltyFwd& p) {
    const CrossArgs a{p.x, p.c, int(p.rows), int(p.experts * p.rank), int(p.rank)};
    for_dtype(p.lora_b.dtype, [&](auto element) { cross<decltype(element)>(p, a); });
}

void spectral_gradient_product(const SpectralPenaltyBwd& p, const void* scaled_k, const float* up) {
    const GradientArgs a{p.x, scaled_k, up, p.dloss, p.dlora_b, int(p.rows), int(p.experts * p.rank), int(p.rank)};
    for_dtype(p.lora_b.dtype, [&](auto element) { gradient<decltype(element)>(p, a); });
}

}  // namespace mtlora::cuda
