// grad_x: d(x) = d(h) A + d(logits) R, two products added at the end.
//
// Blocks are persistent and walk (feature tile, token tile) in that order: all rows of A and R for the block's
// features stay in shared memory, tiles of [d(h) | d(logits)] stream in, d(x) streams out. Two warpgroups take turns
// at the token tiles, so that one multiplies while the other stores.
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
constexpr int kBoxBytes = 64 * 128;  // 64 tokens by 64 columns, 64 columns or tokens by 64 features
constexpr int kStages = 3;           // of each warpgroup
constexpr int kThreads = 320;        // two multiplying warpgroups and a loading warp for each

struct GradXArgs {
    CUtensorMap dh, dlogits, a, router, dx;
    int features, token_tiles, tiles;  // tiles: of a cluster, 64 tokens by the features of all its blocks
    int chunks;  // of 64 columns: one of d(h), the others of d(logits), zeros at the end of each
    int h_steps; // of 16 columns: what of d(h) is not zeros
};

// BF = features of a tile.
constexpr int shared_bytes(int features, int chunks) {
    return 1024 + ((chunks + 2) * (features / 64) + 2 * kStages) * kBoxBytes + (4 * kStages + 2) * 8;
}

// The block's tiles of one feature tile, first to last.
struct Segment {
    int feature_tile, first, last;
};
__device__ inline bool next_segment(const GradXArgs& p, int& tile, int end, Segment& s) {
    if (tile >= end) return false;
    s.feature_tile = tile / p.token_tiles;
    s.first = tile % p.token_tiles;
    s.last = min(p.token_tiles, s.first + end - tile);
    tile += s.last - s.first;
    return true;
}

// One thread for each multiplying warpgroup, the first of which also loads the weights.
template <int BF>
__device__ void load(const GradXArgs& p, int warpgroup, char* weights, char* ring_bytes, uint64_t* full,
                     uint64_t* empty, uint64_t* weights_full, uint64_t* weights_empty, int tile, int end) {
    const int cluster = int(cluster_size()), rank = int(cluster_rank()), share = kTokens / cluster;
    const uint16_t all = uint16_t((1 << cluster) - 1);
    uint32_t parity = 0;
    bool mine = warpgroup == 0;
    Ring ring;
    Segment s;
    while (next_segment(p, tile, end, s)) {
        if (warpgroup == 0) {
            barrier_wait(weights_empty, parity ^ 1);
            barrier_expect(weights_full, uint32_t(p.chunks * (BF / 64) * kBoxBytes));
            for (int box = 0; box < BF / 64; ++box) {
                for (int chunk = 0; chunk < p.chunks; ++chunk) {
                    tma_load(weights + (box * p.chunks + chunk) * kBoxBytes, chunk ? &p.router : &p.a, weights_full,
                             (s.feature_tile * cluster + rank) * BF + box * 64, chunk ? (chunk - 1) * 64 : 0);
                }
            }
            parity ^= 1;
        }
        for (int t = s.first; t < s.last; ++t, mine = !mine) {
            if (!mine) continue;
            for (int chunk = 0; chunk < p.chunks; ++chunk) {
                uint64_t* const barrier = full + ring.stage;
                char* const to = ring_bytes + ring.stage * kBoxBytes + rank * share * 128;
                barrier_wait(empty + ring.stage, ring.parity ^ 1);
                barrier_expect(barrier, kBoxBytes);
                const CUtensorMap* const map = chunk ? &p.dlogits : &p.dh;
                const int column = chunk ? (chunk - 1) * 64 : 0, token = t * kTokens + rank * share;
                if (cluster == 1)
                    tma_load(to, map, barrier, column, token, 0);
                else
                    tma_load_multicast(to, map, barrier, all, column, token, 0);
                ring.advance(kStages);
            }
        }
    }
}

template <class E, int BF>
struct Multiply {
    const GradXArgs& p;
    uint64_t *const full, *const empty;
    const int lane;
    const uint32_t cluster, empty_address;
    const uint64_t rows, weights;  // the operands of stage 0 and of chunk 0
    Ring ring;
    int last = 0;

