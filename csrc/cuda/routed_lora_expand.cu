// expand: out = residual + scaling * z_g B_flat[g]^T, or the published modules' sum over experts ("eager").
//
// A block owns `BO` outputs of one group for a run of tokens. Their experts stay in shared memory, so B is read once
// per run; residual tiles stream in by TMA, are added to in place and stream out. z is built in registers, which
// wgmma takes as its first operand.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "cuda/elements.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/routed_lora.h"

namespace mtlora::cuda {
namespace {

constexpr int kRows = 64;         // tokens of a tile
constexpr int kSlots = 4;         // tiles between load and store: two for each warpgroup
constexpr int kWeightPitch = 36;  // elements of a staged row of pi: 8 rows then touch 32 different banks
constexpr int kThreads = 320;     // two multiplying warpgroups, a loading and a storing warp

struct ExpandArgs {
    CUtensorMap b, residual, out;
    const void *h, *pi, *scale;
    float scaling;
    int tokens, groups, outputs, experts;  // outputs of one group
    int chunks;                            // of 64 k, from experts and rank
    int tiles_per_group, row_tiles;
    bool has_residual, into_residual;
    bool scaling_exact;  // scaling is a value of E
};

// R = rank, BO = outputs.
template <int R, int BO>
struct ExpandTile {
    static constexpr int kBoxColumns = BO < 64 ? BO : 64;  // of one TMA box: a swizzled row
    static constexpr int kBoxBytes = kRows * kBoxColumns * 2;
    static constexpr int kSlotBytes = kRows * BO * 2;
    static constexpr int kSlabBytes = BO * R * 2;  // one expert's outputs
    static constexpr int kChunkExperts = 64 / R;
    // Narrow tiles leave room for two blocks on a multiprocessor, which hide each other's latencies.
    static constexpr int kBlocks = BO == 32 && R <= 32 || BO == 64 && R <= 16 ? 2 : 1;
    // One block alone keeps to 168 registers a thread, which leaves room for a block of `project`.
    static constexpr int kMaxThreads = kBlocks == 2 ? kThreads : 384;
    static constexpr int shared_bytes(int chunks) {
        return 1024 + chunks * kChunkExperts * kSlabBytes + kSlots * kSlotBytes + 8 * 16 * kWeightPitch * 2 +
               256;  // alignment, B, tiles, pi, barriers
    }
};

// Offset of columns 8 j + 2 q (+ 1) of a row in a tile of BO columns.
template <int BO>
__device__ uint32_t tile_offset(int row, int j, int q) {
    constexpr int columns = BO < 64 ? BO : 64;
    return uint32_t(j * 8 / columns * kRows * columns * 2) +
           swizzled<columns * 2>(uint32_t(row * columns * 2 + j * 8 % columns * 2)) + uint32_t(4 * q);
}

// What a thread holds of one tile before its products: loaded a tile ahead, as it comes from L2.
template <class E, int R>
struct Routing {
    uint32_t h[2][R / 8];  // of rows t and t + 8, by blocks of 8 ranks
    E pi[2][8];            // of the warp's 16 tokens, experts 0 to 15 and 16 to 31

    __device__ void load(const ExpandArgs& p, int first_token, int group) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int t = first_token + lane / 4 + 8 * row;
            const E* at = static_cast<const E*>(p.h) + int64_t(t) * R + 2 * (lane % 4);
#pragma unroll
            for (int i = 0; i < R / 8; ++i) {
                h[row][i] = t < p.tokens ? *reinterpret_cast<const uint32_t*>(at + 8 * i) : 0;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int expert = lane % 16 + 16 * half;
            if (half == 1 && p.experts <= 16) break;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int t = first_token + 2 * i + lane / 16;
                const E* at = static_cast<const E*>(p.pi) + (int64_t(t) * p.groups + group) * p.experts + expert;
                pi[half][i] = t < p.tokens && expert < p.experts ? *at : rounded<E>(0.0f);
            }
        }
    }

