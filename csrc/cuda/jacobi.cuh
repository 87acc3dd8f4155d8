// Eigenvalues of one small symmetric matrix by a thread block, in the order of `jacobi` in reference/jacobi.py.
//
// A round's angles come from one warp, a lane per pair, while the other warps turn the eigenvectors by the round
// before; then every 2 x 2 block of rows (p, q) and columns (p', q') turns in place, owned by one thread. The angles,
// two square roots and two divisions deep, are the time of a round.
#pragma once

#include "cuda/fp64.cuh"

namespace mtlora::cuda {

constexpr int kMaxWidth = 64, kMaxPairs = kMaxWidth / 2, kMaxSweeps = 24;
constexpr double kRotate = 0x1p-54;

// Walks the cells of a grid that thread 0, 1, ... of `threads` owns, without a division a step.
struct Cells {
    int row, col, row_step, col_step, cols;

    __device__ Cells(int thread, int threads, int cols)
        : row(thread / cols), col(thread % cols), row_step(threads / cols), col_step(threads % cols), cols(cols) {}
    __device__ void next() {
        row += row_step;
        col += col_step;
        if (col >= cols) {
            col -= cols;
            ++row;
        }
    }
};

struct Rotations {
    double c[kMaxPairs], s[kMaxPairs];
    int p[kMaxPairs], q[kMaxPairs];
    bool any;
};

// In shared memory. An odd matrix gets a row and a column of zeros, which never rotate.
struct Jacobi {
    int l, even, pitch;
    double *h, *v;         // [even][pitch]
    double* values;        // [l]: eigenvalues, descending
    int* order;            // [l]: the column of v that belongs to each
    Rotations* rotations;  // [2]

    static __host__ __device__ int pitch_of(int l) { return (l + l % 2) | 1; }  // odd: columns spread over the banks
    static __host__ __device__ int matrices_doubles(int l) { return 2 * (l + l % 2) * pitch_of(l); }
    static constexpr int kStateDoubles = kMaxWidth + kMaxWidth / 2 + 2 * int(sizeof(Rotations) / sizeof(double));

    __device__ Jacobi(int l, double* matrices, double* state)
        : l(l),
          even(l + l % 2),
          pitch(pitch_of(l)),
          h(matrices),
          v(matrices + even * pitch),
          values(state),
          order(reinterpret_cast<int*>(state + kMaxWidth)),
          rotations(reinterpret_cast<Rotations*>(state + kMaxWidth + kMaxWidth / 2)) {}

    // h(i, j) from a function; all threads, before `solve`.
    template <class Element>
    __device__ void fill(Element element) {
        for (Cells at(int(threadIdx.x), int(blockDim.x), even); at.row < even; at.next()) {
            h[at.row * pitch + at.col] = at.row < l && at.col < l ? element(at.row, at.col) : 0;
            v[at.row * pitch + at.col] = at.row == at.col;
        }
    }

    // Lane i < even / 2 of one warp: the rotation of its pair in round k, and the pair's own block of h.
    __device__ bool rotate_pair(int k, double threshold, Rotations& r) {
        const int i = int(threadIdx.x) % kWarp, last = even - 1;
        if (i >= even / 2) return false;
        int one = k, other = last;
        if (i > 0) {
            one = k + i < last ? k + i : k + i - last;
            other = k - i >= 0 ? k - i : k - i + last;
        }
        const int p = min(one, other), q = max(one, other);
        const double app = h[p * pitch + p], aqq = h[q * pitch + q], apq = h[p * pitch + q];
        const bool rotate = fabs(apq) > threshold;
        double t = 0;
        if (rotate) {
            const double gap = aqq - app, twice = 2 * apq;
            const double root = sqrt(gap * gap + twice * twice);
            t = twice / (gap + (gap < 0 ? -root : root));
        }
        const double c = 1 / sqrt(1 + t * t);
        r.p[i] = p;
        r.q[i] = q;
        r.c[i] = c;
        r.s[i] = t * c;
        if (rotate) {
            h[p * pitch + p] = app - t * apq;
            h[q * pitch + q] = aqq + t * apq;
            h[p * pitch + q] = h[q * pitch + p] = 0;
        }
        return rotate;
    }

    __device__ void rotate_blocks(const Rotations& r) {
        const int pairs = even / 2;
        for (Cells at(int(threadIdx.x), int(blockDim.x), pairs); at.row < pairs; at.next()) {
            if (at.row == at.col) continue;
            const double c = r.c[at.col], s = r.s[at.col], row_c = r.c[at.row], row_s = r.s[at.row];
            double *up = h + r.p[at.row] * pitch, *down = h + r.q[at.row] * pitch;
            const int p = r.p[at.col], q = r.q[at.col];
            const double up_p = c * up[p] - s * up[q], up_q = s * up[p] + c * up[q];
            const double down_p = c * down[p] - s * down[q], down_q = s * down[p] + c * down[q];
            up[p] = row_c * up_p - row_s * down_p;
            up[q] = row_c * up_q - row_s * down_q;
            down[p] = row_s * up_p + row_c * down_p;
            down[q] = row_s * up_q + row_c * down_q;
        }
    }

    __device__ void rotate_vectors(const Rotations& r, int thread, int threads) {
        for (Cells at(thread, threads, even / 2); at.row < l; at.next()) {
            const double c = r.c[at.col], s = r.s[at.col];
            double* row = v + at.row * pitch;
            const int p = r.p[at.col], q = r.q[at.col];
            const double x = row[p], y = row[q];
            row[p] = c * x - s * y;
            row[q] = s * x + c * y;
        }
    }

    // All threads of a block of at least two warps. h is used up.
    __device__ void solve() {
        const int thread = int(threadIdx.x), threads = int(blockDim.x);
        __syncthreads();
        const double threshold = tree_sum(l, [&](int i) { return h[i * pitch + i]; }) * kRotate;
        int round = 0;
        bool pending = false;  // v has yet to turn by the round before
        for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
            bool large = false;
            for (Cells at(thread, threads, l); at.row < l; at.next())
                large |= at.row < at.col && fabs(h[at.row * pitch + at.col]) > threshold;
            if (!__syncthreads_or(large)) break;
            for (int k = 0; k < even - 1; ++k, ++round) {
                Rotations& now = rotations[round % 2];
                if (thread < kWarp) {
                    const bool any = __any_sync(kAllLanes, rotate_pair(k, threshold, now));
                    if (thread == 0) now.any = any;
                } else if (pending) {
                    rotate_vectors(rotations[(round + 1) % 2], thread - kWarp, threads - kWarp);
                }
                __syncthreads();
                pending = now.any;
                if (pending) rotate_blocks(now);
                __syncthreads();
            }
        }
        if (pending) rotate_vectors(rotations[(round + 1) % 2], thread, threads);
        for (int i = thread; i < l; i += threads) {
            const double value = h[i * pitch + i];
            int before = 0;
            for (int j = 0; j < l; ++j) {
                const double other = h[j * pitch + j];
                before += other > value || (other == value && j < i);
            }
            values[before] = value;
            order[before] = i;
        }
        __syncthreads();
    }
};

// Threads for one matrix: about one for a 2 x 2 block, and a warp that is free for the eigenvectors.
inline int jacobi_threads(int l) {
    const int pairs = (l + 1) / 2, blocks = (pairs * pairs + kWarp - 1) / kWarp * kWarp;
    return blocks < 2 * kWarp ? 2 * kWarp : blocks > 256 ? 256 : blocks;
}

}  // namespace mtlora::cuda
