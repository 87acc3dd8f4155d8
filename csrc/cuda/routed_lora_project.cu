// project: h = E(act(x A^T)) and pi = E(softmax(E(x R^T))), x read once per block of router columns.
//
// A block owns 8, 64 or 128 tokens and up to `RC` router columns (whole groups); one warp copies tiles of 64 features
// by TMA, one or two warpgroups multiply them. The logits then take the place of the tiles, and a thread turns those of
// one token and group at a time into pi: a short loop, because instructions that run once cost more than what they
// compute.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "cuda/cluster.cuh"
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
    int tile_groups;          // of a block's columns
    int stages, stage_bytes;  // a stage is one step's slabs of x, then of A, then of the router
    int tile_bytes;           // all stages, or the logits that take their place
    int x_rows;               // tokens of a block; 8 repeat down the 64 rows of a product
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
    static constexpr int kProductWarps = 4 * kWarpgroups;
    static constexpr int kThreads = 32 * (kProductWarps + 2);
    static constexpr int kSlabs = RC <= 32 ? 4 : 1;  // at most, of a stage
    static constexpr int kABytes = R * 128, kRouterBytes = RC * 128;
    static constexpr int kPitch = RC * 2 + 16;  // of a token's logits: 8 rows of 16 bytes meet no bank twice
};

// Halving tree: s[: n / 2] op s[n / 2 :], down to one.
template <int n, class Op>
__device__ float tree(const float (&s)[n], Op op) {
    float half[n / 2];
#pragma unroll
    for (int i = 0; i < n / 2; ++i) half[i] = op(s[i], s[i + n / 2]);
    if constexpr (n == 2)
        return half[0];
    else
        return tree(half, op);
}

// e / sum, rounded to nearest. `common`: what __fdiv_rn does unless a remainder could underflow, with one reciprocal.
template <int P>
__device__ void divide(float (&e)[P], float sum, bool common) {
    if (!common) {
#pragma unroll
        for (int i = 0; i < P; ++i) e[i] = __fdiv_rn(e[i], sum);
        return;
    }
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(sum));  // 1 <= sum <= P, or NaN
    r = __fmaf_rn(r, __fmaf_rn(-sum, r, 1.0f), r);
#pragma unroll
    for (int i = 0; i < P; ++i) {
        const float q = __fmul_rn(r, e[i]);
        e[i] = __fmaf_rn(r, __fmaf_rn(-sum, q, e[i]), q);
    }
}

// One group of one token in place: rounded logits to pi. P is the number of experts (`full`) or a power of two above.
template <class E, int P, bool full>
__device__ void softmax(E* row, int experts) {
    union {
        uint4 units[P / 8];
        Pair<E> pairs[P / 2];
        E values[P];
    } v;
    if constexpr (full) {
#pragma unroll
        for (int i = 0; i < P / 8; ++i) v.units[i] = reinterpret_cast<const uint4*>(row)[i];
    } else {
#pragma unroll
        for (int i = 0; i < P; ++i) v.values[i] = row[i < experts ? i : 0];
    }
    float e[P];
#pragma unroll
    for (int i = 0; i < P; ++i) e[i] = to_float(v.values[i]);
    const float top = tree(e, [](float a, float b) { return fmaxf(a, b); });
    const float least = tree(e, [](float a, float b) { return fminf(a, b); });
#pragma unroll
    for (int i = 0; i < P; ++i) e[i] = full || i < experts ? expf(e[i] - top) : 0.0f;
    const float sum = tree(e, [](float a, float b) { return a + b; });
    divide(e, sum, !(least - top < -62.0f));  // e >= 2^-90, or NaN
    if constexpr (full) {
#pragma unroll
        for (int i = 0; i < P / 2; ++i) v.pairs[i] = rounded2<E>(e[2 * i], e[2 * i + 1]);
#pragma unroll
        for (int i = 0; i < P / 8; ++i) reinterpret_cast<uint4*>(row)[i] = v.units[i];
    } else {
#pragma unroll
        for (int i = 0; i < P; ++i) {
            if (i < experts) row[i] = rounded<E>(e[i]);
        }
    }
}

