// project: h = E(act(x A^T)) and pi = E(softmax(E(x R^T))), x read once per block of router columns.
//
// A block owns 64 or 128 tokens and `RC` padded router columns (whole groups); one warp copies tiles of 64 features by
// TMA, one or two warpgroups multiply them. The softmax runs on the accumulators: a group's logits of one token lie in
// the four threads of a quad.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "cuda/elements.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/routed_lora.h"

namespace mtlora::cuda {
namespace {

constexpr int kDepth = 64;  // features of a slab of a tile: 128 bytes, one swizzled row

struct ProjectArgs {
    CUtensorMap x, lora_a, router;
    void *h, *pi;
    int tokens, steps, experts, groups;
    int padded;                      // router rows a group, zero rows included
    int stages, slabs, stage_bytes;  // a stage is one step's slabs of x, then of A, then of the router
    int x_rows;                      // of a slab of x: 8 for up to 8 tokens, whose rows then repeat down the tile
    bool relu, has_router;
    bool split;  // block 0 of the columns computes h alone
};

// R = rank, RC = router columns of a block.
template <int R, int RC>
struct ProjectTile {
    // Wide blocks take 128 tokens, and two of them share each tile of the router: L2 would be the bottleneck.
    static constexpr bool kWide = RC >= 128;
    static constexpr int kWarpgroups = kWide ? 2 : 1;
    static constexpr int kCluster = kWide ? 2 : 1;
    static constexpr int kRows = 64 * kWarpgroups;
    static constexpr int kThreads = 128 * kWarpgroups + 32;
    static constexpr int kABytes = R * 128, kRouterBytes = RC * 128;
};

// Halving tree over the padded experts of a group, e[j] holding columns 8 j + 2 q and 8 j + 2 q + 1 of thread q.
template <int J>
__device__ float tree_sum(const float (&e)[2 * J]) {
    float low = e[0], high = e[1];
    if constexpr (J == 2) {
        low = e[0] + e[2];
        high = e[1] + e[3];
    } else if constexpr (J == 4) {
        low = (e[0] + e[4]) + (e[2] + e[6]);
        high = (e[1] + e[5]) + (e[3] + e[7]);
    }
    low += __shfl_xor_sync(~0u, low, 2);
    high += __shfl_xor_sync(~0u, high, 2);
    low += __shfl_xor_sync(~0u, low, 1);
    high += __shfl_xor_sync(~0u, high, 1);
    return low + high;
}

// Softmax of the groups of this block for rows `token` and `token` + 8.
template <class E, int RC, int J>
__device__ void write_pi(const ProjectArgs& p, const float (&logits)[RC / 2], int token, int first_group) {
    const int q = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < RC / (8 * J); ++i) {
        const int group = first_group + i;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float e[2 * J];
            float top = -INFINITY;
#pragma unroll
            for (int j = 0; j < 2 * J; ++j) {
                e[j] = to_float(rounded<E>(logits[(i * J + j / 2) * 4 + half * 2 + j % 2]));
                if (j / 2 * 8 + 2 * q + j % 2 < p.experts) top = fmaxf(top, e[j]);
            }
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
#pragma unroll
            for (int j = 0; j < 2 * J; ++j) {
                e[j] = j / 2 * 8 + 2 * q + j % 2 < p.experts ? expf(e[j] - top) : 0.0f;
            }
            const float sum = tree_sum<J>(e);
            const int t = token + 8 * half;
            if (t < p.tokens && group < p.groups) {
                E* pi = static_cast<E*>(p.pi) + (int64_t(t) * p.groups + group) * p.experts;
#pragma unroll
                for (int j = 0; j < 2 * J; ++j) {
                    const int column = j / 2 * 8 + 2 * q + j % 2;
                    if (column < p.experts) pi[column] = rounded<E>(__fdiv_rn(e[j], sum));
                }
            }
        }
    }
}

