// batched_rsvd: the launches, and the orthonormalisation of U of reference/rsvd.py.
#include <cuda_runtime.h>

#include "cuda/fp64.cuh"
#include "cuda/gram.cuh"
#include "cuda/launch.h"
#include "cuda/spectral.h"

namespace mtlora::cuda {
namespace {

constexpr double kPivot = 0x1p-50;
constexpr int kCholeskyThreads = 128, kRowThreads = 128;

// ---- inverse = L^-1 of Z^T Z = L L^T, one block a matrix ----

struct CholeskyArgs {
    const double* gram;
    double* inverse;  // [batch, k, k]
    int k;
};

__global__ void __launch_bounds__(kCholeskyThreads) cholesky_kernel(const CholeskyArgs a) {
    const int thread = int(threadIdx.x), k = a.k, pitch = k | 1;
    double *s = shared_memory(), *x = s + k * pitch, *smallest = x + k * pitch;
    const double* gram = a.gram + int64_t(blockIdx.x) * kGramSplits * k * k;
    for (int i = thread; i < k * k; i += kCholeskyThreads) {
        const int row = i / k, col = i % k;
        s[row * pitch + col] = gram_element(gram, row, col, k);
        x[row * pitch + col] = row == col;
        if (row == col) smallest[row] = s[row * pitch + row] * kPivot;
    }
    for (int j = 0; j < k; ++j) {
        __syncthreads();
        const double pivot = 1 / sqrt(fmax(s[j * pitch + j], smallest[j]));
        for (int i = thread; i < (k - j - 1) * k; i += kCholeskyThreads) {
            const int row = j + 1 + i / k, col = i % k;
            if (col > row) continue;  // of symmetric and triangular matrices
            const double factor = s[row * pitch + j] * pivot;
            if (col <= j) {
                x[row * pitch + col] -= factor * (x[j * pitch + col] * pivot);
            } else {
                s[row * pitch + col] -= factor * (s[col * pitch + j] * pivot);
            }
        }
        if (thread <= j) a.inverse[(int64_t(blockIdx.x) * k + j) * k + thread] = x[j * pitch + thread] * pivot;
    }
}

// ---- U = Z L^-T in place, a thread a row ----

struct RowsArgs {
    float* u;  // [batch, rows, k]
    const double* inverse;
    int64_t rows;
    int k;
};

template <int kWidth>
__global__ void __launch_bounds__(kRowThreads) rows_kernel(const RowsArgs a) {
    const int blocks = int((a.rows + kRowThreads - 1) / kRowThreads);
    const int64_t matrix = blockIdx.x / blocks, row = int64_t(blockIdx.x % blocks) * kRowThreads + threadIdx.x;
    double* x = shared_memory();  // [k][kWidth]
    for (int i = int(threadIdx.x); i < a.k * kWidth; i += kRowThreads) {
        const int col = i % kWidth, of = i / kWidth;
        x[i] = col <= of ? a.inverse[(matrix * a.k + of) * a.k + col] : 0;
    }
    __syncthreads();
    if (row >= a.rows) return;
    float* u = a.u + (matrix * a.rows + row) * a.k;
    double z[kWidth];
    const bool whole = a.k == kWidth;
    if (whole) {
#pragma unroll
        for (int i = 0; i < kWidth; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(u + i);
            z[i] = double(four.x);
            z[i + 1] = double(four.y);
            z[i + 2] = double(four.z);
            z[i + 3] = double(four.w);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) z[i] = i < a.k ? double(u[i]) : 0;
    }
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
        float out[4];
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const double2* of = reinterpret_cast<const double2*>(x + min(i + part, a.k - 1) * kWidth);
            double sum = 0;
#pragma unroll
            for (int pair = 0; pair <= (i + part) / 2; ++pair) {
                const double2 two = of[pair];
                sum += z[2 * pair] * two.x;
                if (2 * pair + 1 <= i + part) sum += z[2 * pair + 1] * two.y;
            }
            out[part] = float(sum);
        }
        if (whole) {
            *reinterpret_cast<float4*>(u + i) = make_float4(out[0], out[1], out[2], out[3]);
        } else {
#pragma unroll
            for (int part = 0; part < 4; ++part)
                if (i + part < a.k) u[i + part] = out[part];
        }
    }
}

template <int kWidth>
void rows_times_inverse(const Rsvd& p, const RowsArgs& args) {
    const int64_t blocks = (p.rows + kRowThreads - 1) / kRowThreads;
    launch<rows_kernel<kWidth>>("rsvd_rows", dim3{unsigned(p.batch * blocks)}, kRowThreads,
                                args.k * kWidth * int(sizeof(double)), p.stream, false, args);
}

// Returns the doubles that were handed out.
int64_t carve(const Rsvd& p, RsvdWorkspace& w) {
    double* at = p.workspace;
    const auto take = [&](int64_t doubles) {
        double* piece = at;
        at += doubles + doubles % 2;
        return piece;
    };
    const int64_t sketched = p.sketch < p.cols ? p.batch * p.cols * p.sketch : 0;
    w.gram = take(gram_doubles(p.batch, p.cols));  // of A, then of Z
    w.product = take(sketched);
    w.basis = take(sketched);
    w.scale = take(p.batch * p.rank);
    w.inverse = take(p.batch * p.rank * p.rank);
    return at - p.workspace;
}

}  // namespace

int64_t rsvd_workspace(const Rsvd& p) {
    RsvdWorkspace w;
    return carve(p, w);
}

void batched_rsvd(const Rsvd& p) {
    RsvdWorkspace w;
    carve(p, w);
    const int k = int(p.rank);
    gram_partial(p.matrices, p.batch, p.rows, p.cols, w.gram, p.stream);
    short_side(p, w);

    Projection z = {};
    z.a = p.matrices.data;
    z.a_layer = p.matrices.stride[0];
    z.a_row = p.matrices.stride[1];
    z.w = p.v;
    z.scale = w.scale;
    z.out = p.u;
    z.out_layer = p.rows * p.rank;
    z.out_row = p.rank;
    z.layers = p.batch;
    z.experts = 1;
    z.rows = p.rows;
    z.n = int(p.cols);
    z.k = k;
    z.seed = p.seed;
    z.dtype = p.matrices.dtype;
    z.out_dtype = DType::f32;
    project(z, p.stream);

    View u;
    u.data = p.u;
    u.stride[0] = z.out_layer;
    u.stride[1] = z.out_row;
    gram_partial(u, p.batch, p.rows, p.rank, w.gram, p.stream, true);
    launch<cholesky_kernel>("rsvd_cholesky", dim3{unsigned(p.batch)}, kCholeskyThreads,
                            (2 * k * (k | 1) + k) * int(sizeof(double)), p.stream, false,
                            CholeskyArgs{w.gram, w.inverse, k});
    const RowsArgs rows{p.u, w.inverse, p.rows, k};
    if (k <= 8) return rows_times_inverse<8>(p, rows);
    if (k <= 16) return rows_times_inverse<16>(p, rows);
    if (k <= 32) return rows_times_inverse<32>(p, rows);
    rows_times_inverse<64>(p, rows);
}

}  // namespace mtlora::cuda
