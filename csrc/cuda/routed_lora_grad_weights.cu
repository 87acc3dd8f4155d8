// grad_b and grad_rows: products whose K is all tokens, d(B_flat[g]) = scaling * dout_g^T z_g and
// [d(A); d(R)] = [d(h) | d(logits)]^T x.
//
// Both are computed transposed: rows of the product are the narrow operand's columns, its columns are outputs or input
// features, which stay as TMA left them. z reaches wgmma through registers and is never stored. A block owns 128
// features, up to 384 columns and one chunk of tokens. The sums of the chunks go through L2 to `add_chunks`: as a
// cluster they could add through shared memory, but 32 clusters of 4 do not fit the GPU at once, and ran as two waves.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/cluster.cuh"
#include "cuda/elements.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/routed_lora_bwd.h"
#include "cuda/tensor.cuh"

namespace mtlora::cuda {
namespace {

constexpr int kTokens = 64;  // a step
constexpr int kBoxBytes = kTokens * 128;
constexpr int kMaxStages = 12;
constexpr int kWeightRow = kTokens * 2;  // bytes of an expert in a tile of pi
constexpr int kAddThreads = 128;
constexpr int kSmallGroups = 4;  // of up to 24 outputs, that a block of grad_b takes at once

// Row tiles of the transposed product, 64 columns each. grad_b (`mixed`): one a warpgroup, which builds its next piece
// of z while the others multiply. grad_rows: up to two a warpgroup, both operands from shared memory.
template <bool mixed>
struct Plan {
    static constexpr int kWarpgroups = mixed ? 4 : 3;
    static constexpr int kColumns = mixed ? 256 : 384;        // of a block, at most
    static constexpr int kThreads = kWarpgroups * 128 + 128;  // and a warpgroup that loads
    static constexpr int kProducerRegisters = 32;             // of 96 and 128 at the start
    static constexpr int kConsumerRegisters = mixed ? 112 : 160;
};

struct TokenArgs {
    CUtensorMap features;  // dout or x: (features of a group, groups, T)
    CUtensorMap columns;   // h: (rank, T), or [d(h) | d(logits)]: (columns, T)
    const char* pi_tiles;
    const void* scale;
    float* sums;  // [chunks, width, groups * group_size]
    int tokens, chunk, stages, stage_bytes;
    int feature_tiles, group_size, groups, experts, tile_experts, rank;
    int width;          // columns of the product
    int block_columns;  // of a block
};

struct AddArgs {
    const float* sums;
    void *out, *out_router;  // d(lora_b), or d(lora_a) and d(router); each may be absent
    DType out_dtype, router_dtype;
    float factor;
    int chunks, width, features, rank;
    int first_router;  // the column where those of d(router) start
};

// What a block works on.
struct TokenTile {
    int group, feature, column;  // the first feature within the group, the first column
    int chunk, token, steps;
    int columns;  // live ones
};

template <int BF, int kGroups>
__device__ TokenTile token_tile(const TokenArgs& p) {
    TokenTile t;
    t.group = int(blockIdx.x) / p.feature_tiles * kGroups;
    t.feature = int(blockIdx.x) % p.feature_tiles * BF;
    t.column = int(blockIdx.y) * p.block_columns;
    t.chunk = int(blockIdx.z);
    t.token = t.chunk * p.chunk;
    t.steps = (min(p.chunk, p.tokens - t.token) + kTokens - 1) / kTokens;
    t.columns = min(p.block_columns, p.width - t.column);
    return t;
}

// BF = features of a block; bytes of a token in a box of them, of a box, of their tile.
template <int BF>
constexpr int kRowBytes = BF < 64 ? 64 : 128;
template <int BF>
constexpr int kFeatureBox = kTokens * kRowBytes<BF>;
template <int BF>
constexpr int kFeatureBytes = (BF + 63) / 64 * kFeatureBox<BF>;

// Tiles by TMA, one thread.
template <bool mixed, int BF, int kGroups>
__device__ void load_tiles(const TokenArgs& p, const TokenTile& t, char* shared, uint64_t* full, uint64_t* empty) {
    const int boxes = mixed ? 1 : (t.columns + 63) / 64;
    const int h_bytes = kTokens * p.rank * 2, weight_bytes = Plan<mixed>::kColumns / p.rank * kWeightRow;
    const int bytes = kGroups * kFeatureBytes<BF> + (mixed ? h_bytes + kGroups * weight_bytes : boxes * kBoxBytes);
    const int64_t group_tiles = (p.tokens + kTokens - 1) / kTokens, pitch = int64_t(p.tile_experts) * kWeightRow;
    const char* weights = p.pi_tiles + t.token / kTokens * pitch + t.column / p.rank * kWeightRow;
    Ring ring;
    for (int step = 0; step < t.steps; ++step) {
        char* const stage = shared + ring.stage * p.stage_bytes;
        uint64_t* const barrier = full + ring.stage;
        const int token = t.token + step * kTokens;
        barrier_wait(empty + ring.stage, ring.parity ^ 1);
        barrier_expect(barrier, uint32_t(bytes));
#pragma unroll
        for (int at = 0; at < kGroups * kFeatureBytes<BF>; at += kFeatureBox<BF>) {
            tma_load_once(stage + at, &p.features, barrier, t.feature + at % kFeatureBytes<BF> / kFeatureBox<BF> * 64,
                          t.group + at / kFeatureBytes<BF>, token);
        }
        char* const narrow = stage + kGroups * kFeatureBytes<BF>;
        for (int box = 0; box < boxes; ++box) {
            tma_load(narrow + box * kBoxBytes, &p.columns, barrier, mixed ? 0 : t.column + box * 64, token);
        }
        if constexpr (mixed) {
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                const int64_t tile = min(t.group + g, p.groups - 1) * group_tiles;
                bulk_load(narrow + h_bytes + g * weight_bytes, weights + tile * pitch, uint32_t(weight_bytes), barrier);
            }
            weights += pitch;
        }
        ring.advance(p.stages);
    }
}

// A pair of tokens of z: one rounding of pi h, or of (pi s) h with pi s in fp32.
template <class E>
__device__ uint32_t mixed_h(uint32_t h, uint32_t pi) {
    return bits_as<uint32_t>(__hmul2_rn(bits_as<Pair<E>>(pi), bits_as<Pair<E>>(h)));
}
template <class E>
__device__ uint32_t mixed_h(uint32_t h, uint32_t pi, float scale) {
    const float2 w = to_float2(bits_as<Pair<E>>(pi)), v = to_float2(bits_as<Pair<E>>(h));
    return bits_as<uint32_t>(rounded2<E>((w.x * scale) * v.x, (w.y * scale) * v.y));
}

// How a warp reads its 16 columns of z, whose tokens become wgmma's k.
template <class E, bool two_experts, bool scaled>
struct MixedH {
    int pitch;              // bytes of a token of h
    uint32_t rows, weight;  // this lane's place in the tiles of h and pi
    float scale[2];