// The two products of this warpgroup's 64 tokens over all features. Compiled for each choice: a branch between
// wgmma instructions would serialise them.
template <class E, int R, int RC, bool has_h, bool has_router>
__device__ void multiply(const ProjectArgs& p, const char* tiles, uint64_t* full, uint64_t* empty, float (&h)[R / 2],
                         float (&logits)[RC / 2]) {
    using Tile = ProjectTile<R, RC>;
    const int warpgroup = Tile::kWide ? uniform(threadIdx.x / 128) : 0, lane = threadIdx.x % 32;
    const auto release = [&](int s) {
        if (lane < Tile::kCluster) {
            if constexpr (Tile::kCluster > 1)
                barrier_arrive(empty + s, lane);
            else
                barrier_arrive(empty + s);
        }
    };
    const int a_at = p.slabs * p.x_rows * 128, router_at = a_at + (has_h ? p.slabs * Tile::kABytes : 0);
    const uint64_t first_x = smem_descriptor(tiles + warpgroup * 64 * 128, 16, p.x_rows == 8 ? 0 : 1024, Swizzle::b128);
    const uint64_t first_a = smem_descriptor(tiles + a_at, 16, 1024, Swizzle::b128);
    const uint64_t first_r = smem_descriptor(tiles + router_at, 16, 1024, Swizzle::b128);
    int s = 0, phase = 0, previous = 0, slab = 0;
    for (int i = 0; i < p.steps * p.slabs; ++i) {
        const uint64_t x = advanced(first_x, s * p.stage_bytes + slab * p.x_rows * 128);
        const uint64_t a = advanced(first_a, s * p.stage_bytes + slab * Tile::kABytes);
        const uint64_t r = advanced(first_r, s * p.stage_bytes + slab * Tile::kRouterBytes);
        if (slab == 0) barrier_wait(full + s, phase);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {  // 16 k are 32 bytes of a row
            if constexpr (has_h) wgmma<E, 0, 0>(h, advanced(x, 32 * k), advanced(a, 32 * k), true);
            if constexpr (has_router) wgmma<E, 0, 0>(logits, advanced(x, 32 * k), advanced(r, 32 * k), true);
        }
        wgmma_commit();
        if constexpr (Tile::kWide) {  // few stages: give this one back at once; the other warpgroup multiplies
                                      // meanwhile
            wgmma_wait<0>();
            release(s);
        } else {
            wgmma_wait<1>();
            if (slab == 0 && i > 0) release(previous);
        }
        if (++slab == p.slabs) {
            slab = 0;
            previous = s;
            if (++s == p.stages) {
                s = 0;
                phase ^= 1;
            }
        }
    }
    wgmma_wait<0>();
    pin(h);
    pin(logits);
}

