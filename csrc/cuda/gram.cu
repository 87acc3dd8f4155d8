// One warp sums one lane of the row tree, rows lane, lane + 32, ..., as a chain of tensor-core products of four rows;
// the warps of a block then add up by halves. A block owns a square tile of A^T A.
#include <cuda_runtime.h>

#include "cuda/fp64.cuh"
#include "cuda/gram.cuh"
#include "cuda/launch.h"

namespace mtlora::cuda {
namespace {

constexpr int kSumLanes = 32, kWarps = kSumLanes / kGramSplits, kThreads = kWarps * kWarp;
constexpr int kTile = 32;  // columns of a tile when the matrix has more
constexpr int kAhead = 4;  // products whose rows are loaded together

struct GramArgs {
    const void* a;
    int64_t matrix_stride, row_stride;
    int rows, cols, tiles;
    double* partial;
};

// One lane's view of a column tile: thread t of the warp reads columns V (t / 4) ... + V of rows t % 4, and calls
// them column t / 4 of V blocks. The tile's columns are permuted so that a thread's are contiguous in memory.
template <class T, int V, bool kAligned>
struct Columns {
    using Row = Elements<T, V, kAligned>;
    const T* first;
    int taken;  // of the V columns, those inside the matrix

    __device__ Row load(int64_t offset, bool inside) const {
        Row row;
        if constexpr (kAligned) {
            if (inside && taken > 0) return *reinterpret_cast<const Row*>(first + offset);
        }
#pragma unroll
        for (int i = 0; i < V; ++i) row.at[i] = !kAligned && inside && i < taken ? first[offset + i] : T(0.0f);
        return row;
    }
};

template <class T, int V, bool kAligned, bool kDiagonal>
__device__ void gram_tile(const GramArgs& a, int64_t matrix, int split, int left, int top) {
    constexpr int kBlocks = kDiagonal ? V * (V + 1) / 2 : V * V;
    const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
    const int first_row = split + kGramSplits * warp + kSumLanes * (lane % 4), column = V * (lane / 4);
    const T* base = static_cast<const T*>(a.a) + matrix * a.matrix_stride;
    const Columns<T, V, kAligned> up{base + top + column, a.cols - top - column};
    const Columns<T, V, kAligned> down{base + left + column, a.cols - left - column};

    double acc[kBlocks][2] = {};
    for (int row = first_row; row - kSumLanes * (lane % 4) < a.rows; row += 4 * kSumLanes * kAhead) {
        typename Columns<T, V, kAligned>::Row x[kAhead], y[kDiagonal ? 1 : kAhead];
#pragma unroll
        for (int step = 0; step < kAhead; ++step) {
            const int at = row + 4 * kSumLanes * step;
            x[step] = up.load(at * a.row_stride, at < a.rows);
            if constexpr (!kDiagonal) y[step] = down.load(at * a.row_stride, at < a.rows);
        }
#pragma unroll
        for (int step = 0; step < kAhead; ++step) {
            double rows[V], cols[V];
#pragma unroll
            for (int i = 0; i < V; ++i) {
                rows[i] = to_double(x[step].at[i]);
                cols[i] = kDiagonal ? rows[i] : to_double(y[kDiagonal ? 0 : step].at[i]);
            }
            int block = 0;
#pragma unroll
            for (int i = 0; i < V; ++i) {
#pragma unroll
                for (int j = kDiagonal ? i : 0; j < V; ++j) mma(acc[block++], rows[i], cols[j]);
            }
        }
    }

    double2* exchange = reinterpret_cast<double2*>(shared_memory());
    for (int half = kWarps / 2; half; half /= 2) {
        double2* slot = exchange + (warp % half * kBlocks) * kWarp + lane;
        if (warp >= half && warp < 2 * half) {
#pragma unroll
            for (int i = 0; i < kBlocks; ++i) slot[i * kWarp] = make_double2(acc[i][0], acc[i][1]);
        }
        __syncthreads();
        if (warp < half) {
#pragma unroll
            for (int i = 0; i < kBlocks; ++i) {
                const double2 other = slot[i * kWarp];
                acc[i][0] += other.x;
                acc[i][1] += other.y;
            }
        }
        __syncthreads();
    }
    if (warp != 0) return;
    double* node = a.partial + (matrix * kGramSplits + split) * a.cols * a.cols;
    int block = 0;
#pragma unroll
    for (int bi = 0; bi < V; ++bi) {
#pragma unroll
        for (int bj = kDiagonal ? bi : 0; bj < V; ++bj, ++block) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int i = top + column + bi, j = left + V * (2 * (lane % 4) + e) + bj;
                if (i < a.cols && j < a.cols) node[i < j ? i * a.cols + j : j * a.cols + i] = acc[block][e];
            }
        }
    }
}

template <class T, int V, bool kAligned>
__global__ void __launch_bounds__(kThreads) gram_kernel(const GramArgs a) {
    int index = int(blockIdx.x);
    const int tiles = a.tiles * (a.tiles + 1) / 2;
    int tile = index % tiles;  // those of one matrix are neighbours, so that only the first reads its rows from memory
    index /= tiles;
    const int split = index % kGramSplits;
    const int64_t matrix = index / kGramSplits;
    int top = 0, row_tiles = a.tiles;
    while (tile >= row_tiles) {
        tile -= row_tiles--;
        ++top;
    }
    const int left = top + tile;
    if (left == top) {
        gram_tile<T, V, kAligned, true>(a, matrix, split, left * kTile, top * kTile);
    } else if constexpr (V * 8 == kTile) {
        gram_tile<T, V, kAligned, false>(a, matrix, split, left * kTile, top * kTile);
    }
}

template <class T, int V>
void start(const GramArgs& a, int64_t batch, void* stream) {
    const int64_t bytes = V * int64_t(sizeof(T));
    const bool aligned = V != 3 && a.cols % V == 0 && a.row_stride % V == 0 && a.matrix_stride % V == 0 &&
                         reinterpret_cast<uintptr_t>(a.a) % bytes == 0;
    const dim3 grid{unsigned(batch * kGramSplits * (a.tiles * (a.tiles + 1) / 2))};
    const int blocks = a.tiles > 1 ? V * V : V * (V + 1) / 2;
    const int shared = kWarps / 2 * blocks * kWarp * int(sizeof(double2));
    if constexpr (V != 3) {
        if (aligned) return launch<gram_kernel<T, V, true>>("gram", grid, kThreads, shared, stream, false, a);
    }
    launch<gram_kernel<T, V, false>>("gram", grid, kThreads, shared, stream, false, a);
}

template <class T>
void start(const GramArgs& a, int64_t batch, void* stream) {
    switch ((a.cols + 7) / 8) {
        case 1:
            return start<T, 1>(a, batch, stream);
        case 2:
            return start<T, 2>(a, batch, stream);
        case 3:
            return start<T, 3>(a, batch, stream);
        default:
            return start<T, 4>(a, batch, stream);
    }
}

}  // namespace

void gram_partial(const View& a, int64_t batch, int64_t rows, int64_t cols, double* partial, void* stream) {
    const GramArgs args{a.data,    a.stride[0], a.stride[1],
                        int(rows), int(cols),   int(cols <= kTile ? 1 : (cols + kTile - 1) / kTile),
                        partial};
    for_dtype(a.dtype, [&](auto element) { start<decltype(element)>(args, batch, stream); });
}

}  // namespace mtlora::cuda