    __device__ Multiply(const GradXArgs& p, const char* weight_bytes, const char* ring_bytes, uint64_t* full,
                        uint64_t* empty)
        : p(p),
          full(full),
          empty(empty),
          lane(threadIdx.x % 32),
          cluster(cluster_size()),
          empty_address(cluster_address(empty, lane < int(cluster) ? lane : 0)),
          rows(smem_descriptor(ring_bytes, 16, 1024, Swizzle::b128)),
          weights(smem_descriptor(weight_bytes, uint32_t(p.chunks * kBoxBytes), 1024, Swizzle::b128)) {}

    // acc += `steps` times 16 columns of a chunk, or starts with them; left running.
    __device__ void issue(float (&acc)[BF / 2], int chunk, int steps, bool accumulate) {
        const uint64_t a = advanced(rows, ring.stage * kBoxBytes), b = advanced(weights, chunk * kBoxBytes);
        barrier_wait(full + ring.stage, ring.parity);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (k < steps) wgmma<E, 0, 1>(acc, advanced(a, 32 * k), advanced(b, 2048 * k), accumulate || k > 0);
        }
        wgmma_commit();
        last = ring.stage;
        ring.advance(kStages);
    }

    __device__ void release(int stage) {
        if (lane < int(cluster)) cluster_arrive(empty_address + 8 * stage);
    }

    __device__ void run(float (&from_h)[BF / 2], float (&from_logits)[BF / 2]) {
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
        if (p.chunks == 1) {
#pragma unroll
            for (int i = 0; i < BF / 2; ++i) from_logits[i] = 0.0f;
        }
    }
};

template <class E, int BF>
__device__ void multiply(const GradXArgs& p, const char* weights, const char* ring_bytes, char* out, uint64_t* full,
                         uint64_t* empty, uint64_t* weights_full, uint64_t* weights_empty, int tile, int end) {
    const int warpgroup = uniform(threadIdx.x / 128), warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, q = lane % 4;
    Multiply<E, BF> products(p, weights, ring_bytes, full, empty);
    uint32_t parity = 0;
    bool mine = warpgroup == 0;
    Segment s;
    while (next_segment(p, tile, end, s)) {
        barrier_wait(weights_full, parity);
        parity ^= 1;
        const int first_feature = (s.feature_tile * int(cluster_size()) + int(cluster_rank())) * BF;
        for (int t = s.first; t < s.last; ++t, mine = !mine) {
            if (!mine) continue;
            float from_h[BF / 2], from_logits[BF / 2];
            products.run(from_h, from_logits);

            const bool elected = threadIdx.x % 128 == 0;
            if (elected) tma_store_wait_read<0>();
            named_barrier(1 + warpgroup, 128);
            const int row = warp * 16 + lane / 4;
#pragma unroll
            for (int i = 0; i < BF / 4; ++i) {  // rows `row` and `row` + 8 in turn, eight columns each two
                const uint32_t at = uint32_t((row + i % 2 * 8) * 128 + i / 2 % 8 * 16);
                *reinterpret_cast<Pair<E>*>(out + i / 16 * kBoxBytes + swizzled<128>(at) + 4 * q) =
                    rounded2<E>(from_h[2 * i] + from_logits[2 * i], from_h[2 * i + 1] + from_logits[2 * i + 1]);
            }
            fence_async_proxy();
            named_barrier(1 + warpgroup, 128);
            if (elected) {
                for (int box = 0; box < BF / 64; ++box) {
                    const int feature = first_feature + box * 64;
                    if (feature < p.features) tma_store(&p.dx, out + box * kBoxBytes, feature, t * kTokens, 0);
                }
                tma_store_commit();
            }
        }
        if (lane == 0) barrier_arrive(weights_empty);
    }
    if (threadIdx.x % 128 == 0) tma_store_wait_read<0>();
}

