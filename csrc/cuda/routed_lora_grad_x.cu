// grad_x: d(x) = d(h) A + d(logits) R, two products added at the end.
//
// All rows of A and R for a block's features stay in shared memory, tiles of [d(h) | d(logits)] stream in, d(x)
// streams out. Two warpgroups take every other token tile, each with a loading thread and a ring of its own, so that
// one multiplies while the other stores.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/cluster.cuh"
#include "cuda/elements.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/routed_lora_bwd.h"

namespace mtlora::cuda {
namespace {

constexpr int kTokens = 64;
constexpr int kBoxBytes = 64 * 128;            // 64 tokens by 64 columns, 64 rows of R or tokens by 64 features
constexpr int kStepBytes = 16 * 128;           // 16 rows of A or R by 64 features
constexpr int kMinStages = 3, kMaxStages = 6;  // of each warpgroup
constexpr int kThreads = 320;                  // two multiplying warpgroups and a loading warp for each

struct GradXArgs {
    CUtensorMap rows, a, router, dx;
    int features, token_tiles;
    int splits;             // of the token tiles, among the clusters with the same features
    int h_steps, steps;     // of 16 columns: those of d(h), all
    int router_boxes;       // of 64 rows of R
    int weight_bytes;       // of 64 features: A's rows, then R's
    int stages, out_tiles;  // of each warpgroup: of the ring; 64 x 64 between registers and store, 1, 2 or 4
};

// BF = features of a block.
constexpr int shared_bytes(int features, int router_boxes, int weight_bytes, int stages, int out_tiles) {
    return 1024 + features / 64 * weight_bytes + 2 * (stages + out_tiles) * kBoxBytes +
           (4 * stages + 1 + router_boxes) * 8;
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

// A barrier for A and for each box of R: the first products need not wait for the last rows.
template <int BF>
__device__ void load_weights(const GradXArgs& p, int feature, char* weights, uint64_t* weights_full) {
    for (int box = 0; box <= p.router_boxes; ++box) {
        const int bytes = box ? kBoxBytes : p.h_steps * kStepBytes;
        const int at = box ? p.h_steps * kStepBytes + (box - 1) * kBoxBytes : 0;
        barrier_expect(weights_full + box, uint32_t(BF / 64 * bytes));
        for (int i = 0; i < BF / 64; ++i) {
            tma_load(weights + i * p.weight_bytes + at, box ? &p.router : &p.a, weights_full + box, feature + i * 64,
                     box ? (box - 1) * 64 : 0);
        }
    }
}

// The rows of one warpgroup, 64 columns at a time, one thread; the blocks of a cluster load a part each for all.
__device__ inline void load_rows(const GradXArgs& p, const Share& s, char* ring_bytes, uint64_t* full,
                                 uint64_t* empty) {
    const int cluster = int(cluster_size()), tokens = kTokens / cluster, mine = int(cluster_rank()) * tokens;
    const uint16_t all = uint16_t((1 << cluster) - 1);
    Ring ring;
    for (int t = s.first; t < s.last; t += 2) {
        for (int step = 0; step < p.steps; step += 4) {
            uint64_t* const barrier = full + ring.stage;
            char* const to = ring_bytes + ring.stage * kBoxBytes + mine * 128;
            barrier_wait(empty + ring.stage, ring.parity ^ 1);
            barrier_expect(barrier, kBoxBytes);
            if (cluster == 1)
                tma_load(to, &p.rows, barrier, step * 16, t * kTokens, 0);
            else
                tma_load_multicast(to, &p.rows, barrier, all, step * 16, t * kTokens + mine, 0);
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
    const uint64_t rows, weights;  // the operands of stage 0 and of step 0
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

    // acc += the steps from `from` to `to` of a stage, whose first is step 4 `chunk`.
    __device__ __forceinline__ void add(float (&acc)[BF / 2], int chunk, int from, int to, bool accumulate) {
        const uint64_t a = advanced(rows, ring.stage * kBoxBytes), b = advanced(weights, 4 * chunk * kStepBytes);
#pragma unroll
        for (int k = from; k < to; ++k) {
            wgmma<E, 0, 1>(acc, advanced(a, 32 * k), advanced(b, kStepBytes * k), accumulate || k > from);
        }
    }

    __device__ void begin(int chunk) {
        if (first_tile) {
            if (chunk == 0) barrier_wait(weights_full, 0);
            if (chunk < p.router_boxes) barrier_wait(weights_full + 1 + chunk, 0);
        }
        barrier_wait(full + ring.stage, ring.parity);
        wgmma_fence();
    }

    // Leaves the products running.
    __device__ void end() {
        wgmma_commit();
        last = ring.stage;
        ring.advance(p.stages);
    }

    __device__ void release(int stage) {
        if (lane < int(cluster)) cluster_arrive(empty + 8 * stage);
    }

    // The next stage, while the one before finishes.
    __device__ __forceinline__ void next(float (&from_logits)[BF / 2], int chunk, int steps) {
        const int before = last;
        begin(chunk);
        add(from_logits, chunk, 0, steps, chunk > 1 || p.h_steps < 4);
        end();
        wgmma_wait<1>();
        release(before);
    }

    __device__ void tile(float (&from_h)[BF / 2], float (&from_logits)[BF / 2]) {
        begin(0);
        add(from_h, 0, 0, p.h_steps, false);
        add(from_logits, 0, p.h_steps, min(4, p.steps), false);
        end();
        int chunk = 1;
        for (; 4 * chunk + 4 <= p.steps; ++chunk) next(from_logits, chunk, 4);
        if (4 * chunk < p.steps) next(from_logits, chunk, p.steps - 4 * chunk);
        wgmma_wait<0>();
        pin(from_h);
        pin(from_logits);
        release(last);
        first_tile = false;
        if (p.steps == p.h_steps) {
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
            for (int i = 16 * box; i < 16 * box + 16; ++i) {  // rows `row` and `row` + 8 in turn, every two 8 columns
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
        init_stages(barriers, barriers + 2 * p.stages, 2 * p.stages, 4 * cluster_size());
        for (int box = 0; box <= p.router_boxes; ++box) barrier_init(weights_full + box, 1);
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
void launch_grad_x(const RoutedLoraBwd& f, const Buffers& w, int router_boxes, int weight_bytes) {
    GradXArgs p = {};
    const int64_t router_rows = f.router.data ? f.groups * f.experts : 0, width = padded_rank(f) + router_rows;
    // Half as many features for the same rows: two blocks share them, 11 us less at d = 768, N = 25, G = 32. With 128
    // features their waiting for each other costs 2 us at d = 4096, G = 32.
    const int cluster = BF == 64 && f.d_in > BF ? 2 : 1;
    p.rows = tensor_map(w.rows, f.compute_dtype,
                        {{width, 1, 64}, {f.tokens, row_pitch(f), kTokens / cluster}, {1, row_pitch(f), 1}});
    p.a = tensor_map(f.lora_a.data, f.compute_dtype, {{f.d_in, 1, 64}, {f.rank, f.d_in, padded_rank(f)}});
    if (router_rows) {
        p.router = tensor_map(f.router.data, f.compute_dtype, {{f.d_in, 1, 64}, {router_rows, f.d_in, 64}});
    }
    p.dx = tensor_map(f.dx.data, f.compute_dtype, {{f.d_in, 1, 64}, {f.tokens, f.d_in, kTokens}, {1, f.d_in, 1}});
    p.features = int(f.d_in);
    p.token_tiles = int(ceil_div(f.tokens, kTokens));
    p.h_steps = padded_rank(f) / 16;
    p.steps = int(ceil_div(width, 16));
    p.router_boxes = router_boxes;
    p.weight_bytes = weight_bytes;
    const auto bytes = [&] { return shared_bytes(BF, router_boxes, weight_bytes, p.stages, p.out_tiles); };
    p.out_tiles = 1;  // stages first: three to four gave 7 us at G = 32, more tiles nothing at G = 2
    for (p.stages = kMaxStages; p.stages > kMinStages && bytes() > kMaxSharedBytes;) --p.stages;
    for (p.out_tiles = 4; p.out_tiles > 1 && bytes() > kMaxSharedBytes;) p.out_tiles /= 2;
    const int feature_tiles = int(ceil_div(f.d_in, cluster * BF));
    p.splits = choose_splits(p.token_tiles, feature_tiles, multiprocessors() / cluster);
    launch<grad_x_kernel<E, BF>>("routed_lora grad_x", dim3(unsigned(feature_tiles * p.splits * cluster)), kThreads,
                                 bytes(), f.stream, true, p, cluster);
}

template <class E>
void choose_features(const RoutedLoraBwd& f, const Buffers& w) {
    const int router_boxes = f.router.data ? int(ceil_div(f.groups * f.experts, 64)) : 0;
    const int weight_bytes = padded_rank(f) / 16 * kStepBytes + router_boxes * kBoxBytes;
    if (shared_bytes(128, router_boxes, weight_bytes, kMinStages, 1) <= kMaxSharedBytes)
        launch_grad_x<E, 128>(f, w, router_boxes, weight_bytes);
    else
        launch_grad_x<E, 64>(f, w, router_boxes, weight_bytes);
}

}  // namespace

void grad_x(const RoutedLoraBwd& f, const Buffers& w) {
    if (f.compute_dtype == DType::bf16)
        choose_features<bf16>(f, w);
    else
        choose_features<f16>(f, w);
}

}  // namespace mtlora::cuda
