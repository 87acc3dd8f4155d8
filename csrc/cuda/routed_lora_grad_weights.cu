// grad_b and grad_rows: products whose K is all tokens, d(B_flat[g]) = scaling * dout_g^T z_g and
// [d(A); d(R)] = [d(h) | d(logits)]^T x.
//
// Both are computed transposed: rows of the product are the narrow operand's columns, which reach wgmma through
// registers (z is never stored), its columns are outputs or input features, which stay as TMA left them. A block owns
// 128 features, up to 256 columns and one chunk of tokens; the chunks of one tile are a cluster, whose blocks add the
// partial sums in order through each other's shared memory.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "cuda/cluster.cuh"
#include "cuda/elements.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/routed_lora_bwd.h"
#include "cuda/tensor.cuh"

namespace mtlora::cuda {
namespace {

constexpr int kTokens = 64;    // a step
constexpr int kColumns = 256;  // four row tiles of the transposed product, two a warpgroup
constexpr int kBoxBytes = kTokens * 128;
constexpr int kThreads = 384;  // two multiplying warpgroups and one that loads, with 384 x 168 registers
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kMaxStages = 8;
constexpr int kWeightRow = kTokens * 2;  // bytes of an expert in a tile of pi

// BF = features of a block.
template <int BF>
struct FeatureTile {
    static constexpr int kBytes = (BF + 63) / 64 * kBoxBytes;
    static constexpr int kSumPitch = BF + 8;  // floats of a column: 4 rows of a store touch different banks
    static constexpr int kSumBytes = kColumns * kSumPitch * 4;
};

struct TokenArgs {
    CUtensorMap features;  // dout or x: (features of a group, groups, T)
    CUtensorMap columns;   // h: (rank, T), or [d(h) | d(logits)]: (columns, T)
    const char* pi_tiles;
    const void* scale;
    void *out, *out_router;  // d(lora_b), or d(lora_a) and d(router); each may be absent
    DType out_dtype, router_dtype;
    float factor;
    int tokens, chunk, stages, stage_bytes, ring_bytes;
    int feature_tiles, group_size, groups, experts, tile_experts, rank;
    int width;         // columns of the product
    int first_router;  // the column where those of d(router) start
};

// What a block works on.
struct TokenTile {
    int group, feature, column;  // the first feature within the group, the first column
    int token, steps;
    int columns;  // live ones
};

template <int BF>
__device__ TokenTile token_tile(const TokenArgs& p) {
    TokenTile t;
    t.group = int(blockIdx.y) / p.feature_tiles;
    t.feature = int(blockIdx.y) % p.feature_tiles * BF;
    t.column = int(blockIdx.z) * kColumns;
    t.token = int(blockIdx.x) * p.chunk;
    t.steps = (min(p.chunk, p.tokens - t.token) + kTokens - 1) / kTokens;
    t.columns = min(kColumns, p.width - t.column);
    return t;
}

// Tiles by TMA, one thread.
template <bool mixed, int BF>
__device__ void load_tiles(const TokenArgs& p, const TokenTile& t, char* shared, uint64_t* full, uint64_t* empty) {
    const int boxes = mixed ? 1 : (t.columns + 63) / 64;
    constexpr int kFeatureBytes = FeatureTile<BF>::kBytes;
    const int h_bytes = kTokens * p.rank * 2, weight_bytes = kColumns / p.rank * kWeightRow;
    const int bytes = kFeatureBytes + (mixed ? h_bytes + weight_bytes : boxes * kBoxBytes);
    const char* weights = nullptr;
    if constexpr (mixed) {
        const int64_t tile = int64_t(t.group) * ((p.tokens + kTokens - 1) / kTokens) + t.token / kTokens;
        weights = p.pi_tiles + (tile * p.tile_experts + t.column / p.rank) * kWeightRow;
    }
    Ring ring;
    for (int step = 0; step < t.steps; ++step) {
        char* const stage = shared + ring.stage * p.stage_bytes;
        uint64_t* const barrier = full + ring.stage;
        const int token = t.token + step * kTokens;
        barrier_wait(empty + ring.stage, ring.parity ^ 1);
        barrier_expect(barrier, uint32_t(bytes));
#pragma unroll
        for (int at = 0; at < kFeatureBytes; at += kBoxBytes) {
            tma_load(stage + at, &p.features, barrier, t.feature + at / kBoxBytes * 64, t.group, token);
        }
        for (int box = 0; box < boxes; ++box) {
            tma_load(stage + kFeatureBytes + box * kBoxBytes, &p.columns, barrier, t.column * !mixed + box * 64, token);
        }
        if constexpr (mixed) {
            bulk_load(stage + kFeatureBytes + h_bytes, weights, uint32_t(weight_bytes), barrier);
            weights += p.tile_experts * kWeightRow;
        }
        ring.advance(p.stages);
    }
}

// A pair of tokens of z: one rounding of pi h, or of (pi s) h with pi s in fp32.
template <class E>
__device__ uint32_t mixed_h(uint32_t h, uint32_t pi, bool scaled, float scale) {
    if (!scaled) return bits_as<uint32_t>(__hmul2_rn(bits_as<Pair<E>>(pi), bits_as<Pair<E>>(h)));
    const float2 w = to_float2(bits_as<Pair<E>>(pi)), v = to_float2(bits_as<Pair<E>>(h));
    return bits_as<uint32_t>(rounded2<E>((w.x * scale) * v.x, (w.y * scale) * v.y));
}

// The product of `tiles` row tiles of 64 columns each (number warpgroup, warpgroup + 2 of the block), then its sums to
// shared memory as [column][feature].
template <class E, bool mixed, int BF, int tiles>
__device__ void multiply(const TokenArgs& p, const TokenTile& t, char* shared, uint64_t* full, uint64_t* empty,
                         int multiplying) {
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, q = lane % 4;
    // Rows of the narrow operand's tile: h, or one box of [d(h) | d(logits)].
    const int pitch = mixed ? p.rank * 2 : 128, mask = pitch / 16 - 1;
    const int low = mixed ? warp * 16 % p.rank : warp * 16, high = mixed ? (warp * 16 + 8) % p.rank : warp * 16 + 8;
    uint32_t offset = uint32_t((lane / 16 * 8 + lane % 8) * pitch + (lane & 8 ? high : low) * 2);
    offset ^= ((offset >> 7) & mask) << 4;

    int expert[tiles];  // within the block's columns; rank 8: the lower rows belong to the next one
    float scale[tiles][2];
    const bool scaled = mixed && p.scale;
#pragma unroll
    for (int m = 0; m < tiles; ++m) {
        expert[m] = (64 * (warpgroup + 2 * m) + 16 * warp) / p.rank;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int n = t.column / p.rank + expert[m] + (p.rank == 8 ? i : 0);
            scale[m][i] = scaled && n < p.experts ? to_float(static_cast<const E*>(p.scale)[n]) : 0.0f;
        }
    }