    // two_experts: rank 8, where the lower eight columns belong to the next one.
    __device__ MixedH(const TokenArgs& p, const TokenTile& t, int warpgroup) {
        const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, matrix = lane / 8;
        const int expert = (64 * warpgroup + 16 * warp) / p.rank;
        const int low = warp * 16 % p.rank, high = (low + 8) % p.rank;
        pitch = p.rank * 2;
        rows = uint32_t((lane / 16 * 8 + lane % 8) * pitch + (lane & 8 ? high : low) * 2);
        rows ^= ((rows >> 7) & (pitch / 16 - 1)) << 4;
        // Every row of a matrix of pi is the same run of eight tokens.
        const int row = two_experts ? expert + matrix % 2 : expert, run = two_experts ? matrix / 2 : matrix;
        weight = uint32_t(kTokens * pitch + row * kWeightRow + (run ^ (t.column / p.rank + row) % 8) * 16);
        for (int i = 0; i < 2; ++i) {
            const int n = t.column / p.rank + expert + (two_experts ? i : 0);
            scale[i] = scaled && n < p.experts ? to_float(static_cast<const E*>(p.scale)[n]) : 0.0f;
        }
    }

    static constexpr int kSteps = kTokens / 16, kWeightLoads = two_experts ? kSteps : kSteps / 2;
    using Rows = uint32_t[kSteps][4];
    using Weights = uint32_t[kWeightLoads][4];