template <class E, int BF>
__global__ void __launch_bounds__(kThreads, 1) grad_x_kernel(const __grid_constant__ GradXArgs p) {
    extern __shared__ char raw[];
    char* const weights = raw + (1024 - smem_address(raw) % 1024) % 1024;
    char* const ring_bytes = weights + p.chunks * (BF / 64) * kBoxBytes;
    char* const out = ring_bytes + 2 * kStages * kBoxBytes;
    uint64_t* const full = reinterpret_cast<uint64_t*>(out + 2 * (BF / 64) * kBoxBytes);
    uint64_t* const empty = full + 2 * kStages;
    uint64_t* const weights_full = empty + 2 * kStages;
    uint64_t* const weights_empty = weights_full + 1;
    if (threadIdx.x == 0) {
        for (int s = 0; s < 2 * kStages; ++s) {
            barrier_init(full + s, 1);
            barrier_init(empty + s, 4 * cluster_size());
        }
        barrier_init(weights_full, 1);
        barrier_init(weights_empty, 8);
        barrier_init_fence();
    }
    cluster_sync();
    grid_dependency_wait();
    launch_dependents();

    const int cluster = int(cluster_size()), clusters = int(gridDim.x) / cluster, index = int(blockIdx.x) / cluster;
    const int first = int(int64_t(p.tiles) * index / clusters);
    const int end = int(int64_t(p.tiles) * (index + 1) / clusters);
    const int warpgroup = uniform(threadIdx.x / 128);
    if (warpgroup == 2) {
        const int user = threadIdx.x / 32 % 4;
        if (threadIdx.x % 32 == 0) {
            load<BF>(p, user, weights, ring_bytes + user * kStages * kBoxBytes, full + user * kStages,
                     empty + user * kStages, weights_full, weights_empty, first, end);
        }
    } else {
        multiply<E, BF>(p, weights, ring_bytes + warpgroup * kStages * kBoxBytes,
                        out + warpgroup * (BF / 64) * kBoxBytes, full + warpgroup * kStages,
                        empty + warpgroup * kStages, weights_full, weights_empty, first, end);
    }
    cluster_sync();  // the other may still signal this block's barriers
}

template <class E, int BF>
void launch_grad_x(const RoutedLoraBwd& f, const Buffers& w, int chunks) {
    GradXArgs p = {};
    const int64_t router_rows = f.router.data ? f.groups * f.experts : 0, pitch = row_pitch(f);
    const char* const rows = static_cast<const char*>(w.rows);
    const int cluster = getenv("GX_CLUSTER") ? atoi(getenv("GX_CLUSTER")) : f.d_in > BF ? 2 : 1;
    const Dimension one = {1, pitch, 1}, tokens = {f.tokens, pitch, kTokens / cluster};
    p.dh = tensor_map(rows, f.compute_dtype, {{f.rank, 1, 64}, tokens, one});
    p.a = tensor_map(f.lora_a.data, f.compute_dtype, {{f.d_in, 1, 64}, {f.rank, f.d_in, 64}});
    if (router_rows) {
        p.dlogits = tensor_map(rows + 2 * padded_rank(f), f.compute_dtype, {{router_rows, 1, 64}, tokens, one});
        p.router = tensor_map(f.router.data, f.compute_dtype, {{f.d_in, 1, 64}, {router_rows, f.d_in, 64}});
    }
    p.dx = tensor_map(f.dx.data, f.compute_dtype, {{f.d_in, 1, 64}, {f.tokens, f.d_in, kTokens}, {1, f.d_in, 1}});
    p.chunks = chunks;
    p.h_steps = padded_rank(f) / 16;
    p.features = int(f.d_in);
    p.token_tiles = int(ceil_div(f.tokens, kTokens));
    p.tiles = p.token_tiles * int(ceil_div(f.d_in, cluster * BF));
    const int clusters = std::min(p.tiles, multiprocessors() / cluster);
    launch<grad_x_kernel<E, BF>>("routed_lora grad_x", dim3(unsigned(clusters * cluster)), kThreads,
                                 shared_bytes(BF, chunks), f.stream, true, p, cluster);
}

template <class E>
void choose_features(const RoutedLoraBwd& f, const Buffers& w) {
    const int chunks = 1 + (f.router.data ? int(ceil_div(f.groups * f.experts, 64)) : 0);
    if (shared_bytes(128, chunks) <= kMaxSharedBytes)
        launch_grad_x<E, 128>(f, w, chunks);
    else
        launch_grad_x<E, 64>(f, w, chunks);
}

}  // namespace

void grad_x(const RoutedLoraBwd& f, const Buffers& w) {
    if (f.compute_dtype == DType::bf16)
        choose_features<bf16>(f, w);
    else
        choose_features<f16>(f, w);
}

}  // namespace mtlora::cuda