// `elements` of each of this warp's rows to global memory, rows side by side where one is less than a warp stores.
template <class Unit, class E, int RC, int pitch>
__device__ void copy_rows(E* to, int64_t stride, const char* from, int rows, int elements) {
    constexpr int kUnits = RC * int(sizeof(E)) / int(sizeof(Unit)), kLanes = kUnits < 32 ? kUnits : 32;
    const int lane = threadIdx.x % 32, units = elements * int(sizeof(E)) / int(sizeof(Unit));
#pragma unroll 2
    for (int row = lane / kLanes; row < rows; row += 32 / kLanes) {
        for (int unit = lane % kLanes; unit < units; unit += kLanes) {
            reinterpret_cast<Unit*>(to + row * stride)[unit] = reinterpret_cast<const Unit*>(from + row * pitch)[unit];
        }
    }
}

// pi of a warp's 16 tokens, of which `tokens` exist and whose logits lie in `rows`.
template <class E, int RC, int pitch>
__device__ void write_pi(const ProjectArgs& p, char* rows, int token, int tokens, int first_group) {
    const int groups = min(p.groups - first_group, p.tile_groups), n = p.experts;
    const auto each = [&](auto run) {  // a thread takes a token and a group at a time
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < 16 * groups; i += 32)
            run(reinterpret_cast<E*>(rows + i % 16 * pitch) + i / 16 * n);
    };
    if (n == 8)
        each([&](E* row) { softmax<E, 8, true>(row, n); });
    else if (n < 8)
        each([&](E* row) { softmax<E, 8, false>(row, n); });
    else if (n == 16)
        each([&](E* row) { softmax<E, 16, true>(row, n); });
    else if (n < 16)
        each([&](E* row) { softmax<E, 16, false>(row, n); });
    else if constexpr (RC >= 32)
        each([&](E* row) { softmax<E, 32, false>(row, n); });
    __syncwarp();
    const int64_t stride = int64_t(p.groups) * n;
    E* const pi = static_cast<E*>(p.pi) + token * stride + first_group * n;
    if (stride % 8 == 0 && p.tile_groups * n % 8 == 0)
        copy_rows<uint4, E, RC, pitch>(pi, stride, rows, tokens, groups * n);
    else
        copy_rows<E, E, RC, pitch>(pi, stride, rows, tokens, groups * n);
}