    // All 64 tokens of the tile of h at `at`, of a group's pi: every load before the first product, so that they wait
    // together.
    __device__ void load_rows(Rows& h, uint32_t at) const {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) load_matrices<true>(h[k], at + rows + k * 16 * pitch);
    }
    __device__ void load_weights(Weights& w, uint32_t at) const {
#pragma unroll
        for (int i = 0; i < kWeightLoads; ++i) {
            load_matrices<false>(w[i], (at + weight) ^ (i * (two_experts ? 32 : 64)));
        }
    }

    __device__ void build(const Rows& h, const Weights& w, uint32_t (&a)[kTokens / 4]) const {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32_t pi = two_experts ? w[k][i] : w[k / 2][k % 2 * 2 + i / 2];
                a[4 * k + i] = scaled ? mixed_h<E>(h[k][i], pi, scale[i % 2]) : mixed_h<E>(h[k][i], pi);
            }
        }
    }
};

// The sums of 64 columns to memory.
template <int BF>
__device__ void store_sums(const TokenArgs& p, const TokenTile& t, int group, int tile, const float (&c)[BF / 2]) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int column = t.column + 64 * tile + 16 * warp + lane / 4, feature = t.feature + lane % 4 * 2;
    const int64_t pitch = int64_t(p.groups) * p.group_size;
    float* const to = p.sums + (int64_t(t.chunk) * p.width + column) * pitch + group * p.group_size + feature;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        if (column + 8 * row >= p.width) continue;
#pragma unroll
        for (int j = 0; j < BF / 8; ++j) {
            if (feature + 8 * j < p.group_size) {
                *reinterpret_cast<float2*>(to + 8 * row * pitch + 8 * j) = {c[4 * j + 2 * row], c[4 * j + 2 * row + 1]};
            }
        }
    }
}

// d(B) of 64 columns and kGroups groups.
template <class E, int BF, int kGroups, bool two_experts, bool scaled>
__device__ void multiply_mixed(const TokenArgs& p, const TokenTile& t, char* shared, uint64_t* full, uint64_t* empty,
                               int warpgroup) {
    using Z = MixedH<E, two_experts, scaled>;
    const Z z(p, t, warpgroup);
    const uint32_t narrow = smem_address(shared) + kGroups * kFeatureBytes<BF>;
    const int weight_bytes = Plan<true>::kColumns / p.rank * kWeightRow;
    const uint64_t features = smem_descriptor(shared, kFeatureBox<BF>, 8 * kRowBytes<BF>, swizzle_of(kRowBytes<BF>));
    float c[kGroups][BF / 2];
    uint32_t a[kTokens / 4];
    Ring ring;
    for (int step = 0; step < t.steps; ++step) {
        const uint32_t stage = ring.stage * p.stage_bytes;
        typename Z::Rows h;
        typename Z::Weights w;
        barrier_wait(full + ring.stage, ring.parity);
        z.load_weights(w, narrow + stage);
        z.load_rows(h, narrow + stage);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            z.build(h, w, a);
            pin(a);
            const uint64_t b = advanced(features, stage + g * kFeatureBytes<BF>);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kTokens / 16; ++k) {  // 16 tokens: 16 rows
                wgmma<E, 1>(c[g], a + 4 * k, advanced(b, k * 16 * kRowBytes<BF>), step > 0 || k > 0);
            }
            wgmma_commit();
            if (g + 1 < kGroups) z.load_weights(w, narrow + stage + (g + 1) * weight_bytes);
            wgmma_wait<0>();  // the other warpgroups keep the tensor cores busy while this one builds its operand
            pin(c[g]);
            pin(a);
        }
        barrier_arrive(empty + ring.stage);  // every thread: it has read by itself, not by products alone
        ring.advance(p.stages);
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
        if (t.group + g < p.groups) store_sums<BF>(p, t, t.group + g, warpgroup, c[g]);
    }
}