    // pi to the warp's shared memory, zeros past the last expert.
    __device__ void stage(const ExpandArgs& p, E* weights) const {
        const int lane = threadIdx.x % 32;
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (half == 1 && p.experts <= 16) break;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                weights[(2 * i + lane / 16) * kWeightPitch + lane % 16 + 16 * half] = pi[half][i];
            }
        }
        __syncwarp();
    }
};

// z of one expert for a pair of ranks.
template <class E>
__device__ uint32_t mixed_h(const ExpandArgs& p, uint32_t h, E w, int expert) {
    const auto h2 = bits_as<Pair<E>>(h);
    if (p.scale == nullptr) return bits_as<uint32_t>(__hmul2_rn(twice<E>(w), h2));
    const float s = expert < p.experts ? to_float(static_cast<const E*>(p.scale)[expert]) : 0.0f;
    const float ws = to_float(w) * s;
    const float2 v = to_float2(h2);
    return bits_as<uint32_t>(rounded2<E>(ws * v.x, ws * v.y));
}

// acc = z B_flat^T over all k, 64 a step.
template <class E, int R, int BO>
__device__ void group_product(const ExpandArgs& p, const char* b, const E* weights, const uint32_t (&h)[2][R / 8],
                              float (&acc)[BO / 2]) {
    using Tile = ExpandTile<R, BO>;
    const int row = threadIdx.x % 32 / 4;
    // Without a swizzle (R = 8) the two halves of k are two experts.
    const uint64_t experts = smem_descriptor(b, Tile::kSlabBytes, 16 * R, swizzle_of(2 * R));
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
        const int first = chunk * Tile::kChunkExperts;
        E w[2][Tile::kChunkExperts];
#pragma unroll
        for (int i = 0; i < Tile::kChunkExperts; ++i) {
            w[0][i] = weights[row * kWeightPitch + first + i];
            w[1][i] = weights[(row + 8) * kWeightPitch + first + i];
        }
        uint32_t z[16];
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // blocks of 8 k
            const int expert = i * 8 / R, ranks = i % (R / 8);
            z[2 * i] = mixed_h<E>(p, h[0][ranks], w[0][expert], first + expert);
            z[2 * i + 1] = mixed_h<E>(p, h[1][ranks], w[1][expert], first + expert);
        }
        if (first + Tile::kChunkExperts > p.experts) {  // what pads k is zero, also where h is infinite
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (first + i * 8 / R >= p.experts) z[2 * i] = z[2 * i + 1] = 0;
            }
        }
        pin(z);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const uint64_t operand = advanced(experts, (first + k * 16 / R) * Tile::kSlabBytes + k * 16 % R * 2);
            wgmma<E, 0>(acc, z + 4 * k, operand, chunk > 0 || k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(acc);
        pin(z);
    }
}

// sum += E(E(pi_i E(s_i E(B_i h))) scaling) for the experts in order; `plain` without s and with a scaling that E
// holds.
template <class E, int R, int BO, bool plain>
__device__ void expert_sum(const ExpandArgs& p, const char* b, const E* weights, const uint32_t (&h)[2][R / 8],
                           Pair<E> (&sum)[BO / 4]) {
    const int row = threadIdx.x % 32 / 4;
    const Pair<E> scaling = twice<E>(rounded<E>(p.scaling));
    const uint64_t experts = smem_descriptor(b, 16, 16 * R, swizzle_of(2 * R));
    for (int expert = 0; expert < p.experts; ++expert) {
        const uint64_t slab = advanced(experts, expert * ExpandTile<R, BO>::kSlabBytes);
        float acc[BO / 2];
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < R / 16; ++k) {
            const uint32_t a[4] = {h[0][2 * k], h[1][2 * k], h[0][2 * k + 1], h[1][2 * k + 1]};
            wgmma<E, 0>(acc, a, advanced(slab, 32 * k), k > 0);
        }
        wgmma_commit();
        const Pair<E> w[2] = {twice<E>(weights[row * kWeightPitch + expert]),
                              twice<E>(weights[(row + 8) * kWeightPitch + expert])};
        const Pair<E> s = plain || !p.scale ? scaling : twice<E>(static_cast<const E*>(p.scale)[expert]);
        wgmma_wait<0>();
        pin(acc);
#pragma unroll
        for (int i = 0; i < BO / 4; ++i) {
            Pair<E> t = rounded2<E>(acc[2 * i], acc[2 * i + 1]);
            if (!plain && p.scale) t = __hmul2_rn(s, t);
            t = __hmul2_rn(w[i % 2], t);
            if (plain || p.scaling_exact) {
                t = __hmul2_rn(t, scaling);
            } else {
                const float2 v = to_float2(t);
                t = rounded2<E>(v.x * p.scaling, v.y * p.scaling);
            }
            sum[i] = __hadd2_rn(sum[i], t);
        }
    }
}