// The two products of this warpgroup's 64 tokens over all features. Compiled for each choice: a branch between
// wgmma instructions would serialise them, and each instruction beside them delays a chain of small ones.
template <class E, int R, int RC, int slabs, bool has_h, bool has_router>
__device__ void multiply(const ProjectArgs& p, const char* tiles, uint64_t* full, uint64_t* empty, float (&h)[R / 2],
                         float (&logits)[RC / 2]) {
    using Tile = ProjectTile<R, RC>;
    const int warpgroup = Tile::kWide ? uniform(threadIdx.x / 128) : 0, lane = threadIdx.x % 32;
    const auto release = [&](int s) {
        if (lane < Tile::kCluster) {
            if constexpr (Tile::kCluster > 1)
                cluster_arrive(cluster_address(empty + s, lane));
            else
                barrier_arrive(empty + s);
        }
    };
    const int x_slab = p.x_rows * 128, a_at = slabs * x_slab, router_at = a_at + (has_h ? slabs * Tile::kABytes : 0);
    const uint64_t first_x = smem_descriptor(tiles + warpgroup * 64 * 128, 16, p.x_rows == 8 ? 0 : 1024, Swizzle::b128);
    const uint64_t first_a = smem_descriptor(tiles + a_at, 16, 1024, Swizzle::b128);
    const uint64_t first_r = smem_descriptor(tiles + router_at, 16, 1024, Swizzle::b128);
    Ring ring;
    int previous = 0;
    for (int step = 0; step < p.steps; ++step) {
        const int at = ring.stage * p.stage_bytes;
        const uint64_t stage_x = advanced(first_x, at), a = advanced(first_a, at), r = advanced(first_r, at);
        barrier_wait(full + ring.stage, ring.parity);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < slabs * kDepth / 16; ++k) {  // 16 k are 32 bytes of a row
            const int slab = k / (kDepth / 16), in_row = k % (kDepth / 16) * 32;
            const uint64_t x = advanced(advanced(stage_x, slab * x_slab), in_row);
            if constexpr (has_h) wgmma<E, 0, 0>(h, x, advanced(a, slab * Tile::kABytes + in_row), true);
            if constexpr (has_router) {
                wgmma<E, 0, 0>(logits, x, advanced(r, slab * Tile::kRouterBytes + in_row), true);
            }
        }
        wgmma_commit();
        // Only what will be filled again is given back: no arrival is then on its way when a block ends.
        if constexpr (Tile::kWide) {  // few stages: at once; the other warpgroup multiplies meanwhile
            wgmma_wait<0>();
            if (step + p.stages < p.steps) release(ring.stage);
        } else {
            wgmma_wait<1>();
            if (step > 0 && step - 1 + p.stages < p.steps) release(previous);
        }
        previous = ring.stage;
        ring.advance(p.stages);
    }
    wgmma_wait<0>();
    pin(h);
    pin(logits);
}

