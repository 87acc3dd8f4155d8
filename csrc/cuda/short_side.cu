// Singular values and right vectors from A^T A, one block a matrix: `short_side` of reference/rsvd.py.
#include <cuda_runtime.h>

#include "cuda/gram.cuh"
#include "cuda/jacobi.cuh"
#include "cuda/launch.h"
#include "cuda/spectral.h"

namespace mtlora::cuda {
namespace {

constexpr double kNull = 0x1p-22;
constexpr uint32_t kSketch = 1;
constexpr int kMaxSide = 256;
constexpr int kTileCols = 3;  // of a product, per warp and 64 rows: 24 columns keep eight warps busy

struct ShortSideArgs {
    double* gram;     // partial sums; with a sketch they are replaced by the whole matrix
    double* product;  // [batch, n, l], only with a sketch
    double* basis;    // [batch, n, l], only with a sketch
    double* scale;    // [batch, rank]: 1 / sigma, 0 for a null direction, NaN for a matrix that is not finite
    float *s, *v;
    int n, l, rank, power_iterations;
    uint64_t seed;
};

// y [n][pitch] in shared memory and its Householder basis. A warp owns a column at a time, a lane every 32nd row.
template <int kRows>
struct Sketch {
    int n, l, pitch;
    double *y, *betas;

    static __host__ __device__ int pitch_of(int l) { return l | 1; }

    __device__ int row(int i) const { return int(threadIdx.x) % kWarp + i * kWarp; }

    __device__ void load(double (&x)[kRows], int col) const {
#pragma unroll
        for (int i = 0; i < kRows; ++i) x[i] = row(i) < n ? y[row(i) * pitch + col] : 0;
    }
    __device__ void store(const double (&x)[kRows], int col) const {
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            if (row(i) < n) y[row(i) * pitch + col] = x[i];
    }
    __device__ static double dot(const double (&x)[kRows], const double (&y)[kRows]) {
        double sum = x[0] * y[0];
#pragma unroll
        for (int i = 1; i < kRows; ++i) sum += x[i] * y[i];
        return tree_sum(sum);
    }
    __device__ static void reflect(double (&x)[kRows], const double (&v)[kRows], double beta) {
        const double weight = beta * dot(v, x);
#pragma unroll
        for (int i = 0; i < kRows; ++i) x[i] -= v[i] * weight;
    }

    // y = its orthonormal basis; reflection j is kept in column j until column j of the basis replaces it.
    __device__ void orthonormalise() const {
        const int warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp;
        double v[kRows], x[kRows];
        __syncthreads();
        for (int j = 0; j < l; ++j) {
            load(v, j);
            const double head = y[j * pitch + j];
#pragma unroll
            for (int i = 0; i < kRows; ++i) v[i] = row(i) < j ? 0 : v[i];
            const double square = dot(v, v), norm = sqrt(square);
            const double beta = square > 0 ? 1 / (square + fabs(head) * norm) : 0;
#pragma unroll
            for (int i = 0; i < kRows; ++i) v[i] = row(i) == j ? head + (head < 0 ? -norm : norm) : v[i];
            for (int k = j + 1 + warp; k < l; k += warps) {
                load(x, k);
                reflect(x, v, beta);
                store(x, k);
            }
            __syncthreads();
            if (warp == 0) {
                store(v, j);
                betas[j] = beta;
            }
        }
        __syncthreads();
        for (int j = l - 1; j >= 0; --j) {
            load(v, j);
            const double beta = betas[j];
            __syncthreads();
            for (int k = j + warp; k < l; k += warps) {
                load(x, k);
                if (k == j) {
#pragma unroll
                    for (int i = 0; i < kRows; ++i) x[i] = row(i) == j;
                }
                reflect(x, v, beta);
                store(x, k);
            }
        }
        __syncthreads();
    }