// d(A) and d(R) of `tiles` times 64 columns.
template <class E, int BF, int tiles>
__device__ void multiply_rows(const TokenArgs& p, const TokenTile& t, char* shared, uint64_t* full, uint64_t* empty,
                              int warpgroup) {
    constexpr int kWarpgroups = Plan<false>::kWarpgroups;
    const uint64_t features = smem_descriptor(shared, kFeatureBox<BF>, 8 * kRowBytes<BF>, swizzle_of(kRowBytes<BF>));
    const uint64_t rows =
        smem_descriptor(shared + kFeatureBytes<BF> + warpgroup * kBoxBytes, kBoxBytes, 1024, Swizzle::b128);
    float c[tiles][BF / 2];
    Ring ring;
    for (int step = 0; step < t.steps; ++step) {
        barrier_wait(full + ring.stage, ring.parity);
        const uint32_t stage = ring.stage * p.stage_bytes;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kTokens / 16; ++k) {
#pragma unroll
            for (int m = 0; m < tiles; ++m) {
                wgmma<E, 1, 1>(c[m], advanced(rows, stage + m * kWarpgroups * kBoxBytes + k * 2048),
                               advanced(features, stage + k * 16 * kRowBytes<BF>), step > 0 || k > 0);
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int m = 0; m < tiles; ++m) pin(c[m]);
        if (threadIdx.x % 32 == 0) barrier_arrive(empty + ring.stage);
        ring.advance(p.stages);
    }
#pragma unroll
    for (int m = 0; m < tiles; ++m) store_sums<BF>(p, t, 0, warpgroup + m * kWarpgroups, c[m]);
}

template <class E, bool mixed, int BF, int kGroups>
__global__ void __launch_bounds__(Plan<mixed>::kThreads, 1) token_kernel(const __grid_constant__ TokenArgs p) {
    constexpr int kWarpgroups = Plan<mixed>::kWarpgroups;
    extern __shared__ char raw[];
    char* const shared = raw + (1024 - smem_address(raw) % 1024) % 1024;
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared + p.stages * p.stage_bytes);
    uint64_t* const empty = full + kMaxStages;
    const TokenTile t = token_tile<BF, kGroups>(p);
    const int tiles = (t.columns + 63) / 64;
    if (threadIdx.x == 0) {
        init_stages(full, empty, p.stages, (mixed ? 128 : 4) * uint32_t(min(tiles, kWarpgroups)));
        barrier_init_fence();
    }
    __syncthreads();
    grid_dependency_wait();
    launch_dependents();

    const int warpgroup = uniform(threadIdx.x / 128);
    if (warpgroup == kWarpgroups) {
        shrink_registers<Plan<mixed>::kProducerRegisters>();
        if (threadIdx.x % 128 == 0) load_tiles<mixed, BF, kGroups>(p, t, shared, full, empty);
    } else {
        grow_registers<Plan<mixed>::kConsumerRegisters>();
        if constexpr (mixed) {
            if (warpgroup < tiles) {
                if constexpr (kGroups > 1) {  // registers for one expert a warp and no scale
                    multiply_mixed<E, BF, kGroups, false, false>(p, t, shared, full, empty, warpgroup);
                } else {
                    if (p.rank > 8 && !p.scale)
                        multiply_mixed<E, BF, 1, false, false>(p, t, shared, full, empty, warpgroup);
                    else if (p.rank > 8)
                        multiply_mixed<E, BF, 1, false, true>(p, t, shared, full, empty, warpgroup);
                    else if (!p.scale)
                        multiply_mixed<E, BF, 1, true, false>(p, t, shared, full, empty, warpgroup);
                    else
                        multiply_mixed<E, BF, 1, true, true>(p, t, shared, full, empty, warpgroup);
                }
            }
        } else {
            if (warpgroup + kWarpgroups < tiles)
                multiply_rows<E, BF, 2>(p, t, shared, full, empty, warpgroup);
            else if (warpgroup < tiles)
                multiply_rows<E, BF, 1>(p, t, shared, full, empty, warpgroup);
        }
    }
}

__device__ inline void store(void* to, DType dtype, int64_t at, float v) {
    switch (dtype) {
        case DType::f32:
            static_cast<float*>(to)[at] = v;
            break;
        case DType::bf16:
            static_cast<bf16*>(to)[at] = rounded<bf16>(v);
            break;
        case DType::f16:
            static_cast<f16*>(to)[at] = rounded<f16>(v);
            break;
    }
}