template <class E, int R, int RC, int slabs>
__global__ void __cluster_dims__(1, ProjectTile<R, RC>::kCluster, 1)
    __launch_bounds__(ProjectTile<R, RC>::kThreads, RC <= 64 ? 3 : 1)
        project_kernel(const __grid_constant__ ProjectArgs p) {
    using Tile = ProjectTile<R, RC>;
    extern __shared__ char raw[];
    char* const tiles = raw + (1024 - smem_address(raw) % 1024) % 1024;
    uint64_t* const full = reinterpret_cast<uint64_t*>(tiles + p.tile_bytes);
    uint64_t* const empty = full + p.stages;
    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    const int token_tile = int(blockIdx.y) * p.x_rows;
    const bool has_h = blockIdx.x == 0;
    const int router_block = int(blockIdx.x) - int(p.split);
    const bool has_router = p.has_router && router_block >= 0;
    const int first_group = router_block * p.tile_groups;

    if (int(threadIdx.x) < p.stages) {
        barrier_init(full + threadIdx.x, 1);
        barrier_init(empty + threadIdx.x, Tile::kProductWarps * Tile::kCluster);
        barrier_init_fence();
    }
    if constexpr (Tile::kCluster > 1)
        cluster_meet();
    else
        __syncthreads();
    launch_dependents();

    if (warp == Tile::kProductWarps) {
        if (lane == 0) {
            const int x_bytes = slabs * p.x_rows * 128, a_bytes = has_h ? slabs * Tile::kABytes : 0;
            const int router_bytes = has_router ? slabs * Tile::kRouterBytes : 0, row = first_group * p.experts;
            Ring ring{0, 1};  // the opposite from the start, so that waits read it as it is
            for (int step = 0; step < p.steps; ++step) {
                const int k = slabs > 1 ? 0 : step * kDepth, slab = slabs > 1 ? step * slabs : 0;
                char* const tile = tiles + ring.stage * p.stage_bytes;
                barrier_wait(empty + ring.stage, ring.parity);
                barrier_expect(full + ring.stage, x_bytes + a_bytes + router_bytes);
                tma_load(tile, &p.x, full + ring.stage, k, token_tile, slab);
                if (has_h) tma_load(tile + x_bytes, &p.lora_a, full + ring.stage, k, 0, slab);
                if (has_router) {
                    if constexpr (Tile::kCluster > 1) {  // half of the columns to both blocks
                        const int half = int(cluster_rank());
                        tma_load_multicast(tile + x_bytes + a_bytes + half * Tile::kRouterBytes / 2, &p.router,
                                           full + ring.stage, 3, k, row + half * RC / 2, slab);
                    } else {
                        tma_load(tile + x_bytes + a_bytes, &p.router, full + ring.stage, k, row, slab);
                    }
                }
                ring.advance(p.stages);
            }
        }
        return;
    }

    const int token = token_tile + warp * 16, tokens = min(min(16, p.x_rows - warp * 16), p.tokens - token);
    char* rows = tiles + warp * 16 * Tile::kPitch;  // this warp's logits
    if (warp < Tile::kProductWarps) {
        float h[R / 2] = {}, logits[RC / 2] = {};
        if (has_h && has_router)
            multiply<E, R, RC, slabs, true, true>(p, tiles, full, empty, h, logits);
        else if (has_h)
            multiply<E, R, RC, slabs, true, false>(p, tiles, full, empty, h, logits);
        else
            multiply<E, R, RC, slabs, false, true>(p, tiles, full, empty, h, logits);

        // In pairs of columns, rows lane / 4 and lane / 4 + 8 in turn.
        if (has_h) {
#pragma unroll
            for (int i = 0; i < R / 4; ++i) {
                const int row = lane / 4 + i % 2 * 8, column = i / 2 * 8 + 2 * (lane % 4);
                float low = h[2 * i], high = h[2 * i + 1];
                if (p.relu) {
                    low = low < 0 ? 0.0f : low;
                    high = high < 0 ? 0.0f : high;
                }
                if (row < tokens) {
                    *reinterpret_cast<Pair<E>*>(static_cast<E*>(p.h) + int64_t(token + row) * R + column) =
                        rounded2<E>(low, high);
                }
            }
        }
        if (!has_router) return;
        named_barrier(1, 32 * Tile::kProductWarps);  // no product reads the stages any more
        if (tokens <= 0) return;
#pragma unroll
        for (int i = 0; i < RC / 4; ++i) {
            const int row = lane / 4 + i % 2 * 8, column = i / 2 * 8 + 2 * (lane % 4);
            *reinterpret_cast<Pair<E>*>(rows + row * Tile::kPitch + column * 2) =
                rounded2<E>(logits[2 * i], logits[2 * i + 1]);
        }
        __syncwarp();
    } else {
        // The last warp runs what follows early, on zeros and without a store: its instructions are then in the cache
        // when the others need them, who would wait for each of them once.
        if (!has_router) return;
        rows = reinterpret_cast<char*>(empty + p.stages);
        for (int i = lane; i < 16 * Tile::kPitch / 4; i += 32) reinterpret_cast<uint32_t*>(rows)[i] = 0;
        __syncwarp();
    }
    write_pi<E, RC, Tile::kPitch>(p, rows, token, warp < Tile::kProductWarps ? tokens : 0, first_group);
}