template <class E, int R, int RC>
__global__ void __cluster_dims__(1, ProjectTile<R, RC>::kCluster, 1)
    __launch_bounds__(ProjectTile<R, RC>::kThreads, RC <= 64 ? 3 : 1)
        project_kernel(const __grid_constant__ ProjectArgs p) {
    using Tile = ProjectTile<R, RC>;
    extern __shared__ char raw[];
    char* const tiles = raw + (1024 - smem_address(raw) % 1024) % 1024;
    uint64_t* const full = reinterpret_cast<uint64_t*>(tiles + p.stages * p.stage_bytes);
    uint64_t* const empty = full + p.stages;
    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    const int token_tile = int(blockIdx.y) * Tile::kRows;
    const bool has_h = blockIdx.x == 0;
    const int router_block = int(blockIdx.x) - int(p.split);
    const bool has_router = p.has_router && router_block >= 0;
    const int first_group = router_block * (RC / p.padded);

    if (threadIdx.x == 0) {
        for (int s = 0; s < p.stages; ++s) {
            barrier_init(full + s, 1);
            barrier_init(empty + s, 4 * Tile::kWarpgroups * Tile::kCluster);
        }
        barrier_init_fence();
    }
    if constexpr (Tile::kCluster > 1)
        cluster_sync();
    else
        __syncthreads();
    launch_dependents();

    if (warp == 4 * Tile::kWarpgroups) {
        if (lane == 0) {
            const int x_bytes = p.slabs * p.x_rows * 128, a_bytes = has_h ? p.slabs * Tile::kABytes : 0;
            const int router_bytes = has_router ? p.slabs * Tile::kRouterBytes : 0;
            int s = 0, phase = 1;  // a barrier's first phase counts as preceded by a complete one
            for (int step = 0; step < p.steps; ++step) {
                const int k = p.slabs > 1 ? 0 : step * kDepth, slab = p.slabs > 1 ? step * p.slabs : 0;
                char* const tile = tiles + s * p.stage_bytes;
                barrier_wait(empty + s, phase);
                barrier_expect(full + s, x_bytes + a_bytes + router_bytes);
                tma_load(tile, &p.x, full + s, k, token_tile, slab);
                if (has_h) tma_load(tile + x_bytes, &p.lora_a, full + s, k, 0, slab);
                if (has_router) {
                    if constexpr (Tile::kCluster > 1) {  // half of the groups to both blocks
                        const int half = int(cluster_rank());
                        tma_load_multicast(tile + x_bytes + a_bytes + half * Tile::kRouterBytes / 2, &p.router,
                                           full + s, 3, k, 0, first_group + half * (RC / 2 / p.padded));
                    } else {
                        tma_load(tile + x_bytes + a_bytes, &p.router, full + s, k, 0, first_group, slab);
                    }
                }
                if (++s == p.stages) {
                    s = 0;
                    phase ^= 1;
                }
            }
        }
        if constexpr (Tile::kCluster > 1) cluster_sync();
        return;
    }

    float h[R / 2] = {}, logits[RC / 2] = {};
    if (has_h && has_router)
        multiply<E, R, RC, true, true>(p, tiles, full, empty, h, logits);
    else if (has_h)
        multiply<E, R, RC, true, false>(p, tiles, full, empty, h, logits);
    else
        multiply<E, R, RC, false, true>(p, tiles, full, empty, h, logits);

    const int token = token_tile + warp * 16 + lane / 4;
    if (has_h) {
#pragma unroll
        for (int i = 0; i < R / 4; ++i) {  // pairs of columns: rows token and token + 8 in turn
            const int t = token + i % 2 * 8, column = i / 2 * 8 + 2 * (lane % 4);
            float low = h[2 * i], high = h[2 * i + 1];
            if (p.relu) {
                low = low < 0 ? 0.0f : low;
                high = high < 0 ? 0.0f : high;
            }
            if (t < p.tokens) {
                *reinterpret_cast<Pair<E>*>(static_cast<E*>(p.h) + int64_t(t) * R + column) = rounded2<E>(low, high);
            }
        }
    }
    if (has_router) {
        if (p.padded == 8)
            write_pi<E, RC, 1>(p, logits, token, first_group);
        else if (p.padded == 16)
            write_pi<E, RC, 2>(p, logits, token, first_group);
        else if constexpr (RC >= 32)
            write_pi<E, RC, 4>(p, logits, token, first_group);
    }
    if constexpr (Tile::kCluster > 1) cluster_sync();  // the other block still arrives on this one's barriers
}