// Eight consecutive values at a multiple of eight.
__device__ inline void store8(void* to, DType dtype, int64_t at, const float (&v)[8]) {
    if (dtype == DType::f32) {
        float4* const f = reinterpret_cast<float4*>(static_cast<float*>(to) + at);
        f[0] = {v[0], v[1], v[2], v[3]};
        f[1] = {v[4], v[5], v[6], v[7]};
        return;
    }
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        packed[i] = dtype == DType::bf16 ? bits_as<uint32_t>(rounded2<bf16>(v[2 * i], v[2 * i + 1]))
                                         : bits_as<uint32_t>(rounded2<f16>(v[2 * i], v[2 * i + 1]));
    }
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(to) + at) = {packed[0], packed[1], packed[2], packed[3]};
}

// The chunks of eight columns of one feature, in order.
template <bool mixed>
__global__ void __launch_bounds__(kAddThreads) add_chunks_kernel(const AddArgs p) {
    grid_dependency_wait();
    launch_dependents();
    const int feature = int(blockIdx.x) * kAddThreads + threadIdx.x, column = int(blockIdx.y) * 8;
    if (feature >= p.features) return;
    const int64_t features = p.features;
    const float* from = p.sums + column * features + feature;
    float v[8];
#pragma unroll 4
    for (int chunk = 0; chunk < p.chunks; ++chunk, from += p.width * features) {
        float part[8];
#pragma unroll
        for (int n = 0; n < 8; ++n) part[n] = column + n < p.width ? from[n * features] : 0.0f;
#pragma unroll
        for (int n = 0; n < 8; ++n) v[n] = chunk ? v[n] + part[n] : part[n];
    }
    if constexpr (mixed) {
#pragma unroll
        for (int n = 0; n < 8; ++n) v[n] = v[n] * p.factor;
        store8(p.out, p.out_dtype, (column / p.rank * features + feature) * p.rank + column % p.rank, v);
    } else {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const int c = column + n;
            if (p.out && c < p.rank) store(p.out, p.out_dtype, c * features + feature, v[n]);
            if (p.out_router && c >= p.first_router && c < p.width) {
                store(p.out_router, p.router_dtype, (c - p.first_router) * features + feature, v[n]);
            }
        }
    }
}

template <class E, bool mixed, int BF, int kGroups = 1>
void launch_tokens(const char* name, TokenArgs& p, const RoutedLoraBwd& f) {
    const View& features = mixed ? f.dout : f.x;
    p.features = tensor_map(
        features.data, f.compute_dtype,
        {{p.group_size, 1, kRowBytes<BF> / 2}, {p.groups, p.group_size, 1}, {f.tokens, features.stride[0], kTokens}});
    const int narrow_bytes =
        mixed ? kTokens * int(f.rank) * 2 + kGroups * (Plan<true>::kColumns / int(f.rank)) * kWeightRow
              : p.block_columns / 64 * kBoxBytes;
    p.stage_bytes = int(ceil_div(kGroups * kFeatureBytes<BF> + narrow_bytes, 1024) * 1024);
    constexpr int barrier_bytes = 2 * kMaxStages * 8;
    p.stages = std::min(kMaxStages, (kMaxSharedBytes - 1024 - barrier_bytes) / p.stage_bytes);
    p.tokens = int(f.tokens);
    p.chunk = int(f.token_chunk);
    p.experts = int(f.experts);
    p.tile_experts = tile_experts(f);
    p.feature_tiles = int(ceil_div(p.group_size, BF));
    const dim3 grid(unsigned(ceil_div(p.groups, kGroups) * p.feature_tiles),
                    unsigned(ceil_div(p.width, p.block_columns)), unsigned(ceil_div(f.tokens, f.token_chunk)));
    const int shared = 1024 + p.stages * p.stage_bytes + barrier_bytes;
    launch<token_kernel<E, mixed, BF, kGroups>>(name, grid, Plan<mixed>::kThreads, shared, f.stream, true, p);
}

