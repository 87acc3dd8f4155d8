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

namespace mtlora::cuda {
namespace {

constexpr int kRows = 64;         // tokens of a tile
constexpr int kSlots = 4;         // tiles between load and store: two for each warpgroup
constexpr int kWeightPitch = 40;  // elements of a staged row of pi: 16-byte units of 8 rows lie in different banks
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
    bool power_of_two;
    bool whole_units;    // rows of pi are whole aligned units of 16 bytes
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

// Shared-memory address of the row that this lane gives for columns 16 j to 16 j + 15 of its warp's 16 rows of a tile:
// matrices of rows 0 to 7 and 8 to 15 of the first 8 columns, then of the others.
template <int BO>
__device__ uint32_t tile_row(const char* tile, int j) {
    constexpr int columns = ExpandTile<16, BO>::kBoxColumns;
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    const uint32_t first = smem_address(tile) + swizzled<columns * 2>(uint32_t(row * columns * 2 + lane / 16 * 16));
    return (first ^ uint32_t(16 * j % columns * 2)) + uint32_t(16 * j / columns * kRows * columns * 2);
}

// The larger absolute values of two pairs of elements, as bits: NaN is the largest.
__device__ inline uint32_t magnitude(uint32_t top, uint32_t pair) {
    return __vmaxu2(top, pair & 0x7fff7fff);
}
template <class E>
__device__ float larger_half(uint32_t top) {
    return to_float(bits_as<E>(uint16_t(max(top & 0xffff, top >> 16))));
}

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
        const int row_pitch = p.groups * p.experts;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (half == 1 && p.experts <= 16) break;
            if (p.whole_units) {  // a lane takes 8 experts of one token
                const int expert = lane % 2 * 8 + 16 * half;
                uint4 unit = {};
                if (first_token + lane / 2 < p.tokens && expert < p.experts) {
                    unit = *reinterpret_cast<const uint4*>(tile + lane / 2 * row_pitch + expert);
                }
                memcpy(pi[half], &unit, sizeof(unit));
                continue;
            }
            const int expert = lane % 16 + 16 * half;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int t = 2 * i + lane / 16;
                const bool exists = first_token + t < p.tokens && expert < p.experts;
                pi[half][i] = exists ? *reinterpret_cast<const uint16_t*>(tile + t * row_pitch + expert) : 0;
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
            if (p.whole_units) {
                auto* at = reinterpret_cast<uint4*>(weights + lane / 2 * kWeightPitch + lane % 2 * 8 + 16 * half);
                *at = {pi[half][0], pi[half][1], pi[half][2], pi[half][3]};
                for (int i = 0; i < 4; ++i) top = magnitude(top, pi[half][i]);
                continue;
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                auto* at = weights + (2 * i + lane / 16) * kWeightPitch + lane % 16 + 16 * half;
                *reinterpret_cast<uint16_t*>(at) = uint16_t(pi[half][i]);
                top = magnitude(top, pi[half][i]);
            }
        }
        __syncwarp();
        return top;
    }
};

// Neighbouring experts' weights of one token.
template <class E, int n>
struct alignas(n * sizeof(E)) Weights {
    E of[n];
};
template <int n, class E>
__device__ Weights<E, n> weights_of(const E* staged, int row, int first) {
    return *reinterpret_cast<const Weights<E, n>*>(staged + row * kWeightPitch + first);
}

// z of one expert for a pair of ranks.
template <class E>
__device__ uint32_t mixed_h(uint32_t h, Pair<E> w) {
    return bits_as<uint32_t>(__hmul2_rn(w, bits_as<Pair<E>>(h)));
}
template <class E>
__device__ uint32_t mixed_h(uint32_t h, Pair<E> w, float s) {
    const float2 v = to_float2(bits_as<Pair<E>>(h));
    const float ws = to_float2(w).x * s;
    return bits_as<uint32_t>(rounded2<E>(ws * v.x, ws * v.y));
}

