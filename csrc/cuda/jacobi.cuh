// Eigenvalues of one small symmetric matrix by a thread block, in the order of `jacobi` in reference/jacobi.py.
//
// A round's angles, two square roots and two divisions deep, are its time. One warp, a lane per pair, computes those of
// the next round: the three elements it needs it turns itself. Meanwhile the other warps turn the matrix, every 2 x 2
// block of rows (p, q) and columns (p', q') in place by one thread, and the eigenvectors.
#pragma once

#include "cuda/fp64.cuh"

namespace mtlora::cuda {

constexpr int kMaxWidth = 64, kMaxPairs = kMaxWidth / 2, kMaxSweeps = 24;
constexpr double kRotate = 0x1p-54;

// Of one round, a pair p < q each; c = 1 and s = 0 where a pair does not rotate.
struct Rotations {
    double c[kMaxPairs], s[kMaxPairs];
    double at_p[kMaxPairs], at_q[kMaxPairs];  // the diagonal after the round
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

    // What a lane of the first warp knows of its pair in a round.
    struct Pair {
        int p, q;
        double at_p, at_q;  // the diagonal after the round
        bool rotates;
    };

    // The pair of lane i < even / 2 in round k; the indices that are neither the last nor k lie around k.
    __device__ void pair_of(int i, int k, int& one, int& other) const {
        const int last = even - 1;
        one = k + i < last ? k + i : k + i - last;
        other = i == 0 ? last : k - i >= 0 ? k - i : k - i + last;
    }

    // The angle that makes element (p, q) = apq zero; all lanes of the first warp.
    __device__ Pair rotation(int p, int q, double app, double aqq, double apq, double threshold, Rotations& r) const {
        const int i = int(threadIdx.x) % kWarp;
        const bool active = i < even / 2, rotates = active && fabs(apq) > threshold;
        const bool any = __any_sync(kAllLanes, rotates);
        double t = 0, c = 1;
        if (any) {
            if (rotates) {
                const double gap = aqq - app, twice = 2 * apq;
                const double root = sqrt(gap * gap + twice * twice);
                t = twice / (gap + (gap < 0 ? -root : root));
            }
            c = 1 / sqrt(1 + t * t);
        }
        const Pair pair{p, q, rotates ? app - t * apq : app, rotates ? aqq + t * apq : aqq, rotates};
        if (active) {
            r.c[i] = c;
            r.s[i] = t * c;
            r.at_p[i] = pair.at_p;
            r.at_q[i] = pair.at_q;
            r.p[i] = p;
            r.q[i] = q;
        }
        if (i == 0) r.any = any;
        return pair;
    }

    __device__ Pair first_rotation(double threshold, Rotations& r) const {
        int one = 0, other = 0;
        if (int(threadIdx.x) < even / 2) pair_of(int(threadIdx.x), 0, one, other);
        const int p = min(one, other), q = max(one, other);
        return rotation(p, q, h[p * pitch + p], h[q * pitch + q], h[p * pitch + q], threshold, r);
    }

    // From the pairs of one round, whose rotations are `now`, to those of round k after it. h is still without `now`
    // outside of the pairs' own blocks, and may change after the block's barrier in here.
    __device__ Pair next_rotation(const Pair& mine, int k, double threshold, const Rotations& now,
                                  Rotations& next) const {
        const int i = int(threadIdx.x) % kWarp, pairs = even / 2;
        int p = 0, q = 0;
        double app = 0, aqq = 0, apq = 0;
        if (pairs == 1) {  // the same pair again
            p = mine.p, q = mine.q;
            app = mine.at_p, aqq = mine.at_q;
            apq = mine.rotates ? 0 : h[p * pitch + q];
            __syncthreads();
        } else {
            // Who had p and q: neighbours of lane i, at the ends itself.
            int of_p = i == 0 ? 1 : min(i + 1, pairs - 1), of_q = max(i - 1, 0);
            double up_p = 0, up_q = 0, down_p = 0, down_q = 0;
            if (i < pairs) {
                pair_of(i, k, p, q);
                if (p > q) {
                    const int index = p, lane = of_p;
                    p = q, q = index;
                    of_p = of_q, of_q = lane;
                }
                const double *up = h + now.p[of_p] * pitch, *down = h + now.q[of_p] * pitch;
                up_p = up[now.p[of_q]], up_q = up[now.q[of_q]];
                down_p = down[now.p[of_q]], down_q = down[now.q[of_q]];
            }
            __syncthreads();
            if (i < pairs) {
                const bool row_first = p == now.p[of_p], col_first = q == now.p[of_q];
                const double c = now.c[of_q], s = now.s[of_q], row_c = now.c[of_p], row_s = now.s[of_p];
                const double left = col_first ? c : s, right = col_first ? -s : c;
                const double upper = row_first ? row_c : row_s, lower = row_first ? -row_s : row_c;
                apq = upper * (left * up_p + right * up_q) + lower * (left * down_p + right * down_q);
                app = row_first ? now.at_p[of_p] : now.at_q[of_p];
                aqq = col_first ? now.at_p[of_q] : now.at_q[of_q];
            }
        }
        return rotation(p, q, app, aqq, apq, threshold, next);
    }

    // `at` is where a thread begins. Pairs' own blocks are their lanes'.
    __device__ void rotate_blocks(const Rotations& r, Cells at) {
        for (const int pairs = even / 2; at.row < pairs; at.next()) {
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

    __device__ void rotate_vectors(const Rotations& r, Cells at) {
        for (; at.row < l; at.next()) {
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
        const Cells first_cell(thread - kWarp, threads - kWarp, even / 2);  // of pairs, or rows, by pairs
        int round = 0;
        Pair pair = {};
        if (thread < kWarp) pair = first_rotation(threshold, rotations[0]);
        for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
            bool large = false;
            for (Cells at(thread, threads, l); at.row < l; at.next())
                large |= at.row < at.col && fabs(h[at.row * pitch + at.col]) > threshold;
            if (!__syncthreads_or(large)) break;
            for (int k = 0; k < even - 1; ++k, ++round) {
                const Rotations& now = rotations[round % 2];
                const bool any = now.any;
                if (thread < kWarp) {
                    if (pair.rotates) {
                        h[pair.p * pitch + pair.p] = pair.at_p;
                        h[pair.q * pitch + pair.q] = pair.at_q;
                        h[pair.p * pitch + pair.q] = h[pair.q * pitch + pair.p] = 0;
                    }
                    pair =
                        next_rotation(pair, k + 1 < even - 1 ? k + 1 : 0, threshold, now, rotations[(round + 1) % 2]);
                } else {
                    __syncthreads();  // the first warp has what it needs of h
                    if (any) {
                        rotate_blocks(now, first_cell);
                        rotate_vectors(now, first_cell);
                    }
                }
                __syncthreads();
            }
        }
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

// Threads for one matrix: a warp for the angles, and about one thread for a 2 x 2 block.
inline int jacobi_threads(int l) {
    const int pairs = (l + 1) / 2, threads = kWarp + (pairs * pairs + kWarp - 1) / kWarp * kWarp;
    return threads > 256 ? 256 : threads;
}

}  // namespace mtlora::cuda
