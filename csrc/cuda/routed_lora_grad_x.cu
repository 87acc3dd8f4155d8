// grad_x: d(x) = d(h) A + d(logits) R, two products added at the end.
//
// All rows of A and R for a block's features stay in shared memory, tiles of [d(h) | d(logits)] stream in, d(x)
// streams out. Two warpgroups take every other token tile, each with a loading thread and a ring of its own, so that
// one multiplies while the other stores. The two blocks of a cluster share each tile.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>

#include "cuda/cluster.cuh"
#include "cuda/elements.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/routed_lora_bwd.h"

namespace mtlora::cuda {
namespace {

constexpr int kTokens = 64;
constexpr int kBoxBytes = 64 * 128;            // 64 tokens by 64 columns, 64 columns or tokens by 64 features
constexpr int kMinStages = 3, kMaxStages = 6;  // of each warpgroup
constexpr int kThreads = 320;  // two multiplying warpgroups and a loading warp for each

struct GradXArgs {
    CUtensorMap dh, dlogits, a, router, dx;
    int features, token_tiles;
    int splits;             // of the token tiles, among the clusters with the same features
    int chunks;             // of 64 columns: one of d(h), the others of d(logits), zeros at the end of each
    int h_steps;            // of 16 columns: what of d(h) is not zeros, and as many rows of A
    int weight_bytes;       // of 64 features: A's rows, then R's
    int stages, out_tiles;  // of each warpgroup: of the ring; 64 x 64 between registers and store, 1, 2 or 4
};

// BF = features of a block.
constexpr int shared_bytes(int features, int chunks, int weight_bytes, int stages, int out_tiles) {
    return 1024 + features / 64 * weight_bytes + 2 * (stages + out_tiles) * kBoxBytes + (4 * stages + chunks) * 8;
}

// What a block works on: its features, and the token tiles `first`, `first` + 2, ... up to `last` of a warpgroup.
struct Share {
    int feature, first, last;
};
template <int BF>
__device__ Share share_of(const GradXArgs& p, int warpgroup) {
    const int cluster = int(cluster_size()), index = int(blockIdx.x) / cluster, split = index % p.splits;
    const int feature = (index / p.splits * cluster + int(cluster_rank())) * BF;
    return {feature, int(int64_t(p.token_tiles) * split / p.splits) + warpgroup,
            int(int64_t(p.token_tiles) * (split + 1) / p.splits)};
}
// Where the rows of A or R of a chunk start.
__device__ inline int weight_offset(const GradXArgs& p, int chunk) {
    return chunk ? p.weight_bytes - (p.chunks - chunk) * kBoxBytes : 0;
}

// A barrier a chunk: the first products need not wait for the last rows.
template <int BF>
__device__ void load_weights(const GradXArgs& p, int feature, char* weights, uint64_t* weights_full) {
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
        const int rows = chunk ? 64 : p.h_steps * 16;
        barrier_expect(weights_full + chunk, uint32_t(BF * 2 * rows));
        for (int box = 0; box < BF / 64; ++box) {
            tma_load(weights + box * p.weight_bytes + weight_offset(p, chunk), chunk ? &p.router : &p.a,
                     weights_full + chunk, feature + box * 64, chunk ? (chunk - 1) * 64 : 0);
        }
    }
}

// The rows of one warpgroup, one thread; the blocks of a cluster load a part each for all.
__device__ inline void load_rows(const GradXArgs& p, const Share& s, char* ring_bytes, uint64_t* full,
                                 uint64_t* empty) {
    const int cluster = int(cluster_size()), tokens = kTokens / cluster, mine = int(cluster_rank()) * tokens;
    const uint16_t all = uint16_t((1 << cluster) - 1);
    Ring ring;
    for (int t = s.first; t < s.last; t += 2) {
        for (int chunk = 0; chunk < p.chunks; ++chunk) {
            uint64_t* const barrier = full + ring.stage;
            char* const to = ring_bytes + ring.stage * kBoxBytes + mine * 128;
            const CUtensorMap* const map = chunk ? &p.dlogits : &p.dh;
            const int column = chunk ? (chunk - 1) * 64 : 0, token = t * kTokens + mine;
            barrier_wait(empty + ring.stage, ring.parity ^ 1);
            barrier_expect(barrier, kBoxBytes);
            if (cluster == 1)
                tma_load(to, map, barrier, column, token, 0);
            else
                tma_load_multicast(to, map, barrier, all, column, token, 0);
            ring.advance(p.stages);
        }
    }
}

template <class E, int BF>
struct Multiply {
    const GradXArgs& p;
    uint64_t *const full, *const weights_full;
    const int lane;
    const uint32_t cluster, empty;
    const uint64_t rows, weights;  // the operands of stage 0 and of chunk 0
    Ring ring;
    int last;  // the stage whose products may still run
    bool first_tile = true;