// acc = z B_flat^T over all k, 64 a step.
template <class E, int R, int BO>
__device__ void group_product(const ExpandArgs& p, const char* b, const E* weights, const uint32_t (&h)[2][R / 8],
                              float (&acc)[BO / 2]) {
    using Tile = ExpandTile<R, BO>;
    constexpr int kExperts = Tile::kChunkExperts;
    const int row = threadIdx.x % 32 / 4;
    // Without a swizzle (R = 8) the two halves of k are two experts.
    const uint64_t experts = smem_descriptor(b, Tile::kSlabBytes, 16 * R, swizzle_of(2 * R));
    for (int first = 0; first < p.experts; first += kExperts) {
        const auto w0 = weights_of<kExperts>(weights, row, first), w1 = weights_of<kExperts>(weights, row + 8, first);
        uint32_t z[16];
        if (p.scale) {
            const E* const scale = static_cast<const E*>(p.scale) + first;
#pragma unroll
            for (int i = 0; i < 8; ++i) {  // blocks of 8 k
                const int expert = i * 8 / R, ranks = i % (R / 8);
                const float s = first + expert < p.experts ? to_float(scale[expert]) : 0.0f;
                z[2 * i] = mixed_h<E>(h[0][ranks], twice<E>(w0.of[expert]), s);
                z[2 * i + 1] = mixed_h<E>(h[1][ranks], twice<E>(w1.of[expert]), s);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int expert = i * 8 / R, ranks = i % (R / 8);
                z[2 * i] = mixed_h<E>(h[0][ranks], twice<E>(w0.of[expert]));
                z[2 * i + 1] = mixed_h<E>(h[1][ranks], twice<E>(w1.of[expert]));
            }
        }
        if (first + kExperts > p.experts) {  // what pads k is zero, also where h is infinite
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
            wgmma<E, 0>(acc, z + 4 * k, operand, first > 0 || k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(acc);
        pin(z);
    }
}

// How `expert_sum` adds one expert: t = E(pi_i e), e = E(B_i h).
enum class Sum {
    scaled,   // sum = E(sum + E(scaling E(pi_i E(s_i e)))), any scaling
    rounded,  // without s and with a scaling that E holds: packed arithmetic throughout
    fused,    // sum = E(sum + scaling t): the same where scaling t is exact, see `may_fuse`
};

template <class E, int R>
__device__ void start_product(const uint32_t (&h)[2][R / 8], uint64_t outputs, float (&acc)[16]) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < R / 16; ++k) {
        const uint32_t a[4] = {h[0][2 * k], h[1][2 * k], h[0][2 * k + 1], h[1][2 * k + 1]};
        wgmma<E, 0>(acc, a, advanced(outputs, 32 * k), k > 0);
    }
    wgmma_commit();
}

// The `count` experts from `first` in order, 32 outputs at a time; a product runs while the one before it is added.
template <class E, int R, int BO, Sum kind, int count>
__device__ void add_experts(const ExpandArgs& p, int first, uint64_t experts, const E* weights,
                            const uint32_t (&h)[2][R / 8], Pair<E> (&sum)[BO / 4]) {
    constexpr int kParts = BO / 32, kProducts = count * kParts;
    const uint64_t first_slab = advanced(experts, first * ExpandTile<R, BO>::kSlabBytes);
    const int row = threadIdx.x % 32 / 4;
    const Weights<E, count> w[2] = {weights_of<count>(weights, row, first), weights_of<count>(weights, row + 8, first)};
    const Pair<E> scaling = twice<E>(rounded<E>(p.scaling));
    float acc[2][16];
    start_product<E, R>(h, first_slab, acc[0]);
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
        const int expert = n / kParts, part = n % kParts;
        if (n + 1 < kProducts) {
            start_product<E, R>(h, advanced(first_slab, (n + 1) * 32 * R * 2), acc[(n + 1) % 2]);
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        pin(acc[n % 2]);
        const Pair<E> s = kind == Sum::scaled && p.scale ? twice<E>(static_cast<const E*>(p.scale)[first + expert]) : scaling;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            Pair<E>& total = sum[part * 8 + i];
            Pair<E> t = rounded2<E>(acc[n % 2][2 * i], acc[n % 2][2 * i + 1]);
            if (kind == Sum::scaled && p.scale) t = __hmul2_rn(s, t);
            t = __hmul2_rn(twice<E>(w[i % 2].of[expert]), t);
            if constexpr (kind == Sum::fused) {
                total = __hfma2(t, scaling, total);
            } else {
                if (kind == Sum::rounded || p.scaling_exact) {
                    t = __hmul2_rn(t, scaling);
                } else {
                    const float2 v = to_float2(t);
                    t = rounded2<E>(v.x * p.scaling, v.y * p.scaling);
                }
                total = __hadd2_rn(total, t);
            }
        }
    }
}

// sum += every expert in order.
template <class E, int R, int BO, Sum kind>
__device__ void expert_sum(const ExpandArgs& p, const char* b, const E* weights, const uint32_t (&h)[2][R / 8],
                           Pair<E> (&sum)[BO / 4]) {
    const uint64_t experts = smem_descriptor(b, 16, 16 * R, swizzle_of(2 * R));
    int first = 0;
    for (; first + 4 <= p.experts; first += 4) add_experts<E, R, BO, kind, 4>(p, first, experts, weights, h, sum);
    for (; first < p.experts; ++first) add_experts<E, R, BO, kind, 1>(p, first, experts, weights, h, sum);
}

