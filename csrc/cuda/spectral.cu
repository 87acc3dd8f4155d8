// The spectral penalty of reference/spectral.py: weights, and what surrounds the products of the pairwise form.
#include <cuda_runtime.h>

#include "cuda/gram.cuh"
#include "cuda/jacobi.cuh"
#include "cuda/launch.h"
#include "cuda/spectral.h"

namespace mtlora::cuda {
namespace {

constexpr double kEpsilon = 1e-8;
constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// ---- Weights, one block a matrix ----

struct WeightsArgs {
    const double* gram;
    float* weights;
    int rank;
    bool pairwise;
};

// exp of a value that is not positive and above -700.
__device__ double exp_nonpositive(double v) {
    constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: adding and subtracting it rounds to an integer
    constexpr double kInverseFactorials[14] = {
        1.0,        1.0,         1 / 2.0,      1 / 6.0,       1 / 24.0,       1 / 120.0,       1 / 720.0,
        1 / 5040.0, 1 / 40320.0, 1 / 362880.0, 1 / 3628800.0, 1 / 39916800.0, 1 / 479001600.0, 1 / 6227020800.0};
    const double n = (v * 1.4426950408889634 + kMagic) - kMagic;
    const double f = (v - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
    double p = kInverseFactorials[13];
#pragma unroll
    for (int degree = 12; degree >= 0; --degree) p = p * f + kInverseFactorials[degree];
    return p * __longlong_as_double((static_cast<long long>(n) + 1023) << 52);
}

__global__ void __launch_bounds__(kThreads) weights_kernel(const WeightsArgs a) {
    const int thread = int(threadIdx.x), threads = int(blockDim.x), r = a.rank;
    const double* gram = a.gram + int64_t(blockIdx.x) * kGramSplits * r * r;
    float* out = a.weights + int64_t(blockIdx.x) * r * (a.pairwise ? r : 1);
    bool finite = true;
    for (int i = thread; i < r; i += threads) finite = finite && isfinite(gram_element(gram, i, i, r));
    if (!__syncthreads_and(finite)) {
        for (int i = thread; i < r * (a.pairwise ? r : 1); i += threads) out[i] = __int_as_float(0x7FC00000);
        return;
    }
    Jacobi jacobi(r, shared_memory() + Jacobi::kStateDoubles + kMaxWidth, shared_memory());
    double* roots = shared_memory() + Jacobi::kStateDoubles;
    jacobi.fill([&](int i, int j) { return gram_element(gram, i, j, r); });
    jacobi.solve();
    const auto sigma = [&](int i) { return sqrt(jacobi.values[i] > 0 ? jacobi.values[i] : 0); };
    const double scale = tree_sum(r, sigma) / double(r) + kEpsilon;
    for (int i = thread; i < r; i += threads) {
        const double w = exp_nonpositive(-(sigma(i) / scale));
        if (a.pairwise)
            roots[i] = sqrt(w);
        else
            out[i] = float(w);
    }
    if (!a.pairwise) return;
    __syncthreads();
    for (Cells at(thread, threads, r); at.row < r; at.next()) {
        double sum = 0;
        for (int k = 0; k < r; ++k) {
            const double* v = jacobi.v + jacobi.order[k];
            sum += (v[at.row * jacobi.pitch] * roots[k]) * v[at.col * jacobi.pitch];
        }
        out[at.row * r + at.col] = float(sum);
    }
}

// ---- Loss: sums of squares by rows, then over rows and over layers (pairwise) or matrices (Gram form) ----

struct CrossArgs {
    float* c;  // [rows, width]: X^T X of every layer; experts' own blocks become 0
    double* sums;
    int64_t rows;
    int width, rank;
};

__global__ void __launch_bounds__(kThreads) cross_kernel(const CrossArgs a) {
    const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    if (row >= a.rows) return;
    float* c = a.c + row * a.width;
    const int first = int(row % a.width) / a.rank * a.rank;
    const double sum = tree_sum(a.width, [&](int i) {
        if (i >= first && i < first + a.rank) {
            c[i] = 0;
            return 0.0;
        }
        return double(c[i]) * double(c[i]);
    });
    if (threadIdx.x % kWarp == 0) a.sums[row] = sum;
}

struct GramLossArgs {
    const double* gram;
    const float* w;  // [matrices, rank]
    float* slope;    // [matrices, rank, rank]
    double* sums;    // [matrices]
    double slope_factor;
    int rank;
};

__global__ void __launch_bounds__(kThreads) gram_loss_kernel(const GramLossArgs a) {
    const int lane = int(threadIdx.x) % kWarp, r = a.rank;
    const int64_t matrix = blockIdx.x;
    const double* gram = a.gram + matrix * kGramSplits * r * r;
    const float* w = a.w + matrix * r;
    double* row_sums = shared_memory();
    const double c = sqrt(tree_sum(r, [&](int i) { return gram_element(gram, i, i, r); }) / double(r)) + kEpsilon;
    for (int i = int(threadIdx.x) / kWarp; i < r; i += kWarps) {
        const double sum = tree_sum(r, [&](int j) {
            const double pair = double(w[i]) * double(w[j]);
            const double weighted = pair * (gram_element(gram, i, j, r) - (i == j ? c * c : 0));
            a.slope[(matrix * r + i) * r + j] = float(pair * weighted * a.slope_factor);
            return weighted * weighted;
        });
        if (lane == 0) row_sums[i] = sum;
    }
    __syncthreads();
    if (threadIdx.x >= kWarp) return;
    const double sum = tree_sum(r, [&](int i) { return row_sums[i]; });
    if (lane == 0) a.sums[matrix] = sum;
}

struct LossArgs {
    const double* sums;  // [groups, count]
    float* loss;
    int groups, count;
    double divisor;
};

__global__ void __launch_bounds__(1024) loss_kernel(const LossArgs a) {
    double* of_groups = shared_memory();
    for (int group = int(threadIdx.x) / kWarp; group < a.groups; group += int(blockDim.x) / kWarp) {
        const double sum = tree_sum(a.count, [&](int i) { return a.sums[int64_t(group) * a.count + i]; });
        if (threadIdx.x % kWarp == 0) of_groups[group] = sum;
    }
    __syncthreads();
    if (threadIdx.x >= kWarp) return;
    const double sum = tree_sum(a.groups, [&](int i) { return of_groups[i]; });
    if (threadIdx.x == 0) *a.loss = float(sum / a.divisor);
}

// ---- Pairwise gradient: K to E, its largest element of a layer in [1, 2), and the product back to B's layout ----

struct ScaleArgs {
    const float* k;        // [layers, size]
    const float* largest;  // [layers, parts]
    void* scaled;
    float* up;  // [layers]
    int64_t size;
    int parts, blocks;
};

template <class E>
__global__ void __launch_bounds__(kThreads) scale_kernel(const ScaleArgs a) {
    const int64_t layer = blockIdx.x / a.blocks;
    int bits = 0;
    for (int i = 0; i < a.parts; ++i) bits = max(bits, __float_as_int(a.largest[layer * a.parts + i]));
    const int exponent = min(max(bits >> 23 & 255, 1), 253);
    const float down = __int_as_float((254 - exponent) << 23);
    if (blockIdx.x % a.blocks == 0 && threadIdx.x == 0) a.up[layer] = __int_as_float(exponent << 23);
    const float* k = a.k + layer * a.size;
    E* scaled = static_cast<E*>(a.scaled) + layer * a.size;
    for (int64_t i = int64_t(blockIdx.x % a.blocks) * kThreads + threadIdx.x; i < a.size; i += a.blocks * kThreads)
        scaled[i] = rounded_to<E>(k[i] * down);
}

struct GradientArgs {
    const float* product;  // [layers, rows, experts * rank]
    const float *up, *dloss;
    void* gradient;  // [layers, experts, rows, rank]
    int64_t rows;
    int experts, rank;
};

// A block moves kWarps rows of one layer.
template <class E>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const GradientArgs a) {
    const int64_t blocks = (a.rows + kWarps - 1) / kWarps, layer = blockIdx.x / blocks;
    const int64_t row = blockIdx.x % blocks * kWarps + threadIdx.x / kWarp;
    if (row >= a.rows) return;
    const float factor = a.up[layer] * *a.dloss;
    const float* product = a.product + (layer * a.rows + row) * a.experts * a.rank;
    E* gradient = static_cast<E*>(a.gradient) + (layer * a.experts * a.rows + row) * a.rank;
    for (Cells at(int(threadIdx.x) % kWarp, kWarp, a.rank); at.row < a.experts; at.next())
        gradient[at.row * a.rows * a.rank + at.col] = rounded_to<E>(product[at.row * a.rank + at.col] * factor);
}

// What project() needs to know of lora_b.
Projection of_experts(const Spectral& p) {
    Projection q = {};
    q.a = p.lora_b.data;
    q.a_layer = p.experts * p.lora_b.stride[0];
    q.a_expert = p.lora_b.stride[0];
    q.a_row = p.lora_b.stride[1];
    q.factor = 1;
    q.layers = p.layers;
    q.experts = p.experts;
    q.rows = p.rows;
    q.n = q.k = int(p.rank);
    q.dtype = q.out_dtype = p.lora_b.dtype;
    return q;
}

void loss_of(const SpectralPenaltyFwd& p, int64_t groups, int64_t count, double divisor, const double* sums) {
    launch<loss_kernel>("spectral_loss", dim3{1}, groups == 1 ? kWarp : 1024, int(groups) * int(sizeof(double)),
                        p.stream, false, LossArgs{sums, p.loss, int(groups), int(count), divisor});
}

// What the pairwise backward keeps in its workspace.
struct Slope {
    float* k;        // K, shape of c
    void* scaled_k;  // K in the dtype of lora_b, the largest element of a layer in [1, 2)
    float* up;       // [layers]: undoes the scaling
    float* largest;  // [layers * experts, blocks of rows]: magnitude in K
    int64_t bytes;
};

Slope slope_of(const SpectralPenaltyBwd& p) {
    const int64_t width = p.experts * p.rank, elements = p.layers * width * width;
    const int64_t element_bytes = p.lora_b.dtype == DType::f32 ? 4 : 2;
    char* const base = reinterpret_cast<char*>(p.workspace);
    Slope s = {};
    const auto take = [&](int64_t bytes) {
        char* const piece = base + s.bytes;
        s.bytes += (bytes + 15) / 16 * 16;
        return piece;
    };
    s.k = reinterpret_cast<float*>(take(elements * 4));
    s.scaled_k = p.scaled_k ? p.scaled_k : take(elements * element_bytes);
    s.up = reinterpret_cast<float*>(take(p.layers * 4));
    s.largest = reinterpret_cast<float*>(take(p.layers * p.experts * projection_blocks(width) * 4));
    return s;
}

}  // namespace

int64_t spectral_workspace(const Spectral& p) {
    const int64_t matrices = p.layers * p.experts;
    return gram_doubles(matrices, p.rank) + matrices * p.rank;
}

void spectral_weights(const SpectralWeights& p) {
    const int64_t matrices = p.layers * p.experts;
    const int r = int(p.rank);
    gram_partial(p.lora_b, matrices, p.rows, r, p.workspace, p.stream);
    const int doubles = Jacobi::kStateDoubles + kMaxWidth + Jacobi::matrices_doubles(r);
    launch<weights_kernel>("spectral_weights", dim3{unsigned(matrices)}, jacobi_threads(r),
                           doubles * int(sizeof(double)), p.stream, false,
                           WeightsArgs{p.workspace, p.weights, r, p.pairwise});
}

void spectral_features(const SpectralPenaltyFwd& p) {
    Projection q = of_experts(p);
    q.w = p.weights;
    q.out = p.x;
    q.out_row = p.experts * p.rank;
    q.out_layer = p.rows * q.out_row;
    q.out_expert = p.rank;
    project(q, p.stream);
}

void spectral_loss(const SpectralPenaltyFwd& p) {
    const int64_t matrices = p.layers * p.experts, width = p.experts * p.rank, rows = p.layers * width;
    const int r = int(p.rank);
    if (p.pairwise) {
        launch<cross_kernel>("spectral_cross", dim3{unsigned((rows + kWarps - 1) / kWarps)}, kThreads, 0, p.stream,
                             false, CrossArgs{p.c, p.workspace, rows, int(width), r});
        return loss_of(p, p.layers, width, 2, p.workspace);
    }
    double* sums = p.workspace + gram_doubles(matrices, r);
    gram_partial(p.lora_b, matrices, p.rows, r, p.workspace, p.stream);
    launch<gram_loss_kernel>("spectral_gram_loss", dim3{unsigned(matrices)}, kThreads, r * int(sizeof(double)),
                             p.stream, false,
                             GramLossArgs{p.workspace, p.weights, p.c, sums, 4.0 / double(matrices), r});
    loss_of(p, 1, matrices, double(matrices), sums);
}

void spectral_penalty_fwd(const SpectralPenaltyFwd& p) {
    if (p.pairwise) {
        spectral_features(p);
        spectral_cross_product(p);
    }
    spectral_loss(p);
}

int64_t spectral_bwd_workspace(const SpectralPenaltyBwd& p) {
    return p.pairwise ? slope_of(p).bytes / int64_t(sizeof(double)) : 0;
}

void spectral_slope(const SpectralPenaltyBwd& p) {
    const int64_t width = p.experts * p.rank, size = width * width;
    const Slope slope = slope_of(p);
    Projection q = {};
    q.a = p.c;
    q.a_layer = q.out_layer = size;
    q.a_expert = q.out_expert = p.rank;
    q.a_row = q.out_row = width;
    q.w = p.weights;
    q.transposed = true;
    q.factor = 2;
    q.largest = slope.largest;
    q.out = slope.k;
    q.layers = p.layers;
    q.experts = p.experts;
    q.rows = width;
    q.n = q.k = int(p.rank);
    project(q, p.stream);
    const int parts = int(p.experts * projection_blocks(width)), blocks = int(size / (8 * kThreads) + 1);
    for_dtype(p.lora_b.dtype, [&](auto element) {
        launch<scale_kernel<decltype(element)>>(
            "spectral_scale", dim3{unsigned(p.layers * blocks)}, kThreads, 0, p.stream, false,
            ScaleArgs{slope.k, slope.largest, slope.scaled_k, slope.up, size, parts, blocks});
    });
}

void spectral_gradient(const SpectralPenaltyBwd& p) {
    if (!p.pairwise) {
        Projection q = of_experts(p);
        q.w = p.c;
        q.dloss = p.dloss;
        q.out = p.dlora_b;
        q.out_layer = p.experts * p.rows * p.rank;
        q.out_expert = p.rows * p.rank;
        q.out_row = p.rank;
        return project(q, p.stream);
    }
    const float* up = slope_of(p).up;
    const int64_t blocks = p.layers * ((p.rows + kWarps - 1) / kWarps);
    for_dtype(p.lora_b.dtype, [&](auto element) {
        launch<gradient_kernel<decltype(element)>>(
            "spectral_gradient", dim3{unsigned(blocks)}, kThreads, 0, p.stream, false,
            GradientArgs{p.product, up, p.dloss, p.dlora_b, p.rows, int(p.experts), int(p.rank)});
    });
}

void spectral_penalty_bwd(const SpectralPenaltyBwd& p) {
    if (!p.pairwise) return spectral_gradient(p);
    const Slope slope = slope_of(p);
    spectral_slope(p);
    spectral_gradient_product(p, slope.scaled_k, slope.up);
}

}  // namespace mtlora::cuda
