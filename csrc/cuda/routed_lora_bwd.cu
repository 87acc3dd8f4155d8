// The backward: which kernels run, their workspaces, and `route`, the small one between the products.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/elements.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/routed_lora_bwd.h"
#include "cuda/sum_rows.h"

namespace mtlora::cuda {
namespace {

constexpr int kThreads = 256;

struct RouteArgs {
    const void *h, *pi, *scale;
    const float *dh, *dload;
    float *dw, *dpi;
    void* rows;
    int64_t pitch;
    int64_t tokens;
    int groups, experts, log_lanes;  // lanes: runs of experts, padded to a power of two
    int rank, padded_rank, blocks;
    int weight_blocks;  // of the grid: the first ones
    float scaling, inverse_count;
    bool relu, has_router, weighted;
};

// d(pi) and d(logits) = pi (d(pi) - sum over N of pi d(pi)) of `run` experts of (token, group), all of them experts or
// none; the lanes of a row share the sum.
template <class E, int run>
__device__ void route_weights(const RouteArgs& p, int64_t row, int expert) {
    struct alignas(run * sizeof(float)) Floats {
        float v[run];
    };
    struct alignas(run * sizeof(E)) Elements {
        E v[run];
    };
    const bool live = row < p.tokens * p.groups && expert < p.experts;
    const int64_t at = row * p.experts + expert;
    float pi[run] = {}, sum[run] = {};
    Floats dpi = {};
    if (live) {
        const Elements e = *reinterpret_cast<const Elements*>(static_cast<const E*>(p.pi) + at);
        Floats dw = *reinterpret_cast<const Floats*>(p.dw + at);
#pragma unroll
        for (int i = 0; i < run; ++i) {
            pi[i] = to_float(e.v[i]);
            const float scale = p.scale ? to_float(static_cast<const E*>(p.scale)[expert + i]) * p.scaling : p.scaling;
            dpi.v[i] = dw.v[i] * scale;
            if (p.dload) dpi.v[i] = dpi.v[i] + p.dload[expert + i] * p.inverse_count;
            dw.v[i] = pi[i] * dw.v[i];
            sum[i] = pi[i] * dpi.v[i];
        }
        if (p.dpi) *reinterpret_cast<Floats*>(p.dpi + at) = dpi;
        if (p.weighted) *reinterpret_cast<Floats*>(p.dw + at) = dw;
    }
    if (!p.has_router) return;
    for (int n = (1 << p.log_lanes) / 2; n > 0; n /= 2) {
#pragma unroll
        for (int i = 0; i < run; ++i) sum[i] = sum[i] + __shfl_xor_sync(~0u, sum[i], n);
    }
#pragma unroll
    for (int n = run / 2; n > 0; n /= 2) {
#pragma unroll
        for (int i = 0; i < n; ++i) sum[i] = sum[i] + sum[i + n];
    }
    if (live) {
        const int64_t token = row / p.groups, group = row - token * p.groups;
        Elements dlogits;
#pragma unroll
        for (int i = 0; i < run; ++i) dlogits.v[i] = rounded<E>(pi[i] * (dpi.v[i] - sum[0]));
        E* const to = static_cast<E*>(p.rows) + token * p.pitch + p.padded_rank + group * p.experts + expert;
        *reinterpret_cast<Elements*>(to) = dlogits;
    }
}

// d(h) of one token and rank: blocks of experts in order, scaled; zero in the padding.
template <class E>
__device__ void route_h(const RouteArgs& p, int64_t token, int rank) {
    float dh = 0;
    if (rank < p.rank) {
        for (int block = 0; block < p.blocks; ++block) {
            dh = dh + p.dh[(block * p.tokens + token) * p.rank + rank];
        }
        dh = dh * p.scaling;
        if (p.relu && to_float(static_cast<const E*>(p.h)[token * p.rank + rank]) <= 0) dh = 0;
    }
    static_cast<E*>(p.rows)[token * p.pitch + rank] = rounded<E>(dh);
}

template <class E, int run>
__global__ void __launch_bounds__(kThreads) route_kernel(const RouteArgs p) {
    grid_dependency_wait();
    launch_dependents();
    if (int(blockIdx.x) < p.weight_blocks) {
        const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
        route_weights<E, run>(p, thread >> p.log_lanes, int(thread & ((1 << p.log_lanes) - 1)) * run);
    } else {
        const int64_t thread = int64_t(int(blockIdx.x) - p.weight_blocks) * kThreads + threadIdx.x;
        const int64_t token = thread / p.padded_rank;
        if (token < p.tokens) route_h<E>(p, token, int(thread - token * p.padded_rank));
    }
}

// Hands out pieces of an allocation, or only counts them.
struct Carver {
    char* base;
    int64_t used = 0;

