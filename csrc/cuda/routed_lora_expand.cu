// expand: out = residual + scaling * z_g B_flat[g]^T, or the published modules' sum over experts ("eager").
//
// A block owns `BO` outputs of one group for a run of tokens. Their experts stay in shared memory, so B is read once
// per run; residual tiles stream in by TMA, are added to in place and stream out. z is built in registers, which
// wgmma takes as its first operand.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "cuda/elements.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/routed_lora.h"
#include "cuda/routed_lora_expand.cuh"

namespace mtlora::cuda {
namespace {

// What a thread holds of one tile before its products: loaded a tile ahead, as it comes from L2.
template <class E, int R>
struct Routing {
    uint32_t h[2][R / 8];  // of rows t and t + 8, by blocks of 8 ranks
    uint32_t pi[2][8];     // of the warp's 16 tokens, experts 0 to 15 and 16 to 31: words of pairs or single experts

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
        const E* const tile = static_cast<const E*>(p.pi) + (int64_t(first_token) * p.groups + group) * p.experts;
        const int pitch = p.groups * p.experts, tokens = p.tokens - first_token;
        if (p.whole_units) {  // a lane takes 8 experts of one token
            const E* const at = tile + lane / 2 * pitch + lane % 2 * 8;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (half == 1 && p.experts <= 16) break;
                uint4 unit = {};
                if (lane / 2 < tokens && lane % 2 * 8 + 16 * half < p.experts) {
                    unit = *reinterpret_cast<const uint4*>(at + 16 * half);
                }
                memcpy(pi[half], &unit, sizeof(unit));
            }
        } else {
            const E* const at = tile + lane / 16 * pitch + lane % 16;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (half == 1 && p.experts <= 16) break;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const bool exists = 2 * i + lane / 16 < tokens && lane % 16 + 16 * half < p.experts;
                    pi[half][i] = exists ? *reinterpret_cast<const uint16_t*>(at + 2 * i * pitch + 16 * half) : 0;
                }
            }
        }
    }

    // pi to the warp's shared memory, zeros past the last expert. Returns the `magnitude` of what this lane holds.
    __device__ uint32_t stage(const ExpandArgs& p, E* weights) const {
        const int lane = threadIdx.x % 32;
        uint32_t top = 0;
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (half == 1 && p.experts <= 16) break;
            const uint32_t (&w)[8] = pi[half];
            if (p.whole_units) {
                E* const at = weights + lane / 2 * kWeightPitch + lane % 2 * 8 + 16 * half;
                *reinterpret_cast<uint4*>(at) = make_uint4(w[0], w[1], w[2], w[3]);
                top = magnitude(magnitude(magnitude(magnitude(top, w[0]), w[1]), w[2]), w[3]);
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    E* const at = weights + (2 * i + lane / 16) * kWeightPitch + lane % 16 + 16 * half;
                    *reinterpret_cast<uint16_t*>(at) = uint16_t(w[i]);
                    top = magnitude(top, w[i]);
                }
            }
        }
        __syncwarp();
        return top;
    }
};

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
    uint64_t* const full = b_full + 1;                                    // the residual is there
    uint64_t* const ready = full + kSlots;                                // the result is there
    uint64_t* const empty = ready + kSlots;                               // the result has been read
    uint32_t* const b_top = reinterpret_cast<uint32_t*>(empty + kSlots);  // see `fuse_limit`
    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    const int group = int(blockIdx.x) / p.tiles_per_group;
    const int column = int(blockIdx.x) % p.tiles_per_group * BO;
    const int begin = int(int64_t(p.row_tiles) * blockIdx.y / gridDim.y);
    const int count = int(int64_t(p.row_tiles) * (blockIdx.y + 1) / gridDim.y) - begin;

    if (threadIdx.x == 0) {
        *b_top = 0;
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
            if (BO > 32 || !p.wide) prefetch(&p.out);
            grid_dependency_wait();
            for (int n = 0; n < count; ++n) {
                const int s = n % kSlots;
                barrier_wait(ready + s, (n / kSlots) & 1);
                for (int box = 0; box < BO / Tile::kBoxColumns; ++box) {
                    if ((BO == 32 && p.wide) || column + box * Tile::kBoxColumns >= p.outputs) break;
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

    E* const weights = staged + warp * 16 * kWeightPitch;
    barrier_wait(b_full, 0);
    const auto first_token = [&](int n) { return (begin + n) * kRows + warp % 4 * 16; };
    float h_limit = 0;
    if (eager && p.power_of_two) h_limit = fuse_limit<E, R>(p, b, b_bytes, b_top);
    // Up to 64 tokens the wait for `project` is long enough to go through the loop once before, on zeros and on a slot
    // that nobody copies: its instructions are in the cache when they are needed.
    Routing<E, R> next = {};
    for (int n = warp / 4 - (p.row_tiles == 1 ? 2 : 0); n < count; n += 2) {
        const bool rehearsal = n < 0;
        if (n == warp / 4) {
            grid_dependency_wait();
            next.load(p, first_token(n), group);
        }
        uint32_t h[2][R / 8];
        memcpy(h, next.h, sizeof(h));
        const uint32_t pi_top = next.stage(p, weights);
        if (!rehearsal && n + 2 < count) next.load(p, first_token(n + 2), group);
        const int s = (n + kSlots) % kSlots;
        char* const slot = slots + s * Tile::kSlotBytes;
        const auto wait_for_residual = [&] {
            if (!rehearsal) barrier_wait(full + s, (n / kSlots) & 1);
        };
        if constexpr (eager) {
            Pair<E> sum[BO / 4];
#pragma unroll
            for (int i = 0; i < BO / 4; ++i) sum[i] = twice<E>(rounded<E>(0.0f));
            if (p.into_residual) {
                wait_for_residual();
                read_tile<E, BO>(slot, [&](int i, Pair<E> v) { sum[i] = v; });
            }
            bool fuse = p.power_of_two;
            if (fuse) {
                uint32_t h_top = 0;
                for (int i = 0; i < R / 8; ++i) h_top = magnitude(magnitude(h_top, h[0][i]), h[1][i]);
                fuse = larger_half<E>(h_top) <= h_limit && larger_half<E>(pi_top) <= 1;
                fuse = warp < 4 ? named_barrier_all<1, 128>(fuse) : named_barrier_all<2, 128>(fuse);
            }
            if (fuse)
                expert_sum<E, R, BO, Sum::fused>(p, b, weights, h, sum);
            else if (!p.scale && p.scaling_exact)
                expert_sum<E, R, BO, Sum::rounded>(p, b, weights, h, sum);
            else
                expert_sum<E, R, BO, Sum::scaled>(p, b, weights, h, sum);
            if (!p.into_residual) {
                wait_for_residual();
                if (p.has_residual) {
                    read_tile<E, BO>(slot, [&](int i, Pair<E> v) { sum[i] = __hadd2_rn(v, sum[i]); });
                }
            }
            write_tile<BO>(slot, [&](int i) { return sum[i]; });
        } else {
            float acc[BO / 2];
            group_product<E, R, BO>(p, b, weights, h, acc);
#pragma unroll
            for (int i = 0; i < BO / 2; ++i) acc[i] *= p.scaling;
            wait_for_residual();
            if (p.has_residual) {
                read_tile<E, BO>(slot, [&](int i, Pair<E> pair) {
                    const float2 v = to_float2(pair);
                    acc[2 * i] = v.x + acc[2 * i];
                    acc[2 * i + 1] = v.y + acc[2 * i + 1];
                });
            }
            if (BO == 32 && p.wide && !rehearsal)
                write_wide<BO>(p, first_token(n), group, column, acc);
            else
                write_tile<BO>(slot, [&](int i) { return rounded2<E>(acc[2 * i], acc[2 * i + 1]); });
        }
        fence_async_proxy();
        if (!rehearsal) barrier_arrive(ready + s);
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
    if (f.out.dtype == DType::f32) {
        p.wide = static_cast<float*>(f.out.data);
    } else {
        p.out = tensor_map(f.out.data, f.compute_dtype,
                           {{size, 1, Tile::kBoxColumns}, {f.groups, size, 1}, {f.tokens, f.d_out, kRows}});
    }
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
    int exponent;
    p.power_of_two = !p.scale && p.scaling_exact && p.scaling >= 1 && std::frexp(p.scaling, &exponent) == 0.5f;
    p.whole_units = f.experts % 8 == 0;
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
    int outputs = f.out.dtype == DType::f32 ? 32 : eager ? 64 : 128;
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
