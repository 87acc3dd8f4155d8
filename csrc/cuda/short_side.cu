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
constexpr int kNearRows = 2;         // a matrix of at most 64 columns is kept in shared memory
constexpr int kSketchThreads = 192;  // six warps: 24 columns, the default for rank 16, in one go
constexpr int kTileCols = 4;         // of a product, per warp and 64 rows

struct ShortSideArgs {
    double* gram;     // partial sums; a wide matrix is completed in place of the first
    double* product;  // [batch, n, l], only with a sketch
    double* basis;    // the same
    double* scale;    // [batch, rank]: 1 / sigma, 0 for a null direction, NaN for a matrix that is not finite
    float *s, *v;
    int n, l, rank, power_iterations;
    uint64_t seed;
};

// y [n][pitch] in shared memory and its Householder basis. Eight lanes own a column, of each 32 rows four each: the
// first levels of a dot product's tree are in registers.
template <int kRows>
struct Sketch {
    static constexpr int kLanes = 8, kParts = kWarp / kLanes, kColumns = kWarp / kLanes;  // columns of a warp
    using Column = double[kRows][kParts];

    int n, l, pitch;
    double *y, *betas;

    static __host__ __device__ int pitch_of(int l) { return l | 1; }

    __device__ int row(int i, int part) const { return i * kWarp + part * kLanes + int(threadIdx.x) % kLanes; }

    // visit(element, row) of a column
    template <class Visit>
    __device__ void each(Column& x, Visit visit) const {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int part = 0; part < kParts; ++part) visit(x[i][part], row(i, part));
        }
    }
    __device__ void load(Column& x, int col) const {
        each(x, [&](double& element, int row) { element = row < n && col < l ? y[row * pitch + col] : 0; });
    }
    __device__ void store(Column& x, int col) const {
        each(x, [&](double& element, int row) {
            if (row < n && col < l) y[row * pitch + col] = element;
        });
    }
    __device__ static double dot(const Column& x, const Column& y) {
        double sums[kParts];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            sums[part] = x[0][part] * y[0][part];
#pragma unroll
            for (int i = 1; i < kRows; ++i) sums[part] += x[i][part] * y[i][part];
        }
        double sum = (sums[0] + sums[2]) + (sums[1] + sums[3]);
