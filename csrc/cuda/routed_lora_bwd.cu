// The backward: which kernels run, and `route`, the small one between the products.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/elements.cuh"
#include "cuda/hopper.cuh"
#include "cuda/launch.h"
#include "cuda/routed_lora.h"
#include "cuda/sum_rows.h"

namespace mtlora::cuda {
namespace {

constexpr int kThreads = 256;

struct RouteArgs {
    const void *h, *pi, *scale;
    const float *dh, *dload;
    float* dw;  // pi d(w) afterwards, where d(expert_scale) is asked for
    float* dpi;
    void* rows;
    int64_t tokens, pitch;
    int groups, experts, lanes;  // lanes: experts padded to a power of two
    int rank, padded_rank, blocks;
    float scaling, inverse_count;
    bool relu, has_router, weighted;
};

// d(pi) and d(logits) = pi (d(pi) - sum over N of pi d(pi)) of one expert of (token, group); `lanes` threads of a warp
// share the sum.
template <class E>
__device__ void route_weights(const RouteArgs& p, int64_t row, int expert) {
    const bool live = row < p.tokens * p.groups && expert < p.experts;
    const int64_t at = row * p.experts + expert;
    float pi = 0, dpi = 0;
    if (live) {
        const float dw = p.dw[at];
        pi = to_float(static_cast<const E*>(p.pi)[at]);
        dpi = dw * (p.scale ? to_float(static_cast<const E*>(p.scale)[expert]) * p.scaling : p.scaling);
        if (p.dload) dpi = dpi + p.dload[expert] * p.inverse_count;
        if (p.dpi) p.dpi[at] = dpi;
        if (p.weighted) p.dw[at] = pi * dw;
    }
    float sum = live ? pi * dpi : 0.0f;
    for (int n = p.lanes / 2; n > 0; n /= 2) sum = sum + __shfl_xor_sync(~0u, sum, n);
    if (live && p.has_router) {
        const int64_t token = row / p.groups, group = row % p.groups;
        static_cast<E*>(p.rows)[token * p.pitch + p.padded_rank + group * p.experts + expert] =
            rounded<E>(pi * (dpi - sum));
    }
}

// d(h) of one token and rank: blocks of experts in order, scaled; zero in the padding.
template <class E>
__device__ void route_h(const RouteArgs& p, int64_t token, int rank) {
    float dh = 0;
    if (rank < p.rank) {
        for (int block = 0; block < p.blocks; ++block) dh = dh + p.dh[(block * p.tokens + token) * p.rank + rank];
        dh = dh * p.scaling;
        if (p.relu && to_float(static_cast<const E*>(p.h)[token * p.rank + rank]) <= 0) dh = 0;
    }
    static_cast<E*>(p.rows)[token * p.pitch + rank] = rounded<E>(dh);
}

template <class E>
__global__ void __launch_bounds__(kThreads) route_kernel(const RouteArgs p) {
    grid_dependency_wait();
    launch_dependents();
    const int64_t threads = int64_t(gridDim.x) * kThreads, thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (p.dw) {
        const int64_t count = (p.tokens * p.groups * p.lanes + 31) / 32 * 32;  // whole warps
        for (int64_t i = thread; i < count; i += threads) route_weights<E>(p, i / p.lanes, int(i % p.lanes));
    }
    if (p.dh) {
        const int64_t count = p.tokens * p.padded_rank;
        for (int64_t i = thread; i < count; i += threads) route_h<E>(p, i / p.padded_rank, int(i % p.padded_rank));
    }
}

}  // namespace

void route(const RoutedLoraBwd& f) {
    RouteArgs p = {};
    p.h = f.h.data;
    p.pi = f.pi.data;
    p.scale = f.expert_scale.data;
    p.dh = f.dh;
    p.dload = static_cast<const float*>(f.dload.data);
    p.dw = f.dlogits;
    p.dpi = static_cast<float*>(f.dpi.data);
    p.rows = f.rows;
    p.tokens = f.tokens;
    p.pitch = row_pitch(f);
    p.groups = int(f.groups);
    p.experts = int(f.experts);
    for (p.lanes = 1; p.lanes < p.experts;) p.lanes *= 2;
    p.rank = int(f.rank);
    p.padded_rank = padded_rank(f);
    p.blocks = int(ceil_div(f.experts * f.rank, 128));
    p.scaling = f.scaling;
    p.inverse_count = f.inverse_count;
    p.relu = f.relu;
    p.has_router = f.router.data != nullptr && f.rows != nullptr;
    p.weighted = f.dexpert_scale.data != nullptr;
    const int64_t count = f.tokens * std::max<int64_t>(p.padded_rank, f.groups * p.lanes);
    const dim3 grid(unsigned(std::min<int64_t>(ceil_div(count, kThreads), 8 * multiprocessors())));
    if (f.compute_dtype == DType::bf16) launch<route_kernel<bf16>>("routed_lora route", grid, kThreads, 0, f.stream, true, p);
    else launch<route_kernel<f16>>("routed_lora route", grid, kThreads, 0, f.stream, true, p);
}

void routed_lora_bwd(const RoutedLoraBwd& f) {
    if (f.dlora_b.data) grad_b(f);
    if (f.dlogits || f.dh) {
        contract(f);
        route(f);
    }
    if (f.dx.data) grad_x(f);
    if (f.dlora_a.data || f.drouter.data) grad_rows(f);
    if (f.dexpert_scale.data) {
        sum_rows(f.dlogits, DType::f32, f.tokens * f.groups, int(f.experts), f.scaling,
                 static_cast<float*>(f.dexpert_scale.data), f.workspace, f.stream);
    }
}

}  // namespace mtlora::cuda
