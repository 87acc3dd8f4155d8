// project: h = E(act(x A^T)) and pi = E(softmax(E(x R^T))), x read once per block of router columns.
//
// A tile is 8, 64 or 128 tokens and up to `RC` router columns (whole groups); one warp copies it 64 features at a time
// by TMA, one or two warpgroups multiply. The logits go to shared memory, and a thread turns those of one token and
// group at a time into pi: a short loop, because instructions that run once cost more than what they compute. Up to 200
// wide columns leave registers for warps of their own to do that, beside the products of the next tile.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "cuda/cluster.cuh"
#include "cuda/elements.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/routed_lora.h"
#include "cuda/routed_lora_softmax.cuh"

namespace mtlora::cuda {
namespace {

constexpr int kDepth = 64;  // features of a slab of a tile: 128 bytes, one swizzled row

// Of blocks that go from tile to tile: warps beside eight for the products and one for the copies, and what registers a
// thread of either then has, of 128 at the start.
constexpr int kSoftmaxWarps = 7, kProductRegisters = 168, kSoftmaxRegisters = 88;

struct ProjectArgs {
    CUtensorMap x, lora_a, router;
    void *h, *pi;
    int tokens, steps, experts, groups;
    int tile_groups;          // of a block's columns
    int stages, stage_bytes;  // a stage is one step's slabs of x, then of the router, then of A
    int tile_bytes;           // all stages, or the logits that take their place
    int tiles, columns;       // streams: pairs of tiles, and how many of them are side by side
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
    // Blocks go from tile to tile, and more warps turn logits into pi; 256 columns leave no registers for that.
    static constexpr bool kStreams = kWide && RC <= 200;
    static constexpr int kThreads = 32 * (kProductWarps + (kStreams ? kSoftmaxWarps + 1 : 2));
    static constexpr int kSlabs = RC <= 32 ? 4 : 1;  // at most, of a stage
    static constexpr int kABytes = R * 128, kRouterBytes = RC * 128;
    // Of the router's columns from each block of a cluster, in eights; 8 of 200 come from both.
    static constexpr int kHalf = kCluster == 1 ? RC : (RC / 8 + 1) / 2 * 8;
    // Of a token's logits: 8 rows of 16 bytes meet no bank twice.
    static constexpr int kPitch = RC * 2 + (RC % 16 ? 0 : 16);
};

// `elements` of each of `rows` rows to global memory by a warp of several, rows side by side where one is less than a
// warp stores.
template <class Unit, class E, int RC, int pitch>
__device__ void copy_rows(E* to, int64_t stride, const char* from, int rows, int elements, int warp, int warps) {
    constexpr int kUnits = RC * int(sizeof(E)) / int(sizeof(Unit)), kLanes = kUnits < 32 ? kUnits : 32;
    constexpr int kRows = 32 / kLanes, kUnroll = kRows > 2 ? 16 / kRows : 8;
    const int lane = threadIdx.x % 32, units = elements * int(sizeof(E)) / int(sizeof(Unit));
    if (lane / kLanes >= kRows) return;
    for (int unit = lane % kLanes; unit < units; unit += kLanes) {
#pragma unroll kUnroll
        for (int row = warp * kRows + lane / kLanes; row < rows; row += warps * kRows)
            reinterpret_cast<Unit*>(to + row * stride)[unit] = reinterpret_cast<const Unit*>(from + row * pitch)[unit];
    }
}

// pi of `tokens` tokens from `token` on and the groups from first_group on, which lies in `rows`, to its place.
template <class E, int RC, int pitch>
__device__ void write_pi(const ProjectArgs& p, const char* rows, int token, int tokens, int first_group, int warp,
                         int warps) {
    const int elements = min(p.groups - first_group, p.tile_groups) * p.experts;
    const int64_t stride = int64_t(p.groups) * p.experts;
    E* const pi = static_cast<E*>(p.pi) + token * stride + first_group * p.experts;
    if (stride % 8 == 0 && p.tile_groups * p.experts % 8 == 0)
        copy_rows<uint4, E, RC, pitch>(pi, stride, rows, tokens, elements, warp, warps);
    else
        copy_rows<E, E, RC, pitch>(pi, stride, rows, tokens, elements, warp, warps);
}

// h of a warp's 16 tokens: in pairs of columns, rows lane / 4 and lane / 4 + 8 in turn.
template <class E, int R>
__device__ void write_h(const ProjectArgs& p, const float (&h)[R / 2], int token, int tokens) {
    const int lane = threadIdx.x % 32;
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

// The same of its logits to shared memory.
template <class E, int pitch, int n>
__device__ void write_logits(char* rows, const float (&logits)[n]) {
    constexpr int kChunks = n / 4;  // of 8 columns, two at a time
    const int lane = threadIdx.x % 32;
    const uint32_t to = smem_address(rows) + lane % 16 * pitch + lane / 16 * 16;
#pragma unroll
    for (int i = 0; i < kChunks; i += 2) {
        const int chunk = i + 1 < kChunks ? i : kChunks - 2;  // the last of an odd number goes with the one before
        uint32_t m[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            m[j] = bits_as<uint32_t>(rounded2<E>(logits[4 * chunk + 2 * j], logits[4 * chunk + 2 * j + 1]));
        store_matrices(to + chunk * 16, m);
    }
    __syncwarp();
}

// The two products of this warpgroup's 64 tokens over all features, `left` steps being still to come. Compiled for each
// choice: a branch between wgmma instructions would serialise them, and each instruction beside them delays a chain of
// small ones.
template <class E, int R, int RC, int slabs, bool has_h, bool has_router>
__device__ void multiply(const ProjectArgs& p, const char* tiles, uint64_t* full, uint64_t* empty, Ring& ring, int left,
                         float (&h)[R / 2], float (&logits)[RC / 2]) {
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
    const int x_slab = p.x_rows * 128, router_at = slabs * x_slab;
    const int a_at = router_at + (has_router ? slabs * Tile::kRouterBytes : 0);
    const uint64_t first_x = smem_descriptor(tiles + warpgroup * 64 * 128, 16, p.x_rows == 8 ? 0 : 1024, Swizzle::b128);
    const uint64_t first_a = smem_descriptor(tiles + a_at, 16, 1024, Swizzle::b128);
    const uint64_t first_r = smem_descriptor(tiles + router_at, 16, 1024, Swizzle::b128);
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
            if (step + p.stages < left) release(ring.stage);
        } else {
            wgmma_wait<1>();
            if (step > 0 && step - 1 + p.stages < left) release(previous);
        }
        previous = ring.stage;
        ring.advance(p.stages);
    }
    wgmma_wait<0>();
    pin(h);
    pin(logits);
}

// Pairs of blocks that go from tile to tile.
template <class E, int R, int RC>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(ProjectTile<R, RC>::kThreads, 1)
    project_stream_kernel(const __grid_constant__ ProjectArgs p) {
    using Tile = ProjectTile<R, RC>;
    constexpr int kWarps = Tile::kProductWarps;
    extern __shared__ char raw[];
    char* const tiles = raw + (1024 - smem_address(raw) % 1024) % 1024;
    char* const logits_at = tiles + p.stages * p.stage_bytes;
    uint64_t* const full = reinterpret_cast<uint64_t*>(logits_at + Tile::kRows * Tile::kPitch);
    uint64_t* const empty = full + p.stages;
    uint64_t* const logits_full = empty + p.stages;
    uint64_t* const logits_empty = logits_full + 1;
    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    if (int(threadIdx.x) < p.stages) {
        barrier_init(full + threadIdx.x, 1);
        barrier_init(empty + threadIdx.x, kWarps * 2);
    }
    if (threadIdx.x == 0) {
        barrier_init(logits_full, 32 * kWarps);
        barrier_init(logits_empty, 32 * kSoftmaxWarps);
    }
    barrier_init_fence();
    cluster_meet();
    launch_dependents();

    // Columns take turns, so that those with h are spread over the blocks.
    const int pairs = int(gridDim.x) / 2;
    const auto each_tile = [&](auto run) {
        for (int tile = int(blockIdx.x) / 2; tile < p.tiles; tile += pairs) {
            const int row = tile / p.columns, column = (tile + row * p.columns / pairs) % p.columns;
            run((2 * row + int(cluster_rank())) * Tile::kRows, column, column == 0);
        }
    };

    if (warp == kWarps + kSoftmaxWarps) {
        shrink_registers<kSoftmaxRegisters>();
        if (lane > 0) return;
        Ring ring{0, 1};  // the opposite from the start, so that waits read it as it is
        const int from = int(cluster_rank()) * (RC - Tile::kHalf);  // half of the columns to both blocks
        each_tile([&](int token, int column, bool has_h) {
            const int a_bytes = has_h ? Tile::kABytes : 0, row = column * p.tile_groups * p.experts;
            for (int step = 0; step < p.steps; ++step) {
                char* const tile = tiles + ring.stage * p.stage_bytes;
                barrier_wait(empty + ring.stage, ring.parity);
                barrier_expect(full + ring.stage, Tile::kRows * 128 + a_bytes + 2 * Tile::kHalf * 128);
                tma_load(tile, &p.x, full + ring.stage, step * kDepth, token, 0);
                char* const router = tile + Tile::kRows * 128;
                tma_load_multicast(router + from * 128, &p.router, full + ring.stage, 3, step * kDepth, row + from, 0);
                if (has_h) {
                    tma_load(router + Tile::kRouterBytes, &p.lora_a, full + ring.stage, step * kDepth, 0, 0);
                }
                ring.advance(p.stages);
            }
        });
        return;
    }

    if (warp < kWarps) {
        grow_registers<kProductRegisters>();
        char* const rows = logits_at + warp * 16 * Tile::kPitch;
        Ring ring;
        uint32_t parity = 1;
        int left = p.steps * ((p.tiles - int(blockIdx.x) / 2 + pairs - 1) / pairs);
        each_tile([&](int tile_token, int column, bool has_h) {
            const int token = tile_token + warp * 16;
            float h[R / 2] = {}, logits[RC / 2] = {};
            if (has_h) {
                multiply<E, R, RC, 1, true, true>(p, tiles, full, empty, ring, left, h, logits);
                write_h<E, R>(p, h, token, p.tokens - token);
            } else {
                multiply<E, R, RC, 1, false, true>(p, tiles, full, empty, ring, left, h, logits);
            }
            left -= p.steps;
            barrier_wait(logits_empty, parity);
            write_logits<E, Tile::kPitch>(rows, logits);
            barrier_arrive(logits_full);
            parity ^= 1;
        });
    } else {
        shrink_registers<kSoftmaxRegisters>();
        const int self = warp - kWarps;
        uint32_t parity = 0;
        each_tile([&](int token, int column, bool) {
            const int first_group = column * p.tile_groups, groups = min(p.groups - first_group, p.tile_groups);
            barrier_wait(logits_full, parity);
            softmax_rows<E, 32, Tile::kPitch>(logits_at, Tile::kRows / 8, groups, p.experts, self, kSoftmaxWarps);
            named_barrier(1, 32 * kSoftmaxWarps);
            write_pi<E, RC, Tile::kPitch>(p, logits_at, token, min(Tile::kRows, p.tokens - token), first_group, self,
                                          kSoftmaxWarps);
            barrier_arrive(logits_empty);
            parity ^= 1;
        });
    }
}

// One tile a block.
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
    const bool halves = Tile::kWide && gridDim.x > 1;  // each of two blocks of columns has h of half of the tokens
    const bool has_a = halves ? blockIdx.x < 2 : blockIdx.x == 0;
    const bool has_h = halves ? int(blockIdx.x) == warp / 4 : has_a;
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
            const int x_bytes = slabs * p.x_rows * 128, a_bytes = has_a ? slabs * Tile::kABytes : 0;
            const int router_bytes = has_router ? slabs * Tile::kRouterBytes : 0, row = first_group * p.experts;
            const int copied = x_bytes + a_bytes + (has_router ? slabs * Tile::kCluster * Tile::kHalf * 128 : 0);
            Ring ring{0, 1};  // the opposite from the start, so that waits read it as it is
            for (int step = 0; step < p.steps; ++step) {
                const int k = slabs > 1 ? 0 : step * kDepth, slab = slabs > 1 ? step * slabs : 0;
                char* const tile = tiles + ring.stage * p.stage_bytes;
                barrier_wait(empty + ring.stage, ring.parity);
                barrier_expect(full + ring.stage, copied);
                tma_load(tile, &p.x, full + ring.stage, k, token_tile, slab);
                char* const router = tile + x_bytes;
                if (has_router) {
                    if constexpr (Tile::kCluster > 1) {  // half of the columns to both blocks
                        const int from = int(cluster_rank()) * (RC - Tile::kHalf);
                        tma_load_multicast(router + from * 128, &p.router, full + ring.stage, 3, k, row + from, slab);
                    } else {
                        tma_load(router, &p.router, full + ring.stage, k, row, slab);
                    }
                }
                if (has_a) tma_load(router + router_bytes, &p.lora_a, full + ring.stage, k, 0, slab);
                ring.advance(p.stages);
            }
        }
        return;
    }

    const int token = token_tile + warp * 16;
    int tokens = min(min(16, p.x_rows - warp * 16), p.tokens - token);
    char* rows = tiles + warp * 16 * Tile::kPitch;  // this warp's logits
    if (warp < Tile::kProductWarps) {
        float h[R / 2] = {}, logits[RC / 2] = {};
        Ring ring;
        if (has_h && has_router)
            multiply<E, R, RC, slabs, true, true>(p, tiles, full, empty, ring, p.steps, h, logits);
        else if (has_h)
            multiply<E, R, RC, slabs, true, false>(p, tiles, full, empty, ring, p.steps, h, logits);
        else
            multiply<E, R, RC, slabs, false, true>(p, tiles, full, empty, ring, p.steps, h, logits);
        if (has_h) write_h<E, R>(p, h, token, tokens);
        if (!has_router) return;
        named_barrier(1, 32 * Tile::kProductWarps);  // no product reads the stages any more
        if (tokens <= 0) return;
        write_logits<E, Tile::kPitch>(rows, logits);
    } else {
        // The last warp runs what follows early, on zeros and without a store: its instructions are then in the cache
        // when the others need them, who would wait for each of them once.
        if (!has_router) return;
        tokens = 0;
        rows = reinterpret_cast<char*>(empty + p.stages);
        for (int i = lane; i < 16 * Tile::kPitch / 4; i += 32) reinterpret_cast<uint32_t*>(rows)[i] = 0;
        __syncwarp();
    }
    const int groups = min(p.groups - first_group, p.tile_groups);
    softmax_rows<E, (RC >= 32 ? 32 : 16), Tile::kPitch>(rows, p.x_rows == 8 ? 1 : 2, groups, p.experts, 0, 1);
    __syncwarp();
    write_pi<E, RC, Tile::kPitch>(p, rows, token, tokens, first_group, 0, 1);
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
    if (has_router) p.router = tiles_of(f.router.data, f.groups * f.experts, f.d_in, Tile::kHalf);
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
    if constexpr (Tile::kStreams) {
        p.columns = columns;
        p.tiles = int(ceil_div(token_tiles, 2)) * columns;
        const int fixed = 1024 + Tile::kRows * Tile::kPitch + 2 * 8;  // aligned; logits, their barriers
        p.stages = std::min(p.steps, (kMaxSharedBytes - fixed) / (p.stage_bytes + 16));
        const int blocks = 2 * std::min(p.tiles, multiprocessors() / 2);
        launch<project_stream_kernel<E, R, RC>>("routed_lora project", dim3(unsigned(blocks)), Tile::kThreads,
                                                fixed + p.stages * (p.stage_bytes + 16), f.stream, false, p);
    } else {
        const int budget = beside ? 88 : 216;  // KB
        p.stages = std::min(p.steps, budget * 1024 / p.stage_bytes);
        p.tile_bytes = std::max(p.stages * p.stage_bytes, Tile::kRows * Tile::kPitch);
        const auto grid = dim3(unsigned(columns), unsigned(ceil_div(token_tiles, Tile::kCluster) * Tile::kCluster));
        // Aligned; tiles, barriers, zeros.
        const int shared_bytes = 1024 + p.tile_bytes + p.stages * 16 + 16 * Tile::kPitch;
        const auto run = [&](auto slabs_of_step) {
            launch<project_kernel<E, R, RC, decltype(slabs_of_step)::value>>(
                "routed_lora project", grid, Tile::kThreads, shared_bytes, f.stream, false, p);
        };
        if constexpr (Tile::kSlabs > 1) {
            if (slabs > 1) return run(std::integral_constant<int, Tile::kSlabs>());
        }
        run(std::integral_constant<int, 1>());
    }
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
        if (blocks_of(200) == blocks_of(256)) return launch_project<E, R, 200>(f, split);
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