#pragma unroll
        for (int half = kLanes / 2; half; half /= 2) sum += __shfl_xor_sync(kAllLanes, sum, half);
        return sum;
    }

    // Columns first, first + 1, ... of y reflected; column `unit` begins as that column of I.
    __device__ void reflect(const Column& v, double beta, int first, int unit) const {
        const int warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp;
        for (int of_warp = first + warp * kColumns; of_warp < l; of_warp += warps * kColumns) {
            const int col = of_warp + int(threadIdx.x) % kWarp / kLanes;
            Column x;
            load(x, col);
            if (col == unit) each(x, [&](double& element, int row) { element = row == unit; });
            const double weight = beta * dot(v, x);
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
#pragma unroll
                for (int part = 0; part < kParts; ++part) x[i][part] -= v[i][part] * weight;
            }
            store(x, col);
        }
    }

    // y = its orthonormal basis; reflection j is kept in column j until column j of the basis replaces it.
    __device__ void orthonormalise() const {
        Column v;
        __syncthreads();
        for (int j = 0; j < l; ++j) {
            load(v, j);
            const double head = y[j * pitch + j];
            each(v, [&](double& element, int row) { element = row < j ? 0 : element; });
            const double square = dot(v, v), norm = sqrt(square);
            const double beta = square > 0 ? 1 / (square + fabs(head) * norm) : 0;
            each(v, [&](double& element, int row) { element = row == j ? head + (head < 0 ? -norm : norm) : element; });
            reflect(v, beta, j + 1, l);
            __syncthreads();
            if (int(threadIdx.x) < kLanes) {
                store(v, j);
                betas[j] = beta;
            }
        }
        __syncthreads();
        for (int j = l - 1; j >= 0; --j) {
            load(v, j);
            const double beta = betas[j];
            __syncthreads();
            reflect(v, beta, j, j);
        }
        __syncthreads();
    }

    // out [n][l] = g y in order of k, g [n][g_pitch] symmetric. A warp takes 64 rows and kTileCols columns at a time.
    __device__ void multiply(const double* g, int g_pitch, double* out) const {
        const int lane = int(threadIdx.x) % kWarp, warps = int(blockDim.x) / kWarp;
        const int col_tiles = (l + kTileCols - 1) / kTileCols, tiles = (n + 2 * kWarp - 1) / (2 * kWarp) * col_tiles;
        for (int tile = int(threadIdx.x) / kWarp; tile < tiles; tile += warps) {
            const int col = tile % col_tiles * kTileCols, low = tile / col_tiles * 2 * kWarp + lane, high = low + kWarp;
            double sum[2][kTileCols] = {};
#pragma unroll 4
            for (int k = 0; k < n; ++k) {
                const double *row = g + k * g_pitch, g_low = low < n ? row[low] : 0, g_high = high < n ? row[high] : 0;
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

// The upper triangle's sums become the whole matrix g [n][pitch], which may take the place of the first node.
template <int kRows>
__device__ void complete_gram(const double* partial, double* g, int n, int pitch) {
    const int warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp, lane = int(threadIdx.x) % kWarp;
#pragma unroll 2
    for (int row = warp; row < n; row += warps) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int col = lane + i * kWarp;
            if (col >= row && col < n) g[row * pitch + col] = gram_element(partial, row, col, n);
        }
    }
    __syncthreads();
    for (int row = warp; row < n; row += warps)
        for (int col = lane; col < row; col += kWarp) g[row * pitch + col] = g[col * pitch + row];
    __syncthreads();
}

// Shared memory for the matrices, in doubles. Near: A^T A, then the solver's in its place; y behind them. Far: y, then
// the solver's.
template <int kRows>
__host__ __device__ int y_begins(int n, int l) {
    const int whole = n * (n | 1), jacobi = Jacobi::matrices_doubles(l);
    return kRows > kNearRows ? 0 : whole > jacobi ? whole : jacobi;
}
template <int kRows>
int matrices_doubles(int n, int l) {
    const int doubles = y_begins<kRows>(n, l) + n * Sketch<kRows>::pitch_of(l), jacobi = Jacobi::matrices_doubles(l);
    return doubles > jacobi ? doubles : jacobi;
}

template <int kRows, bool kSketched>
__global__ void __launch_bounds__(kSketched ? kSketchThreads : 256, kRows == kNearRows ? 4 : 1)
    short_side_kernel(const ShortSideArgs a) {
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
    const Sketch<kRows> sketch{a.n, a.l, Sketch<kRows>::pitch_of(a.l), matrices + y_begins<kRows>(a.n, a.l),
                               state + Jacobi::kStateDoubles};
    constexpr bool kNear = kRows == kNearRows;
    const double* basis = kNear ? sketch.y : a.basis + matrix * a.n * a.l;
    const int basis_pitch = kNear ? sketch.pitch : a.l;
    if constexpr (kSketched) {
        const int pitch = kNear ? a.n | 1 : a.n;
        double *whole = kNear ? matrices : g, *product = a.product + matrix * a.n * a.l;
        complete_gram<kRows>(g, whole, a.n, pitch);
        for (Cells at(int(threadIdx.x), int(blockDim.x), a.l); at.row < a.n; at.next())
            sketch.y[at.row * sketch.pitch + at.col] = normal(uint32_t(at.row), uint32_t(at.col), kSketch, a.seed);
        __syncthreads();

        for (int power = 0; power <= a.power_iterations; ++power) {
            sketch.multiply(whole, pitch, product);
            sketch.read(product);
            sketch.orthonormalise();
        }
        if constexpr (!kNear) sketch.write(a.basis + matrix * a.n * a.l);
        sketch.multiply(whole, pitch, product);
        jacobi.fill([&](int i, int j) {
            double sum = 0;
#pragma unroll 8
            for (int k = 0; k < a.n; ++k) sum += basis[k * basis_pitch + i] * product[k * a.l + j];
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
#pragma unroll 4
                for (int k = 0; k < a.l; ++k) x[i] += basis[row * basis_pitch + k] * w[k * jacobi.pitch];
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
int shared_bytes(int n, int l) {
    const int matrices = l < n ? matrices_doubles<kRows>(n, l) : Jacobi::matrices_doubles(l);
    return (Jacobi::kStateDoubles + kMaxWidth + matrices) * int(sizeof(double));
}

template <int kRows>
void start(const ShortSideArgs& a, int64_t batch, void* stream) {
    const dim3 grid{unsigned(batch)};
    const int shared = shared_bytes<kRows>(a.n, a.l);
    if (a.l < a.n)
        return launch<short_side_kernel<kRows, true>>("short_side", grid, kSketchThreads, shared, stream, false, a);
    launch<short_side_kernel<kNearRows, false>>("short_side", grid, jacobi_threads(a.l), shared, stream, false, a);
}

}  // namespace

void short_side(const Rsvd& p, const RsvdWorkspace& w) {
    const int n = int(p.cols), l = int(p.sketch);
    const ShortSideArgs args{w.gram, w.product, w.basis, w.scale, p.s, p.v, n, l, int(p.rank), int(p.power_iterations),
                             p.seed};
    if (n <= kNearRows * kWarp && shared_bytes<kNearRows>(n, l) <= max_shared_bytes())
        return start<kNearRows>(args, p.batch, p.stream);
    start<kMaxSide / kWarp>(args, p.batch, p.stream);
}

}  // namespace mtlora::cuda