    __device__ Multiply(const GradXArgs& p, const char* weight_bytes, const char* ring_bytes, uint64_t* full,
                        uint64_t* empty, uint64_t* weights_full)
        : p(p),
          full(full),
          weights_full(weights_full),
          lane(threadIdx.x % 32),
          cluster(cluster_size()),
          empty(cluster_address(empty, lane < int(cluster) ? lane : 0)),
          rows(smem_descriptor(ring_bytes, 16, 1024, Swizzle::b128)),
          weights(smem_descriptor(weight_bytes, uint32_t(p.weight_bytes), 1024, Swizzle::b128)) {}

    // acc += `steps` times 16 columns of a chunk, or starts with them; left running.
    __device__ __forceinline__ void issue(float (&acc)[BF / 2], int chunk, int steps, bool accumulate) {
        const uint64_t a = advanced(rows, ring.stage * kBoxBytes), b = advanced(weights, weight_offset(p, chunk));
        if (first_tile) barrier_wait(weights_full + chunk, 0);
        barrier_wait(full + ring.stage, ring.parity);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < steps; ++k) {
            wgmma<E, 0, 1>(acc, advanced(a, 32 * k), advanced(b, 2048 * k), accumulate || k > 0);
        }
        wgmma_commit();
        last = ring.stage;
        ring.advance(p.stages);
    }

    __device__ void release(int stage) {
        if (lane < int(cluster)) cluster_arrive(empty + 8 * stage);
    }

    __device__ void tile(float (&from_h)[BF / 2], float (&from_logits)[BF / 2]) {
        issue(from_h, 0, p.h_steps, false);
        for (int chunk = 1; chunk < p.chunks; ++chunk) {
            const int before = last;
            issue(from_logits, chunk, 4, chunk > 1);
            wgmma_wait<1>();
            release(before);
        }
        wgmma_wait<0>();
        pin(from_h);
        pin(from_logits);
        release(last);
        first_tile = false;
        if (p.chunks == 1) {
#pragma unroll
            for (int i = 0; i < BF / 2; ++i) from_logits[i] = 0.0f;
        }
    }
};

// The sum of both to d(x), 64 features at a time.
template <class E, int BF>
struct Store {
    const GradXArgs& p;
    char* const tiles;
    const int barrier;
    int next = 0;

    __device__ void tile(const float (&from_h)[BF / 2], const float (&from_logits)[BF / 2], int feature, int token) {
        const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
        const bool elected = threadIdx.x % 128 == 0;
#pragma unroll
        for (int box = 0; box < BF / 64; ++box) {
            char* const tile = tiles + next * kBoxBytes;
            next = (next + 1) & (p.out_tiles - 1);
            if (elected) {  // a group of stores a tile: all but the last out_tiles - 1 have been read
                if (p.out_tiles == 1)
                    tma_store_wait_read<0>();
                else if (p.out_tiles == 2)
                    tma_store_wait_read<1>();
                else
                    tma_store_wait_read<3>();
            }
            named_barrier(barrier, 128);
#pragma unroll
            for (int i = 16 * box; i < 16 * box + 16; ++i) {  // rows `row` and `row` + 8 in turn, eight columns each two
                const uint32_t at = uint32_t((row + i % 2 * 8) * 128 + i / 2 % 8 * 16);
                *reinterpret_cast<Pair<E>*>(tile + swizzled<128>(at) + lane % 4 * 4) =
                    rounded2<E>(from_h[2 * i] + from_logits[2 * i], from_h[2 * i + 1] + from_logits[2 * i + 1]);
            }
            fence_async_proxy();
            named_barrier(barrier, 128);
            if (elected) {
                if (feature + box * 64 < p.features) tma_store(&p.dx, tile, feature + box * 64, token, 0);
                tma_store_commit();
            }
        }
    }
};

template <class E, int BF>
__global__ void __launch_bounds__(kThreads, 1) grad_x_kernel(const __grid_constant__ GradXArgs p) {
    extern __shared__ char raw[];
    char* const weights = raw + (1024 - smem_address(raw) % 1024) % 1024;
    char* const rings = weights + BF / 64 * p.weight_bytes;
    char* const out = rings + 2 * p.stages * kBoxBytes;
    uint64_t* const barriers = reinterpret_cast<uint64_t*>(out + 2 * p.out_tiles * kBoxBytes);
    uint64_t* const weights_full = barriers + 4 * p.stages;
    if (threadIdx.x == 0) {
        for (int s = 0; s < 2 * p.stages; ++s) {
            barrier_init(barriers + s, 1);
            barrier_init(barriers + 2 * p.stages + s, 4 * cluster_size());
        }
        for (int chunk = 0; chunk < p.chunks; ++chunk) barrier_init(weights_full + chunk, 1);
        barrier_init_fence();
    }
    cluster_sync();

    const int warp = uniform(threadIdx.x / 32), loader = warp - 8, warpgroup = loader < 0 ? warp / 4 : loader;
    const Share s = share_of<BF>(p, warpgroup);
    char* const ring_bytes = rings + warpgroup * p.stages * kBoxBytes;
    uint64_t *const full = barriers + warpgroup * p.stages, *const empty = full + 2 * p.stages;
    if (loader >= 0) {
        if (threadIdx.x % 32 == 0) {
            if (loader == 1) load_weights<BF>(p, s.feature, weights, weights_full);  // no kernel before writes them
            grid_dependency_wait();
            launch_dependents();
            load_rows(p, s, ring_bytes, full, empty);
        }
    } else {
        Multiply<E, BF> products(p, weights, ring_bytes, full, empty, weights_full);
        Store<E, BF> store = {p, out + warpgroup * p.out_tiles * kBoxBytes, 1 + warpgroup};
        for (int t = s.first; t < s.last; t += 2) {
            float from_h[BF / 2], from_logits[BF / 2];
            products.tile(from_h, from_logits);
            store.tile(from_h, from_logits, s.feature, t * kTokens);
        }
        if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
    }
    cluster_sync();  // the other may still signal this block's barriers
}