template <class E, int R, int BO, bool eager>
__global__ void __launch_bounds__(ExpandTile<R, BO>::kMaxThreads, ExpandTile<R, BO>::kBlocks)
    expand_kernel(const __grid_constant__ ExpandArgs p) {
    using Tile = ExpandTile<R, BO>;
    extern __shared__ char raw[];
    char* const b = raw + (1024 - smem_address(raw) % 1024) % 1024;
    const int b_bytes = p.chunks * Tile::kChunkExperts * Tile::kSlabBytes;
    char* const slots = b + b_bytes;
    E* const staged = reinterpret_cast<E*>(slots + kSlots * Tile::kSlotBytes);
    uint64_t* const b_full = reinterpret_cast<uint64_t*>(staged + 8 * 16 * kWeightPitch);
    uint64_t* const full = b_full + 1;       // the residual is there
    uint64_t* const ready = full + kSlots;   // the result is there
    uint64_t* const empty = ready + kSlots;  // the result has been read
    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    const int group = int(blockIdx.x) / p.tiles_per_group;
    const int column = int(blockIdx.x) % p.tiles_per_group * BO;
    const int begin = int(int64_t(p.row_tiles) * blockIdx.y / gridDim.y);
    const int count = int(int64_t(p.row_tiles) * (blockIdx.y + 1) / gridDim.y) - begin;

    if (threadIdx.x == 0) {
        barrier_init(b_full, 1);
        for (int s = 0; s < kSlots; ++s) {
            barrier_init(full + s, 1);
            barrier_init(ready + s, 128);
            barrier_init(empty + s, 1);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (warp == 8) {
        if (lane == 0) {  // B and residual do not come from `project`: no need to wait for it
            barrier_expect(b_full, b_bytes);
            tma_load(b, &p.b, b_full, 0, column, group, 0);
            for (int n = 0; n < count; ++n) {
                const int s = n % kSlots, round = n / kSlots;
                if (round > 0) barrier_wait(empty + s, (round - 1) & 1);
                if (!p.has_residual) {
                    barrier_arrive(full + s);
                    continue;
                }
                barrier_expect(full + s, Tile::kSlotBytes);
                for (int box = 0; box < BO / Tile::kBoxColumns; ++box) {
                    tma_load(slots + s * Tile::kSlotBytes + box * Tile::kBoxBytes, &p.residual, full + s,
                             column + box * Tile::kBoxColumns, group, (begin + n) * kRows);
                }
            }
        }
        return;
    }
    if (warp == 9) {
        if (lane == 0) {
            grid_dependency_wait();
            for (int n = 0; n < count; ++n) {
                const int s = n % kSlots;
                barrier_wait(ready + s, (n / kSlots) & 1);
                for (int box = 0; box < BO / Tile::kBoxColumns; ++box) {
                    if (column + box * Tile::kBoxColumns >= p.outputs) break;
                    tma_store(&p.out, slots + s * Tile::kSlotBytes + box * Tile::kBoxBytes,
                              column + box * Tile::kBoxColumns, group, (begin + n) * kRows);
                }
                tma_store_commit();
                tma_store_wait_read<0>();
                barrier_arrive(empty + s);
            }
        }
        return;
    }

    grid_dependency_wait();
    E* const weights = staged + warp * 16 * kWeightPitch;
    barrier_wait(b_full, 0);
    const int q = lane % 4, row = warp % 4 * 16 + lane / 4;
    const auto first_token = [&](int n) { return (begin + n) * kRows + warp % 4 * 16; };
    Routing<E, R> next;
    next.load(p, first_token(warp / 4), group);
    for (int n = warp / 4; n < count; n += 2) {
        uint32_t h[2][R / 8];
        memcpy(h, next.h, sizeof(h));
        next.stage(p, weights);
        if (n + 2 < count) next.load(p, first_token(n + 2), group);
        const int s = n % kSlots;
        char* const slot = slots + s * Tile::kSlotBytes;
        if constexpr (eager) {
            Pair<E> sum[BO / 4];  // [2 j] of row, [2 j + 1] of row + 8
            barrier_wait(full + s, (n / kSlots) & 1);
#pragma unroll
            for (int i = 0; i < BO / 4; ++i) {
                const char* at = slot + tile_offset<BO>(row + i % 2 * 8, i / 2, q);
                sum[i] = p.into_residual ? *reinterpret_cast<const Pair<E>*>(at) : twice<E>(rounded<E>(0.0f));
            }
            if (p.scale == nullptr && p.scaling_exact)
                expert_sum<E, R, BO, true>(p, b, weights, h, sum);
            else
                expert_sum<E, R, BO, false>(p, b, weights, h, sum);
#pragma unroll
            for (int i = 0; i < BO / 4; ++i) {
                auto* at = reinterpret_cast<Pair<E>*>(slot + tile_offset<BO>(row + i % 2 * 8, i / 2, q));
                *at = p.has_residual && !p.into_residual ? __hadd2_rn(*at, sum[i]) : sum[i];
            }
        } else {
            float acc[BO / 2];
            group_product<E, R, BO>(p, b, weights, h, acc);
            barrier_wait(full + s, (n / kSlots) & 1);
#pragma unroll
            for (int i = 0; i < BO / 4; ++i) {
                auto* at = reinterpret_cast<Pair<E>*>(slot + tile_offset<BO>(row + i % 2 * 8, i / 2, q));
                float low = acc[2 * i] * p.scaling, high = acc[2 * i + 1] * p.scaling;
                if (p.has_residual) {
                    const float2 v = to_float2(*at);
                    low = v.x + low;
                    high = v.y + high;
                }
                *at = rounded2<E>(low, high);
            }
        }
        fence_async_proxy();
        barrier_arrive(ready + s);
    }
}

// Runs of tokens per column tile: the fewest rounds of blocks, counting a block's start as 1.5 tiles (its B).
int token_splits(int64_t column_tiles, int64_t row_tiles, int64_t blocks) {
    int best = 1;
    double best_cost = 1e30;
    for (int splits = 1; splits <= std::min<int64_t>(row_tiles, 2 * blocks); ++splits) {
        const double cost =
            double(ceil_div(column_tiles * splits, blocks)) * (double(ceil_div(row_tiles, splits)) + 1.5);
        if (cost < best_cost) {
            best = splits;
            best_cost = cost;
        }
    }
    return best;
}

template <class E, int R, int BO, bool eager>
void launch_expand(const RoutedLoraFwd& f, int chunks) {
    using Tile = ExpandTile<R, BO>;
    const int64_t size = f.d_out / f.groups;
    const int row_tiles = int(ceil_div(f.tokens, kRows)), experts = chunks * Tile::kChunkExperts;
    ExpandArgs p = {};
    p.b = tensor_map(f.lora_b.data, f.compute_dtype,
                     {{R, 1, R}, {size, R, BO}, {f.groups, size * R, 1}, {f.experts, f.d_out * R, experts}});
    if (f.residual.data) {
        p.residual =
            tensor_map(f.residual.data, f.compute_dtype,
                       {{size, 1, Tile::kBoxColumns}, {f.groups, size, 1}, {f.tokens, f.residual.stride[0], kRows}});
    }
    p.out = tensor_map(f.out.data, f.compute_dtype,
                       {{size, 1, Tile::kBoxColumns}, {f.groups, size, 1}, {f.tokens, f.d_out, kRows}});
    p.h = f.h.data;
    p.pi = f.pi.data;
    p.scale = f.expert_scale.data;
    p.scaling = f.scaling;
    p.tokens = int(f.tokens);
    p.groups = int(f.groups);
    p.outputs = int(size);
    p.experts = int(f.experts);
    p.chunks = chunks;
    p.tiles_per_group = int(ceil_div(size, BO));
    p.row_tiles = row_tiles;
    p.has_residual = f.residual.data != nullptr;
    p.into_residual = f.accumulate_into_residual;
    p.scaling_exact = f.scaling_exact;
    const int64_t column_tiles = f.groups * p.tiles_per_group;
    const int resident = Tile::kBlocks * Tile::shared_bytes(chunks) <= kMaxSharedBytes ? Tile::kBlocks : 1;
    const dim3 grid(unsigned(column_tiles),
                    unsigned(token_splits(column_tiles, row_tiles, multiprocessors() * resident)));
    launch<expand_kernel<E, R, BO, eager>>("routed_lora expand", grid, kThreads, Tile::shared_bytes(chunks), f.stream,
                                           true, p);
}

template <class E, int R, bool eager>
void choose_outputs(const RoutedLoraFwd& f) {
    const int64_t size = f.d_out / f.groups, row_tiles = ceil_div(f.tokens, kRows);
    const int chunks = int(ceil_div(f.experts * R, 64));
    auto padded = [&](int outputs) { return ceil_div(size, outputs) * outputs; };
    // Narrower tiles where the group's tail would waste a quarter of the products, where B does not fit, and where
    // there are too few blocks for the multiprocessors. The sum over experts is bound by latency: 64, two blocks.
    int outputs = eager ? 64 : 128;
    auto too_wide = [&] {
        const int bytes =
            outputs == 128 ? ExpandTile<R, 128>::shared_bytes(chunks) : ExpandTile<R, 64>::shared_bytes(chunks);
        return padded(outputs) * 4 > padded(32) * 5 || bytes > kMaxSharedBytes ||
               row_tiles * f.groups * ceil_div(size, outputs) < multiprocessors() * 3 / 4;
    };
    while (outputs > 32 && too_wide()) outputs /= 2;
    if (outputs == 32) return launch_expand<E, R, 32, eager>(f, chunks);
    if constexpr (!eager) {
        if (outputs == 128) return launch_expand<E, R, 128, eager>(f, chunks);
    }
    return launch_expand<E, R, 64, eager>(f, chunks);
}

template <class E>
void choose_rank(const RoutedLoraFwd& f) {
    switch (f.rank) {
        case 8:
            if (!f.eager) return choose_outputs<E, 8, false>(f);
            break;
        case 16:
            return f.eager ? choose_outputs<E, 16, true>(f) : choose_outputs<E, 16, false>(f);
        case 32:
            return f.eager ? choose_outputs<E, 32, true>(f) : choose_outputs<E, 32, false>(f);
        case 64:
            return f.eager ? choose_outputs<E, 64, true>(f) : choose_outputs<E, 64, false>(f);
    }
    throw std::runtime_error("routed_lora expand: rank must be 16, 32 or 64, or 8 with numerics \"fp32\"");
}

}  // namespace

void expand(const RoutedLoraFwd& f) {
    if (f.compute_dtype == DType::bf16)
        choose_rank<bf16>(f);
    else
        choose_rank<f16>(f);
}

}  // namespace mtlora::cuda