template <class E, int R, int RC>
void launch_project(const RoutedLoraFwd& f, bool split) {
    using Tile = ProjectTile<R, RC>;
    const bool has_router = f.router.data != nullptr;
    ProjectArgs p = {};
    p.x_rows = !Tile::kWide && f.tokens <= 8 ? 8 : Tile::kRows;
    p.padded = padded_experts(int(f.experts));
    const int groups = RC / p.padded;
    const int64_t token_tiles = ceil_div(f.tokens, Tile::kRows);
    // Narrow tiles of many tokens leave room for a block of `expand` beside them, whose prologue then overlaps. For few
    // tokens, whose weights come from far, as many bytes as fit are in flight, in fewer and larger copies: one thread
    // issues a copy in some 100 cycles.
    const bool beside = !Tile::kWide && token_tiles >= multiprocessors() / 2;
    p.slabs = !Tile::kWide && !beside && f.d_in % kDepth == 0 ? 4 : 1;
    // As [slabs of features, rows, 64] where a copy takes several slabs.
    const int64_t features = p.slabs > 1 ? kDepth : f.d_in, all_slabs = ceil_div(f.d_in, features);
    p.x = tensor_map(f.x.data, f.compute_dtype,
                     {{features, 1, kDepth}, {f.tokens, f.x.stride[0], p.x_rows}, {all_slabs, kDepth, p.slabs}});
    p.lora_a = tensor_map(f.lora_a.data, f.compute_dtype,
                          {{features, 1, kDepth}, {R, f.d_in, R}, {all_slabs, kDepth, p.slabs}});
    if (has_router) {
        const Dimension k{features, 1, kDepth}, expert{f.experts, f.d_in, p.padded};
        const Dimension group{f.groups, f.experts * f.d_in, groups / Tile::kCluster};
        p.router = Tile::kWide
                       ? tensor_map(f.router.data, f.compute_dtype, {k, expert, group})
                       : tensor_map(f.router.data, f.compute_dtype, {k, expert, group, {all_slabs, kDepth, p.slabs}});
    }
    p.h = f.h.data;
    p.pi = f.pi.data;
    p.tokens = int(f.tokens);
    p.steps = int(ceil_div(f.d_in, kDepth * p.slabs));
    p.experts = int(f.experts);
    p.groups = int(f.groups);
    p.relu = f.relu;
    p.has_router = has_router;
    p.split = split;
    const int weight_bytes =
        split ? std::max(Tile::kABytes, Tile::kRouterBytes) : Tile::kABytes + (has_router ? Tile::kRouterBytes : 0);
    p.stage_bytes = p.slabs * (p.x_rows * 128 + weight_bytes);
    p.stages = std::min(p.steps, (beside ? 88 : 220) * 1024 / p.stage_bytes);
    const int columns = has_router ? int(ceil_div(f.groups, groups)) + int(split) : 1;
    const dim3 grid(unsigned(columns), unsigned(ceil_div(token_tiles, Tile::kCluster) * Tile::kCluster));
    const int shared_bytes = 1024 + p.stages * (p.stage_bytes + 16);  // alignment, tiles, barriers
    launch<project_kernel<E, R, RC>>("routed_lora project", grid, Tile::kThreads, shared_bytes, f.stream, false, p);
}

template <class E, int R>
void choose_columns(const RoutedLoraFwd& f) {
    const int padded = padded_experts(int(f.experts));
    const int64_t all = f.router.data ? f.groups * padded : 0;
    // The widest tile that still gives most multiprocessors a block; the narrowest, and h apart, for few tokens.
    const int wanted = multiprocessors() * 3 / 4;
    auto blocks = [&](int columns, int rows) {
        return ceil_div(f.tokens, rows) * std::max<int64_t>(1, ceil_div(all, columns));
    };
    const int narrowest = std::max(16, padded);
    int columns = R <= 16 ? 256 : 128;  // accumulators: 128 registers beside those of h
    while (columns > narrowest && (columns / 2 >= all || blocks(columns, columns >= 128 ? 128 : 64) < wanted))
        columns /= 2;
    const bool split = all > 0 && blocks(columns, 64) < wanted;
    switch (columns) {
        case 16:
            return launch_project<E, R, 16>(f, split);
        case 32:
            return launch_project<E, R, 32>(f, split);
        case 64:
            return launch_project<E, R, 64>(f, split);
        case 128:
            return launch_project<E, R, 128>(f, split);
    }
    if constexpr (R <= 16) return launch_project<E, R, 256>(f, split);
}

template <class E>
void choose_rank(const RoutedLoraFwd& f) {
    switch (f.rank) {
        case 8:
            return choose_columns<E, 8>(f);
        case 16:
            return choose_columns<E, 16>(f);
        case 32:
            return choose_columns<E, 32>(f);
        case 64:
            return choose_columns<E, 64>(f);
        default:
            throw std::runtime_error("routed_lora project: rank must be 8, 16, 32 or 64");
    }
}

}  // namespace

void project(const RoutedLoraFwd& f) {
    if (f.compute_dtype == DType::bf16)
        choose_rank<bf16>(f);
    else
        choose_rank<f16>(f);
}

}  // namespace mtlora::cuda