template <class E, int R, int RC>
void launch_project(const RoutedLoraFwd& f, bool split) {
    using Tile = ProjectTile<R, RC>;
    const bool has_router = f.router.data != nullptr;
    const int router_blocks = has_router ? int(ceil_div(f.groups, RC / f.experts)) : 0;
    const int columns = std::max(1, router_blocks + int(split));
    ProjectArgs p = {};
    // Few tokens: blocks of 8, which together pull x and the weights in faster than one multiprocessor can.
    p.x_rows = !Tile::kWide && ceil_div(f.tokens, 8) * columns <= multiprocessors() ? 8 : Tile::kRows;
    const int64_t token_tiles = ceil_div(f.tokens, p.x_rows);
    // Narrow tiles of many tokens leave room for a block of `expand` beside them, whose prologue then overlaps. For few
    // tokens, whose weights come from far, as many bytes as fit are in flight, in fewer and larger copies: T = 1 took
    // 11.5 us with a slab a copy, 9.3 us with four.
    const bool beside = !Tile::kWide && ceil_div(f.tokens, Tile::kRows) >= multiprocessors() / 2;
    const int slabs = !beside && f.d_in % kDepth == 0 ? Tile::kSlabs : 1;
    // As [slabs of features, rows, 64] where a copy takes several slabs.
    const int64_t features = slabs > 1 ? kDepth : f.d_in, all_slabs = ceil_div(f.d_in, features);
    const auto tiles_of = [&](const void* data, int64_t rows, int64_t row_stride, int box) {
        return tensor_map(data, f.compute_dtype,
                          {{features, 1, kDepth}, {rows, row_stride, box}, {all_slabs, kDepth, slabs}});
    };
    p.x = tiles_of(f.x.data, f.tokens, f.x.stride[0], p.x_rows);
    p.lora_a = tiles_of(f.lora_a.data, R, f.d_in, R);
    if (has_router) p.router = tiles_of(f.router.data, f.groups * f.experts, f.d_in, RC / Tile::kCluster);
    p.h = f.h.data;
    p.pi = f.pi.data;
    p.tokens = int(f.tokens);
    p.steps = int(ceil_div(f.d_in, kDepth * slabs));
    p.experts = int(f.experts);
    p.groups = int(f.groups);
    p.relu = f.relu;
    p.has_router = has_router;
    p.split = split;
    p.tile_groups = has_router ? int(ceil_div(f.groups, router_blocks)) : 0;
    const int weight_bytes =
        split ? std::max(Tile::kABytes, Tile::kRouterBytes) : Tile::kABytes + (has_router ? Tile::kRouterBytes : 0);
    p.stage_bytes = slabs * (p.x_rows * 128 + weight_bytes);
    const int budget = beside ? 88 : 216;  // KB
    p.stages = std::min(p.steps, budget * 1024 / p.stage_bytes);
    p.tile_bytes = std::max(p.stages * p.stage_bytes, Tile::kRows * Tile::kPitch);
    const dim3 grid(unsigned(columns), unsigned(ceil_div(token_tiles, Tile::kCluster) * Tile::kCluster));
    const int shared_bytes =
        1024 + p.tile_bytes + p.stages * 16 + 16 * Tile::kPitch;  // aligned; tiles, barriers, zeros
    const auto run = [&](auto slabs_of_step) {
        launch<project_kernel<E, R, RC, decltype(slabs_of_step)::value>>("routed_lora project", grid, Tile::kThreads,
                                                                         shared_bytes, f.stream, false, p);
    };
    if constexpr (Tile::kSlabs > 1) {
        if (slabs > 1) return run(std::integral_constant<int, Tile::kSlabs>());
    }
    run(std::integral_constant<int, 1>());
}

template <class E, int R>
void choose_columns(const RoutedLoraFwd& f) {
    const int64_t all = f.router.data ? f.groups * f.experts : 0;
    // The widest tile that still gives most multiprocessors a block; the narrowest, and h apart, for few tokens.
    const int wanted = multiprocessors() * 3 / 4;
    auto blocks = [&](int columns, int rows) {
        return ceil_div(f.tokens, rows) * std::max<int64_t>(1, all ? ceil_div(f.groups, columns / f.experts) : 0);
    };
    const int narrowest = f.experts <= 16 ? 16 : 32;
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
    if constexpr (R <= 16) {
        // Narrower where that takes no more blocks: 8 of 32 groups of 25 experts fill 200 columns.
        const auto blocks_of = [&](int width) { return ceil_div(f.groups, width / f.experts); };
        if (blocks_of(208) == blocks_of(256)) return launch_project<E, R, 208>(f, split);
        launch_project<E, R, 256>(f, split);
    }
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