    // out [n][l] = g y in order of k, g [n][n] symmetric. A warp takes 64 rows and kTileCols columns at a time.
    __device__ void multiply(const double* g, double* out) const {
        const int lane = int(threadIdx.x) % kWarp, warps = int(blockDim.x) / kWarp;
        const int col_tiles = (l + kTileCols - 1) / kTileCols, tiles = (n + 2 * kWarp - 1) / (2 * kWarp) * col_tiles;
        for (int tile = int(threadIdx.x) / kWarp; tile < tiles; tile += warps) {
            const int col = tile % col_tiles * kTileCols, low = tile / col_tiles * 2 * kWarp + lane, high = low + kWarp;
            double sum[2][kTileCols] = {};
#pragma unroll 4
            for (int k = 0; k < n; ++k) {
                const double g_low = low < n ? g[k * n + low] : 0, g_high = high < n ? g[k * n + high] : 0;
#pragma unroll
                for (int j = 0; j < kTileCols; ++j) {
                    const double factor = y[k * pitch + min(col + j, l - 1)];
                    sum[0][j] += g_low * factor;
                    sum[1][j] += g_high * factor;
                }
            }
#pragma unroll
            for (int j = 0; j < kTileCols; ++j) {
                if (col + j >= l) break;
                if (low < n) out[low * l + col + j] = sum[0][j];
                if (high < n) out[high * l + col + j] = sum[1][j];
            }
        }
        __syncthreads();
    }

