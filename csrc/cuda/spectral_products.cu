// The two 16-bit products of the pairwise penalty, all layers in one launch: C = X^T X, and X K with the gradient's
// scaling and layout in the epilogue. One accumulator along k, as `Cuda.dot` of reference/arithmetic.py.
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
        *reinterpret_cast<float2*>(c + int64_t(row) * a.width + col) =
            make_float2(own ? 0 : first, own_next ? 0 : second);
    });
}

struct GradientArgs {
    const void *x, *k;  // [layers, rows, width], [layers, width, width]
    const float *up, *dloss;
    void* gradient;  // [layers, experts, rows, rank]
    int rows, width, rank;
};

template <class E>
__global__ void __launch_bounds__(kThreads, 2) gradient_product_kernel(const GradientArgs a) {
    const Place at(a.rows, a.width);
    const E* x = static_cast<const E*>(a.x) + at.layer * a.rows * a.width;
    const E* k = static_cast<const E*>(a.k) + at.layer * a.width * a.width;
    E* gradient = static_cast<E*>(a.gradient) + at.layer * a.rows * a.width;
    const float factor = a.up[at.layer] * *a.dloss;
    Tile<E, false> tile;
    tile.multiply(Operands{x, k, a.rows, a.width, a.width, a.width, a.width}, at.top, at.left);
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
            if (at.top + row >= a.rows || at.left + col >= a.width) continue;
            const int expert = (at.left + col) / a.rank, of = at.left + col - expert * a.rank;
            *reinterpret_cast<uint4*>(gradient + (int64_t(expert) * a.rows + at.top + row) * a.rank + of) =
                *reinterpret_cast<const uint4*>(results + row * kPitch + col);
        }
    } else {
        for (int i = int(threadIdx.x); i < kTile * kTile; i += kThreads) {
            const int row = i / kTile, col = i % kTile;
            if (at.top + row >= a.rows || at.left + col >= a.width) continue;
            const int expert = (at.left + col) / a.rank, of = at.left + col - expert * a.rank;
            gradient[(int64_t(expert) * a.rows + at.top + row) * a.rank + of] = results[row * kPitch + col];
        }
    }
}

template <class E>
void cross(const SpectralPenaltyFwd& p, const CrossArgs& a) {
    const int64_t across = (a.width + kTile - 1) / kTile;
    launch<cross_product_kernel<E>>("spectral_cross_product", dim3{unsigned(p.layers * across * across)}, kThreads,
                                    kStages * kStageBytes, p.stream, false, a);
}

template <class E>
void gradient(const SpectralPenaltyBwd& p, const GradientArgs& a) {
    const int64_t across = (a.width + kTile - 1) / kTile, down = (a.rows + kTile - 1) / kTile;
    launch<gradient_product_kernel<E>>("spectral_gradient_product", dim3{unsigned(p.layers * down * across)}, kThreads,
                                       kStages * kStageBytes, p.stream, false, a);
}

}  // namespace

void spectral_cross_product(const SpectralPenaltyFwd& p) {
    const CrossArgs a{p.x, p.c, int(p.rows), int(p.experts * p.rank), int(p.rank)};
    p.lora_b.dtype == DType::bf16 ? cross<bf16>(p, a) : cross<f16>(p, a);
}

void spectral_gradient_product(const SpectralPenaltyBwd& p) {
    const GradientArgs a{p.x, p.scaled_k, p.up, p.dloss, p.dlora_b, int(p.rows), int(p.experts * p.rank), int(p.rank)};
    p.lora_b.dtype == DType::bf16 ? gradient<bf16>(p, a) : gradient<f16>(p, a);
}

}  // namespace mtlora::cuda