// Splits of the token tiles: few waves of even shares; loading the weights costs about two tiles.
inline int choose_splits(int token_tiles, int feature_tiles, int at_once) {
    const auto cost = [&](int splits) {
        return ceil_div(feature_tiles * splits, at_once) * (ceil_div(token_tiles, splits) + 2);
    };
    int best = 1;
    for (int splits = 2; splits <= std::min(token_tiles, at_once); ++splits) {
        if (cost(splits) < cost(best)) best = splits;
    }
    return best;
}

template <class E, int BF>
void launch_grad_x(const RoutedLoraBwd& f, const Buffers& w, int chunks, int weight_bytes) {
    GradXArgs p = {};
    const int64_t router_rows = f.router.data ? f.groups * f.experts : 0, pitch = row_pitch(f);
    const char* const rows = static_cast<const char*>(w.rows);
    const int cluster = getenv("GX_CLUSTER") ? atoi(getenv("GX_CLUSTER")) : f.d_in > BF ? 2 : 1;
    const Dimension one = {1, pitch, 1}, tokens = {f.tokens, pitch, kTokens / cluster};
    p.dh = tensor_map(rows, f.compute_dtype, {{f.rank, 1, 64}, tokens, one});
    p.a = tensor_map(f.lora_a.data, f.compute_dtype, {{f.d_in, 1, 64}, {f.rank, f.d_in, padded_rank(f)}});
    if (router_rows) {
        p.dlogits = tensor_map(rows + 2 * padded_rank(f), f.compute_dtype, {{router_rows, 1, 64}, tokens, one});
        p.router = tensor_map(f.router.data, f.compute_dtype, {{f.d_in, 1, 64}, {router_rows, f.d_in, 64}});
    }
    p.dx = tensor_map(f.dx.data, f.compute_dtype, {{f.d_in, 1, 64}, {f.tokens, f.d_in, kTokens}, {1, f.d_in, 1}});
    p.features = int(f.d_in);
    p.token_tiles = int(ceil_div(f.tokens, kTokens));
    p.chunks = chunks;
    p.h_steps = padded_rank(f) / 16;
    p.weight_bytes = weight_bytes;
    const auto bytes = [&] { return shared_bytes(BF, chunks, weight_bytes, p.stages, p.out_tiles); };
    const int most = getenv("GX_STAGES") ? atoi(getenv("GX_STAGES")) : kMaxStages;
    const int most_out = getenv("GX_OUT") ? atoi(getenv("GX_OUT")) : 4;
    p.out_tiles = 1;
    for (p.stages = most; bytes() > kMaxSharedBytes;) --p.stages;
    for (p.out_tiles = most_out; bytes() > kMaxSharedBytes;) p.out_tiles /= 2;
    const int feature_tiles = int(ceil_div(f.d_in, cluster * BF));
    p.splits = choose_splits(p.token_tiles, feature_tiles, multiprocessors() / cluster);
    launch<grad_x_kernel<E, BF>>("routed_lora grad_x", dim3(unsigned(feature_tiles * p.splits * cluster)), kThreads,
                                 bytes(), f.stream, true, p, cluster);
}

template <class E>
void choose_features(const RoutedLoraBwd& f, const Buffers& w) {
    const int router_chunks = f.router.data ? int(ceil_div(f.groups * f.experts, 64)) : 0;
    const int weight_bytes = padded_rank(f) * 128 + router_chunks * kBoxBytes;
    if (shared_bytes(128, 1 + router_chunks, weight_bytes, kMinStages, 1) <= kMaxSharedBytes)
        launch_grad_x<E, 128>(f, w, 1 + router_chunks, weight_bytes);
    else
        launch_grad_x<E, 64>(f, w, 1 + router_chunks, weight_bytes);
}

}  // namespace

void grad_x(const RoutedLoraBwd& f, const Buffers& w) {
    if (f.compute_dtype == DType::bf16)
        choose_features<bf16>(f, w);
    else
        choose_features<f16>(f, w);
}

}  // namespace mtlora::cuda