template <class E, bool mixed>
void choose_features(const char* name, TokenArgs& p, const RoutedLoraBwd& f) {
    auto padded = [&](int features) { return ceil_div(p.group_size, features) * features; };
    auto few = [&](int features, int groups = 1) {
        return ceil_div(f.tokens, f.token_chunk) * ceil_div(p.groups, groups) * ceil_div(p.group_size, features) *
                   ceil_div(p.width, p.block_columns) <
               multiprocessors() * 3 / 4;
    };
    // Narrower where the group's tail would waste products, and where blocks would be too few. Several small groups
    // share the tiles of h.
    if (mixed && p.group_size <= 24 && p.rank > 8 && !p.scale && !few(24, kSmallGroups))
        launch_tokens<E, mixed, mixed ? 24 : 32, mixed ? kSmallGroups : 1>(name, p, f);
    else if (p.group_size <= 32 || few(64))
        launch_tokens<E, mixed, 32>(name, p, f);
    else if (padded(64) < padded(128) || few(128))
        launch_tokens<E, mixed, 64>(name, p, f);
    else
        launch_tokens<E, mixed, 128>(name, p, f);
}

template <bool mixed>
void launch_add_chunks(const char* name, const TokenArgs& p, AddArgs& a, const RoutedLoraBwd& f) {
    a.sums = p.sums;
    a.chunks = int(ceil_div(f.tokens, f.token_chunk));
    a.width = p.width;
    a.features = p.groups * p.group_size;
    a.rank = int(f.rank);
    const dim3 grid(unsigned(ceil_div(a.features, kAddThreads)), unsigned(ceil_div(a.width, 8)));
    launch<add_chunks_kernel<mixed>>(name, grid, kAddThreads, 0, f.stream, true, a);
}

template <class E>
void launch_grad_b(const RoutedLoraBwd& f, const Buffers& w) {
    TokenArgs p = {};
    p.columns = tensor_map(f.h.data, f.compute_dtype, {{f.rank, 1, int(f.rank)}, {f.tokens, f.rank, kTokens}});
    p.pi_tiles = static_cast<const char*>(w.pi_tiles);
    p.scale = f.expert_scale.data;
    p.sums = w.chunk_sums;
    p.group_size = int(f.d_out / f.groups);
    p.groups = int(f.groups);
    p.rank = int(f.rank);
    p.width = int(f.experts * f.rank);
    p.block_columns = Plan<true>::kColumns;
    choose_features<E, true>("routed_lora grad_b", p, f);
    AddArgs a = {};
    a.out = f.dlora_b.data;
    a.out_dtype = f.dlora_b.dtype;
    a.factor = f.scaling;
    launch_add_chunks<true>("routed_lora grad_b, chunks", p, a, f);
}

template <class E>
void launch_grad_rows(const RoutedLoraBwd& f, const Buffers& w) {
    TokenArgs p = {};
    p.rank = int(f.rank);
    p.width = row_width(f);
    p.columns = tensor_map(w.rows, f.compute_dtype, {{p.width, 1, 64}, {f.tokens, row_pitch(f), kTokens}});
    p.sums = w.chunk_sums;
    p.group_size = int(f.d_in);
    p.groups = 1;
    const int64_t tiles = ceil_div(p.width, 64);
    p.block_columns = int(ceil_div(tiles, ceil_div(tiles, Plan<false>::kColumns / 64))) * 64;  // the same for each
    choose_features<E, false>("routed_lora grad_rows", p, f);
    AddArgs a = {};
    a.out = f.dlora_a.data;
    a.out_dtype = f.dlora_a.dtype;
    a.out_router = f.drouter.data;
    a.router_dtype = f.drouter.dtype;
    a.first_router = padded_rank(f);
    launch_add_chunks<false>("routed_lora grad_rows, chunks", p, a, f);
}

}  // namespace

void grad_b(const RoutedLoraBwd& f, const Buffers& w) {
    if (f.compute_dtype == DType::bf16)
        launch_grad_b<bf16>(f, w);
    else
        launch_grad_b<f16>(f, w);
}

void grad_rows(const RoutedLoraBwd& f, const Buffers& w) {
    if (f.compute_dtype == DType::bf16)
        launch_grad_rows<bf16>(f, w);
    else
        launch_grad_rows<f16>(f, w);
}

}  // namespace mtlora::cuda