// The |h| up to which, where |pi| <= 1, no scaling E(pi_i E(B_i h)) of this block overflows: then
// E(sum + E(scaling t)) = E(sum + scaling t) for a scaling of 1, 2, 4, ...: the product is exact.
template <class E, int R>
__device__ float fuse_limit(const ExpandArgs& p, const char* b, int b_bytes, uint32_t* b_top) {
    constexpr float kLargest = std::is_same_v<E, bf16> ? 0x1p127f : 0x1p15f;
    uint32_t top = 0;
    for (int i = threadIdx.x * 16; i < b_bytes; i += 256 * 16) {
        const auto v = *reinterpret_cast<const uint4*>(b + i);
        top = magnitude(magnitude(magnitude(magnitude(top, v.x), v.y), v.z), v.w);
    }
    top = __reduce_max_sync(~0u, max(top & 0xffff, top >> 16));
    if (threadIdx.x % 32 == 0) atomicMax(b_top, top);
    named_barrier(1, 256);
    return kLargest / 4 / R / p.scaling / larger_half<E>(*b_top);
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
    uint32_t* const b_top = reinterpret_cast<uint32_t*>(empty + kSlots);
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
        if (lane == 0) {
            prefetch(&p.b);
            if (p.has_residual) prefetch(&p.residual);  // B and residual do not come from `project`: no need to wait for it
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
            prefetch(&p.out);
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
    const auto first_token = [&](int n) { return (begin + n) * kRows + warp % 4 * 16; };
    float h_limit = 0;  // of |h|, below which sums may be fused
    if (eager && p.power_of_two) h_limit = fuse_limit<E, R>(p, b, b_bytes, b_top);
    Routing<E, R> next;
    next.load(p, first_token(warp / 4), group);
    for (int n = warp / 4; n < count; n += 2) {
        uint32_t h[2][R / 8];
        memcpy(h, next.h, sizeof(h));
        const uint32_t pi_top = next.stage(p, weights);
        if (n + 2 < count) next.load(p, first_token(n + 2), group);
        const int s = n % kSlots;
        char* const slot = slots + s * Tile::kSlotBytes;
        uint32_t pairs[4];  // of tile_row: columns 2 q (+ 1) of the row and of row + 8, then 8 columns further
        if constexpr (eager) {
            Pair<E> sum[BO / 4];
#pragma unroll
            for (int i = 0; i < BO / 4; ++i) sum[i] = twice<E>(rounded<E>(0.0f));
            if (p.into_residual) {
                barrier_wait(full + s, (n / kSlots) & 1);
#pragma unroll
                for (int j = 0; j < BO / 16; ++j) {
                    load_matrices(pairs, tile_row<BO>(slot, j));
#pragma unroll
                    for (int i = 0; i < 4; ++i) sum[4 * j + i] = bits_as<Pair<E>>(pairs[i]);
                }
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
                barrier_wait(full + s, (n / kSlots) & 1);
                if (p.has_residual) {
#pragma unroll
                    for (int j = 0; j < BO / 16; ++j) {
                        load_matrices(pairs, tile_row<BO>(slot, j));
#pragma unroll
                        for (int i = 0; i < 4; ++i) {
                            sum[4 * j + i] = __hadd2_rn(bits_as<Pair<E>>(pairs[i]), sum[4 * j + i]);
                        }
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < BO / 16; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) pairs[i] = bits_as<uint32_t>(sum[4 * j + i]);
                store_matrices(tile_row<BO>(slot, j), pairs);
            }
        } else {
            float acc[BO / 2];
            group_product<E, R, BO>(p, b, weights, h, acc);
#pragma unroll
            for (int i = 0; i < BO / 2; ++i) acc[i] *= p.scaling;
            barrier_wait(full + s, (n / kSlots) & 1);
            if (p.has_residual) {
#pragma unroll
                for (int j = 0; j < BO / 16; ++j) {
                    load_matrices(pairs, tile_row<BO>(slot, j));
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float2 v = to_float2(bits_as<Pair<E>>(pairs[i]));
                        acc[8 * j + 2 * i] = v.x + acc[8 * j + 2 * i];
                        acc[8 * j + 2 * i + 1] = v.y + acc[8 * j + 2 * i + 1];
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < BO / 16; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    pairs[i] = bits_as<uint32_t>(rounded2<E>(acc[8 * j + 2 * i], acc[8 * j + 2 * i + 1]));
                }
                store_matrices(tile_row<BO>(slot, j), pairs);
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
    p.power_of_two = !p.scale && p.scaling_exact && p.scaling >= 1 && p.scaling == std::exp2(std::floor(std::log2(p.scaling)));
    p.whole_units = f.experts % 8 == 0 && reinterpret_cast<uintptr_t>(f.pi.data) % 16 == 0;
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