    float c[tiles][BF / 2];
    Ring ring;
    for (int step = 0; step < t.steps; ++step) {
        const char* const stage = shared + ring.stage * p.stage_bytes;
        const uint32_t rows = smem_address(stage) + FeatureTile<BF>::kBytes + offset;
        uint32_t a[tiles][16];
        barrier_wait(full + ring.stage, ring.parity);
#pragma unroll
        for (int k = 0; k < kTokens / 16; ++k) {
            if constexpr (mixed) {
                const char* const weights = stage + FeatureTile<BF>::kBytes + kTokens * p.rank * 2 + 32 * k + 4 * q;
                uint32_t h[4];
                load_matrices<true>(h, rows + k * 16 * pitch);
#pragma unroll
                for (int m = 0; m < tiles; ++m) {
                    const char* const at = weights + expert[m] * kWeightRow;
                    const uint32_t w0 = *reinterpret_cast<const uint32_t*>(at);
                    const uint32_t w1 = *reinterpret_cast<const uint32_t*>(at + 16);
                    uint32_t w2 = w0, w3 = w1;
                    if (p.rank == 8) {
                        w2 = *reinterpret_cast<const uint32_t*>(at + kWeightRow);
                        w3 = *reinterpret_cast<const uint32_t*>(at + kWeightRow + 16);
                    }
                    a[m][4 * k] = mixed_h<E>(h[0], w0, scaled, scale[m][0]);
                    a[m][4 * k + 1] = mixed_h<E>(h[1], w2, scaled, scale[m][1]);
                    a[m][4 * k + 2] = mixed_h<E>(h[2], w1, scaled, scale[m][0]);
                    a[m][4 * k + 3] = mixed_h<E>(h[3], w3, scaled, scale[m][1]);
                }
            } else {
#pragma unroll
                for (int m = 0; m < tiles; ++m) {
                    uint32_t v[4];
                    load_matrices<true>(v, rows + (warpgroup + 2 * m) * kBoxBytes + k * 16 * pitch);
#pragma unroll
                    for (int i = 0; i < 4; ++i) a[m][4 * k + i] = v[i];
                }
            }
        }
#pragma unroll
        for (int m = 0; m < tiles; ++m) pin(a[m]);
        const uint64_t b = smem_descriptor(stage, kBoxBytes, 1024, Swizzle::b128);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kTokens / 16; ++k) {  // 16 tokens: 16 rows of 128 bytes
#pragma unroll
            for (int m = 0; m < tiles; ++m) wgmma<E, 1>(c[m], a[m] + 4 * k, b + 128 * k, step > 0 || k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();  // the other warpgroup keeps the tensor cores busy while this one builds its operand
#pragma unroll
        for (int m = 0; m < tiles; ++m) {
            pin(c[m]);
            pin(a[m]);
        }
        if (lane == 0) barrier_arrive(empty + ring.stage);
        ring.advance(p.stages);
    }

    named_barrier(1, 128 * multiplying);  // the stages are free
    constexpr int kSumPitch = FeatureTile<BF>::kSumPitch;
    float* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int m = 0; m < tiles; ++m) {
        float* const at = sums + (64 * (warpgroup + 2 * m) + 16 * warp + lane / 4) * kSumPitch + 2 * q;
#pragma unroll
        for (int j = 0; j < BF / 8; ++j) {
            *reinterpret_cast<float2*>(at + 8 * j) = {c[m][4 * j], c[m][4 * j + 1]};
            *reinterpret_cast<float2*>(at + 8 * kSumPitch + 8 * j) = {c[m][4 * j + 2], c[m][4 * j + 3]};
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

// Every block of the cluster adds its share of the tile, eight columns of one feature a thread.
template <bool mixed, int BF>
__device__ void add_chunks(const TokenArgs& p, const TokenTile& t, const char* shared) {
    constexpr int kSumPitch = FeatureTile<BF>::kSumPitch;
    const float* const sums = reinterpret_cast<const float*>(shared);
    const uint32_t chunks = cluster_size(), rank = cluster_rank();
    const int octets = (t.columns + 7) / 8;
    const int mine = (octets - int(rank) + int(chunks) - 1) / int(chunks);
    for (int i = threadIdx.x; i < mine * BF; i += 256) {
        const int feature = i % BF, octet = i / BF * int(chunks) + int(rank);
        float v[8];
        for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
            const uint32_t at = cluster_address(sums + octet * 8 * kSumPitch + feature, chunk);
            float part[8];
#pragma unroll
            for (int n = 0; n < 8; ++n) part[n] = cluster_load(at + n * kSumPitch * 4);
#pragma unroll
            for (int n = 0; n < 8; ++n) v[n] = chunk ? v[n] + part[n] : part[n];
        }
        if (t.feature + feature >= p.group_size) continue;
        const int64_t f = int64_t(t.group) * p.group_size + t.feature + feature;
        const int64_t features = int64_t(p.groups) * p.group_size;
        const int column = t.column + octet * 8;
        if constexpr (mixed) {
#pragma unroll
            for (int n = 0; n < 8; ++n) v[n] = v[n] * p.factor;
            store8(p.out, p.out_dtype, (column / p.rank * features + f) * p.rank + column % p.rank, v);
        } else {
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const int c = column + n;
                if (p.out && c < p.rank) store(p.out, p.out_dtype, c * features + f, v[n]);
                if (p.out_router && c >= p.first_router && c < p.width) {
                    store(p.out_router, p.router_dtype, (c - p.first_router) * features + f, v[n]);
                }
            }
        }
    }
}

template <class E, bool mixed, int BF>
__global__ void __launch_bounds__(kThreads, 1) token_kernel(const __grid_constant__ TokenArgs p) {
    extern __shared__ char raw[];
    char* const shared = raw + (1024 - smem_address(raw) % 1024) % 1024;
    uint64_t* const full = reinterpret_cast<uint64_t*>(shared + p.ring_bytes);
    uint64_t* const empty = full + kMaxStages;
    const TokenTile t = token_tile<BF>(p);
    const int multiplying = t.columns > 64 ? 2 : 1;
    if (threadIdx.x == 0) {
        for (int s = 0; s < p.stages; ++s) {
            barrier_init(full + s, 1);
            barrier_init(empty + s, 4 * uint32_t(multiplying));
        }
        barrier_init_fence();
    }
    __syncthreads();
    grid_dependency_wait();
    launch_dependents();

    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // uniform, as setmaxnreg asks
    if (warpgroup == 2) {
        shrink_registers<kProducerRegisters>();
        if (threadIdx.x == 256) load_tiles<mixed, BF>(p, t, shared, full, empty);
        cluster_sync();
        cluster_sync();
    } else {
        grow_registers<kConsumerRegisters>();
        const int tiles = (t.columns - 64 * warpgroup + 127) / 128;
        if (tiles == 2)
            multiply<E, mixed, BF, 2>(p, t, shared, full, empty, multiplying);
        else if (tiles == 1)
            multiply<E, mixed, BF, 1>(p, t, shared, full, empty, multiplying);
        cluster_sync();  // the sums of all chunks are in shared memory
        add_chunks<mixed, BF>(p, t, shared);
        cluster_sync();  // and have been read
    }
}

template <class E, bool mixed, int BF>
void launch_tokens(const char* name, TokenArgs& p, const RoutedLoraBwd& f, int narrow_bytes) {
    p.stage_bytes = int(ceil_div(FeatureTile<BF>::kBytes + narrow_bytes, 1024) * 1024);
    constexpr int barrier_bytes = 2 * kMaxStages * 8;
    p.stages = std::min(kMaxStages, (kMaxSharedBytes - 1024 - barrier_bytes) / p.stage_bytes);
    p.ring_bytes = std::max(p.stages * p.stage_bytes, FeatureTile<BF>::kSumBytes);
    p.tokens = int(f.tokens);
    p.chunk = int(f.token_chunk);
    p.experts = int(f.experts);
    p.rank = int(f.rank);
    p.tile_experts = tile_experts(f);
    p.feature_tiles = int(ceil_div(p.group_size, BF));
    const int chunks = int(ceil_div(f.tokens, f.token_chunk));
    const dim3 grid(unsigned(chunks), unsigned(p.groups * p.feature_tiles), unsigned(ceil_div(p.width, kColumns)));
    launch<token_kernel<E, mixed, BF>>(name, grid, kThreads, 1024 + p.ring_bytes + barrier_bytes, f.stream, true, p,
                                       chunks);
}

template <class E, bool mixed>
void choose_features(const char* name, TokenArgs& p, const RoutedLoraBwd& f, int narrow_bytes) {
    auto padded = [&](int features) { return ceil_div(p.group_size, features) * features; };
    auto few = [&](int features) {
        return ceil_div(f.tokens, f.token_chunk) * p.groups * ceil_div(p.group_size, features) *
                   ceil_div(p.width, kColumns) <
               multiprocessors() * 3 / 4;
    };
    // Narrower where the group's tail would waste products, and where blocks would be too few.
    if (p.group_size <= 32 || few(64))
        launch_tokens<E, mixed, 32>(name, p, f, narrow_bytes);
    else if (padded(64) < padded(128) || few(128))
        launch_tokens<E, mixed, 64>(name, p, f, narrow_bytes);
    else
        launch_tokens<E, mixed, 128>(name, p, f, narrow_bytes);
}

template <class E>
void launch_grad_b(const RoutedLoraBwd& f, const Buffers& w) {
    const int64_t size = f.d_out / f.groups;
    TokenArgs p = {};
    p.features = tensor_map(f.dout.data, f.compute_dtype,
                            {{size, 1, 64}, {f.groups, size, 1}, {f.tokens, f.dout.stride[0], kTokens}});
    p.columns = tensor_map(f.h.data, f.compute_dtype, {{f.rank, 1, int(f.rank)}, {f.tokens, f.rank, kTokens}});
    p.pi_tiles = static_cast<const char*>(w.pi_tiles);
    p.scale = f.expert_scale.data;
    p.out = f.dlora_b.data;
    p.out_dtype = f.dlora_b.dtype;
    p.factor = f.scaling;
    p.group_size = int(size);
    p.groups = int(f.groups);
    p.width = int(f.experts * f.rank);
    choose_features<E, true>("routed_lora grad_b", p, f,
                             kTokens * int(f.rank) * 2 + kColumns / int(f.rank) * kWeightRow);
}

template <class E>
void launch_grad_rows(const RoutedLoraBwd& f, const Buffers& w) {
    TokenArgs p = {};
    p.features =
        tensor_map(f.x.data, f.compute_dtype, {{f.d_in, 1, 64}, {1, f.d_in, 1}, {f.tokens, f.x.stride[0], kTokens}});
    p.first_router = padded_rank(f);
    p.width = f.router.data ? p.first_router + int(f.groups * f.experts) : int(f.rank);
    p.columns = tensor_map(w.rows, f.compute_dtype, {{p.width, 1, 64}, {f.tokens, row_pitch(f), kTokens}});
    p.out = f.dlora_a.data;
    p.out_dtype = f.dlora_a.dtype;
    p.out_router = f.drouter.data;
    p.router_dtype = f.drouter.dtype;
    p.group_size = int(f.d_in);
    p.groups = 1;
    choose_features<E, false>("routed_lora grad_rows", p, f, std::min(4, int(ceil_div(p.width, 64))) * kBoxBytes);
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