    // y = x [n][l]
    __device__ void read(const double* x) const {
        for (Cells at(int(threadIdx.x), int(blockDim.x), l); at.row < n; at.next())
            y[at.row * pitch + at.col] = x[at.row * l + at.col];
        __syncthreads();
    }
    __device__ void write(double* x) const {
        for (Cells at(int(threadIdx.x), int(blockDim.x), l); at.row < n; at.next())
            x[at.row * l + at.col] = y[at.row * pitch + at.col];
        __syncthreads();
    }
};

template <int kRows>
__device__ void basis_of_range(const ShortSideArgs& a, int64_t matrix, const double* g, double* memory, double* betas) {
    const Sketch<kRows> sketch{a.n, a.l, Sketch<kRows>::pitch_of(a.l), memory, betas};
    double *product = a.product + matrix * a.n * a.l, *basis = a.basis + matrix * a.n * a.l;
    for (Cells at(int(threadIdx.x), int(blockDim.x), a.l); at.row < a.n; at.next())
        sketch.y[at.row * sketch.pitch + at.col] = normal(uint32_t(at.row), uint32_t(at.col), kSketch, a.seed);
    __syncthreads();
    for (int power = 0; power <= a.power_iterations; ++power) {
        sketch.multiply(g, product);
        sketch.read(product);
        sketch.orthonormalise();
    }
    sketch.write(basis);
    sketch.multiply(g, product);
}

// The upper triangle's sums become the whole matrix, in place of the first node.
__device__ void complete_gram(double* g, int n) {
    for (Cells at(int(threadIdx.x), int(blockDim.x), n); at.row < n; at.next())
        if (at.row <= at.col) g[at.row * n + at.col] = gram_element(g, at.row, at.col, n);
    __syncthreads();
    for (Cells at(int(threadIdx.x), int(blockDim.x), n); at.row < n; at.next())
        if (at.row > at.col) g[at.row * n + at.col] = g[at.col * n + at.row];
    __syncthreads();
}

template <int kRows, bool kSketched>
__global__ void __launch_bounds__(256) short_side_kernel(const ShortSideArgs a) {
    const int64_t matrix = blockIdx.x;
    const int warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp, lane = int(threadIdx.x) % kWarp;
    double *state = shared_memory(), *matrices = state + Jacobi::kStateDoubles + kMaxWidth;
    double* g = a.gram + matrix * kGramSplits * a.n * a.n;
    float *s = a.s + matrix * a.rank, *v = a.v + matrix * a.n * a.rank;
    double* scale = a.scale + matrix * a.rank;

    bool finite = true;
    for (int i = int(threadIdx.x); i < a.n; i += int(blockDim.x))
        finite = finite && isfinite(gram_element(g, i, i, a.n));
    if (!__syncthreads_and(finite)) {
        const double nan = __longlong_as_double(0x7FF8000000000000);
        for (int i = int(threadIdx.x); i < a.n * a.rank; i += int(blockDim.x)) v[i] = float(nan);
        for (int i = int(threadIdx.x); i < a.rank; i += int(blockDim.x)) {
            s[i] = float(nan);
            scale[i] = nan;
        }
        return;
    }

    Jacobi jacobi(a.l, matrices, state);
    const double* basis = kSketched ? a.basis + matrix * a.n * a.l : nullptr;
    if constexpr (kSketched) {
        complete_gram(g, a.n);
        basis_of_range<kRows>(a, matrix, g, matrices, state + Jacobi::kStateDoubles);
        const double* product = a.product + matrix * a.n * a.l;
        jacobi.fill([&](int i, int j) {
            double sum = 0;
#pragma unroll 4
            for (int k = 0; k < a.n; ++k) sum += basis[k * a.l + i] * product[k * a.l + j];
            return sum;
        });
    } else {
        jacobi.fill([&](int i, int j) { return gram_element(g, i, j, a.n); });
    }
    jacobi.solve();

    const double largest = sqrt(jacobi.values[0] > 0 ? jacobi.values[0] : 0);
    for (int i = int(threadIdx.x); i < a.rank; i += int(blockDim.x)) {
        const double sigma = sqrt(jacobi.values[i] > 0 ? jacobi.values[i] : 0);
        s[i] = float(sigma);
        scale[i] = sigma > kNull * largest ? 1 / sigma : 0;
    }
    // A warp writes a column, its element of largest magnitude positive, the first among equals.
    for (int col = warp; col < a.rank; col += warps) {
        const double* w = jacobi.v + jacobi.order[col];
        double x[kRows], magnitude = -1, extreme = 0;
        int first = 0;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int row = lane + i * kWarp;
            x[i] = 0;
            if (row >= a.n) continue;
            if constexpr (kSketched) {
                for (int k = 0; k < a.l; ++k) x[i] += basis[row * a.l + k] * w[k * jacobi.pitch];
            } else {
                x[i] = w[row * jacobi.pitch];
            }
            if (fabs(x[i]) > magnitude) {
                magnitude = fabs(x[i]);
                extreme = x[i];
                first = row;
            }
        }
#pragma unroll
        for (int half = kWarp / 2; half; half /= 2) {
            const double other_magnitude = __shfl_xor_sync(kAllLanes, magnitude, half);
            const double other_extreme = __shfl_xor_sync(kAllLanes, extreme, half);
            const int other_first = __shfl_xor_sync(kAllLanes, first, half);
            if (other_magnitude > magnitude || (other_magnitude == magnitude && other_first < first)) {
                magnitude = other_magnitude;
                extreme = other_extreme;
                first = other_first;
            }
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int row = lane + i * kWarp;
            if (row < a.n) v[row * a.rank + col] = float(extreme < 0 ? -x[i] : x[i]);
        }
    }
}

template <int kRows>
void start(const ShortSideArgs& a, int64_t batch, void* stream) {
    const dim3 grid{unsigned(batch)};
    const int state = Jacobi::kStateDoubles + kMaxWidth, jacobi = Jacobi::matrices_doubles(a.l);
    if (a.l < a.n) {
        const int sketch = a.n * Sketch<kRows>::pitch_of(a.l), doubles = state + (sketch > jacobi ? sketch : jacobi);
        launch<short_side_kernel<kRows, true>>("short_side", grid, 256, doubles * int(sizeof(double)), stream, false,
                                               a);
    } else {
        launch<short_side_kernel<2, false>>("short_side", grid, jacobi_threads(a.l),
                                            (state + jacobi) * int(sizeof(double)), stream, false, a);
    }
}

}  // namespace

void short_side(const Rsvd& p, const RsvdWorkspace& w) {
    const ShortSideArgs args{w.gram, w.product,   w.basis,       w.scale,     p.s,
                             p.v,    int(p.cols), int(p.sketch), int(p.rank), int(p.power_iterations),
                             p.seed};
    if (p.cols <= 2 * kWarp) return start<2>(args, p.batch, p.stream);
    start<kMaxSide / kWarp>(args, p.batch, p.stream);
}

}  // namespace mtlora::cuda
