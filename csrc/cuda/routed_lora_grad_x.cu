// grad_x: d(x) = d(h) A + d(logits) R, two products added at the end.
//
// Blocks are persistent and walk (feature tile, token tile) in that order: all rows of A and R for the block's
// features stay in shared memory, tiles of [d(h) | d(logits)] stream in, d(x) streams out. Two warpgroups take turns
// at the token tiles, so that one multiplies while the other stores.
#include <cuda_runtime.h>

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
constexpr int kThreads = 288;        // two multiplying warpgroups and a loading warp

struct GradXArgs {
    CUtensorMap dh, dlogits, a, router, dx;
    int features, token_tiles, tiles;
    int chunks;  // of 64 columns: one of d(h), the others of d(logits), zeros at the end of each
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

template <int BF>
__device__ void load(const GradXArgs& p, char* weights, char* ring_bytes, uint64_t* full, uint64_t* empty,
                     uint64_t* weights_full, uint64_t* weights_empty, int tile, int end) {
    uint32_t parity = 0;
    int turn = 0;
    Ring ring, other;  // of the warpgroup whose turn it is, and of the one after
    Segment s;
    while (next_segment(p, tile, end, s)) {
        barrier_wait(weights_empty, parity ^ 1);
        barrier_expect(weights_full, uint32_t(p.chunks * (BF / 64) * kBoxBytes));
        for (int box = 0; box < BF / 64; ++box) {
            for (int chunk = 0; chunk < p.chunks; ++chunk) {
                tma_load(weights + (box * p.chunks + chunk) * kBoxBytes, chunk ? &p.router : &p.a, weights_full,
                         s.feature_tile * BF + box * 64, chunk ? (chunk - 1) * 64 : 0);
            }
        }
        parity ^= 1;
        for (int t = s.first; t < s.last; ++t, turn ^= 1) {
            for (int chunk = 0; chunk < p.chunks; ++chunk) {
                const int stage = turn * kStages + ring.stage;
                barrier_wait(empty + stage, ring.parity ^ 1);
                barrier_expect(full + stage, kBoxBytes);
                tma_load(ring_bytes + stage * kBoxBytes, chunk ? &p.dlogits : &p.dh, full + stage,
                         chunk ? (chunk - 1) * 64 : 0, t * kTokens);
                ring.advance(kStages);
            }
            const Ring next = other;
            other = ring;
            ring = next;
        }
    }
}

// acc += one chunk of columns, or starts with it.
template <class E, int BF>
__device__ void add_chunk(float (&acc)[BF / 2], const char* ring_bytes, uint64_t weights, uint64_t* full,
                          uint64_t* empty, Ring& ring, bool accumulate) {
    const uint64_t a = smem_descriptor(ring_bytes + ring.stage * kBoxBytes, 16, 1024, Swizzle::b128);
    barrier_wait(full + ring.stage, ring.parity);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<E, 0, 1>(acc, a + 2 * k, weights + 128 * k, accumulate || k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin(acc);
    if (threadIdx.x % 32 == 0) barrier_arrive(empty + ring.stage);
    ring.advance(kStages);
}

template <class E, int BF>
__device__ void multiply(const GradXArgs& p, const char* weights, const char* ring_bytes, char* out, uint64_t* full,
                         uint64_t* empty, uint64_t* weights_full, uint64_t* weights_empty, int tile, int end) {
    const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, q = lane % 4;
    const uint64_t b = smem_descriptor(weights, uint32_t(p.chunks * kBoxBytes), 1024, Swizzle::b128);
    uint32_t parity = 0;
    bool mine = warpgroup == 0;
    Ring ring;
    Segment s;
    while (next_segment(p, tile, end, s)) {
        barrier_wait(weights_full, parity);
        parity ^= 1;
        for (int t = s.first; t < s.last; ++t, mine = !mine) {
            if (!mine) continue;
            float from_h[BF / 2], from_logits[BF / 2] = {};
            add_chunk<E, BF>(from_h, ring_bytes, b, full, empty, ring, false);
            for (int chunk = 1; chunk < p.chunks; ++chunk) {
                add_chunk<E, BF>(from_logits, ring_bytes, b + chunk * (kBoxBytes >> 4), full, empty, ring, true);
            }

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
                    const int feature = s.feature_tile * BF + box * 64;
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
            barrier_init(empty + s, 4);
        }
        barrier_init(weights_full, 1);
        barrier_init(weights_empty, 8);
        barrier_init_fence();
    }
    __syncthreads();
    grid_dependency_wait();
    launch_dependents();

    const int first = int(int64_t(p.tiles) * blockIdx.x / gridDim.x);
    const int end = int(int64_t(p.tiles) * (blockIdx.x + 1) / gridDim.x);
    const int warpgroup = threadIdx.x / 128;
    if (warpgroup == 2) {
        if (threadIdx.x == 256) {
            load<BF>(p, weights, ring_bytes, full, empty, weights_full, weights_empty, first, end);
        }
    } else {
        multiply<E, BF>(p, weights, ring_bytes + warpgroup * kStages * kBoxBytes,
                        out + warpgroup * (BF / 64) * kBoxBytes, full + warpgroup * kStages,
                        empty + warpgroup * kStages, weights_full, weights_empty, first, end);
    }
}

template <class E, int BF>
void launch_grad_x(const RoutedLoraBwd& f, const Buffers& w, int chunks) {
    GradXArgs p = {};
    const int64_t router_rows = f.router.data ? f.groups * f.experts : 0, pitch = row_pitch(f);
    const char* const rows = static_cast<const char*>(w.rows);
    p.dh = tensor_map(rows, f.compute_dtype, {{f.rank, 1, 64}, {f.tokens, pitch, kTokens}});
    p.a = tensor_map(f.lora_a.data, f.compute_dtype, {{f.d_in, 1, 64}, {f.rank, f.d_in, 64}});
    if (router_rows) {
        p.dlogits =
            tensor_map(rows + 2 * padded_rank(f), f.compute_dtype, {{router_rows, 1, 64}, {f.tokens, pitch, kTokens}});
        p.router = tensor_map(f.router.data, f.compute_dtype, {{f.d_in, 1, 64}, {router_rows, f.d_in, 64}});
    }
    p.dx = tensor_map(f.dx.data, f.compute_dtype, {{f.d_in, 1, 64}, {f.tokens, f.d_in, kTokens}, {1, f.d_in, 1}});
    p.chunks = chunks;
    p.features = int(f.d_in);
    p.token_tiles = int(ceil_div(f.tokens, kTokens));
    p.tiles = p.token_tiles * int(ceil_div(f.d_in, BF));
    const dim3 grid(unsigned(p.tiles < multiprocessors() ? p.tiles : multiprocessors()));
    launch<grad_x_kernel<E, BF>>("routed_lora grad_x", grid, kThreads, shared_bytes(BF, chunks), f.stream, true, p);
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