    void* take(int64_t bytes) {
        char* const piece = base + used;
        used += ceil_div(bytes, 256) * 256;
        return piece;
    }
};

Buffers carve(const RoutedLoraBwd& f, Carver& workspace) {
    const bool needs_rows = f.dx.data || f.dlora_a.data || f.drouter.data;
    const bool needs_dw = f.dpi.data || f.dexpert_scale.data || (needs_rows && f.router.data);
    const bool routes = contract_routes(f);
    const int64_t pairs = f.tokens * f.groups;
    const int64_t depth = contract_depth(f), b_steps = ceil_div(f.d_out / f.groups, depth);
    // `grad_x` runs last and reads the rows alone: all else lies in the memory of d(x) where there is room.
    Carver lent{static_cast<char*>(f.dx.data)};
    const int64_t room = f.dx.data ? f.tokens * f.d_in * 2 : 0;
    const auto take = [&](bool wanted, int64_t bytes) -> void* {
        if (!wanted) return nullptr;
        return (lent.used + bytes <= room ? lent : workspace).take(bytes);
    };
    Buffers w;
    w.rows = needs_rows ? workspace.take(f.tokens * row_pitch(f) * 2) : nullptr;
    w.chunk_sums = static_cast<float*>(take(chunk_sums(f) > 0, chunk_sums(f) * 4));
    w.dw = static_cast<float*>(take(needs_dw && !routes, pairs * f.experts * 4));
    w.dh = static_cast<float*>(take(needs_rows && !routes, column_blocks(f) * f.tokens * f.rank * 4));
    w.b_tiles = take(needs_dw || needs_rows, f.groups * b_steps * weight_blocks(f) * depth * 256);
    w.pi_tiles = take(f.dlora_b.data || needs_rows, f.groups * ceil_div(f.tokens, 64) * tile_experts(f) * 128);
    w.sums = static_cast<float*>(take(f.dexpert_scale.data, sum_rows_workspace(pairs, f.experts) * 4));
    return w;
}

// Experts of a lane.
int route_run(const RoutedLoraBwd& f) {
    const bool aligned = (reinterpret_cast<uintptr_t>(f.pi.data) | reinterpret_cast<uintptr_t>(f.dpi.data)) % 16 == 0;
    return f.experts % 4 == 0 && aligned ? 4 : 1;  // four: 27 to 13 us at T = 8192, N = 16, G = 32
}
int log_lanes(const RoutedLoraBwd& f) {
    int log = 0;
    while ((route_run(f) << log) < f.experts) ++log;
    return log;
}

template <class E, int run>
void launch_route(const RoutedLoraBwd& f, const Buffers& w) {
    RouteArgs p = {};
    p.h = f.h.data;
    p.pi = f.pi.data;
    p.scale = f.expert_scale.data;
    p.dh = w.dh;
    p.dload = static_cast<const float*>(f.dload.data);
    p.dw = w.dw;
    p.dpi = static_cast<float*>(f.dpi.data);
    p.rows = w.rows;
    p.tokens = f.tokens;
    p.pitch = row_pitch(f);
    p.groups = int(f.groups);
    p.experts = int(f.experts);
    p.log_lanes = log_lanes(f);
    p.rank = int(f.rank);
    p.padded_rank = padded_rank(f);
    p.blocks = column_blocks(f);
    p.scaling = f.scaling;
    p.inverse_count = f.inverse_count;
    p.relu = f.relu;
    p.has_router = f.router.data && w.rows;
    p.weighted = f.dexpert_scale.data;
    if (w.dw) p.weight_blocks = int(ceil_div((f.tokens * f.groups) << p.log_lanes, kThreads));
    const int64_t h_blocks = w.dh ? ceil_div(f.tokens * p.padded_rank, kThreads) : 0;
    const dim3 grid(unsigned(p.weight_blocks + h_blocks));
    launch<route_kernel<E, run>>("routed_lora route", grid, kThreads, 0, f.stream, true, p);
}

template <class E>
void choose_run(const RoutedLoraBwd& f, const Buffers& w) {
    if (route_run(f) == 4)
        launch_route<E, 4>(f, w);
    else
        launch_route<E, 1>(f, w);
}

}  // namespace

void route(const RoutedLoraBwd& f, const Buffers& w) {
    if (f.compute_dtype == DType::bf16)
        choose_run<bf16>(f, w);
    else
        choose_run<f16>(f, w);
}

int64_t routed_lora_bwd_workspace(const RoutedLoraBwd& f) {
    Carver carver{nullptr};
    carve(f, carver);
    return carver.used;
}

void routed_lora_bwd(const RoutedLoraBwd& f) {
    Carver carver{static_cast<char*>(f.workspace)};
    const Buffers w = carve(f, carver);
    pack(f, w);
    if (w.b_tiles) contract(f, w);
    if (w.dw || w.dh) route(f, w);
    if (f.dlora_b.data) grad_b(f, w);
    if (f.dlora_a.data || f.drouter.data) grad_rows(f, w);
    if (f.dexpert_scale.data) {
        sum_rows(w.dw, DType::f32, f.tokens * f.groups, int(f.experts), f.scaling,
                 static_cast<float*>(f.dexpert_scale.data), w.sums, f.stream);
    }
    if (f.dx.data) grad_x(f, w);  // last: it overwrites other workspaces, and pushes what others read out of L2
}

}  // namespace mtlora::cuda
