// One warp sums one lane of the row tree, rows lane, lane + 32, ..., as a chain of tensor-core products of four rows;
// the warps of a block then add up by halves. A block owns a square tile of A^T A. Where a tile fills the registers,
// four warps sum two lanes each, one after the other: two blocks share a multiprocessor, and one's ends hide behind the
// other.
#include <cuda_runtime.h>

#include "cuda/fp64.cuh"
#include "cuda/gram.cuh"
#include "cuda/launch.h"

namespace mtlora::cuda {
namespace {

constexpr int kSumLanes = 32, kLanes = kSumLanes / kGramSplits;  // lanes a block sums
constexpr int kWhole = 64;  // columns of the widest matrix whose triangle one block holds in registers
constexpr int kTile = 32;   // columns of a tile when the matrix has more

struct GramArgs {
    const void* a;
    int64_t matrix_stride, row_stride;
    int rows, cols, tiles;
    bool backwards;
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

template <int V>
constexpr int kWarps = V > 4 ? kLanes / 2 : kLanes;

template <class T, int V, bool kAligned, bool kDiagonal>
__device__ void gram_tile(const GramArgs& a, int64_t matrix, int split, int left, int top) {
    using Row = Elements<T, V, kAligned>;
    constexpr int kBlocks = kDiagonal ? V * (V + 1) / 2 : V * V;
    // Products whose rows are loaded together, 64 bytes a thread; with few warps on a multiprocessor, during those
    // before.
    constexpr int kBytes = V * int(sizeof(T)), kAhead = kBytes >= 32 ? 2 : kBytes >= 16 ? 4 : 8;
    constexpr bool kEarly = V > 4;
    constexpr int kSteps = V > 4 ? 1 : 2;  // of an instruction
    const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp, column = V * (lane / 4);
    const T* base = static_cast<const T*>(a.a) + matrix * a.matrix_stride;
    const Columns<T, V, kAligned> up{base + top + column, a.cols - top - column};
    const Columns<T, V, kAligned> down{base + left + column, a.cols - left - column};

    const auto load = [&](Row(&x)[kAhead], const Columns<T, V, kAligned>& columns, int row) {
#pragma unroll
        for (int step = 0; step < kAhead; ++step) {
            const int at = row + 4 * kSumLanes * step;
            x[step] = columns.load(at * a.row_stride, at < a.rows);
        }
    };
    double acc[V][V][2];  // blocks (i, j), of a tile on the diagonal those with i <= j
    const auto blocks = [&](auto visit) {
        int block = 0;
#pragma unroll
        for (int i = 0; i < V; ++i) {
#pragma unroll
            for (int j = kDiagonal ? i : 0; j < V; ++j) visit(acc[i][j], i, j, block++);
        }
    };
    const auto multiply = [&](const Row* x, const Row* y) {  // kSteps rows of each
        double rows[V][kSteps], cols[V][kSteps];
#pragma unroll
        for (int i = 0; i < V; ++i) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                rows[i][step] = to_double(x[step].at[i]);
                cols[i][step] = kDiagonal ? rows[i][step] : to_double(y[step].at[i]);
            }
        }
#pragma unroll
        for (int i = 0; i + 1 < V; i += 2) {
#pragma unroll
            for (int j = kDiagonal ? i : 0; j < V; ++j)
                mma16<kSteps>(acc[i][j], acc[i + 1][j], rows[i], rows[i + 1], cols[j]);
        }
        if constexpr (V % 2 == 1) {
#pragma unroll
            for (int j = kDiagonal ? V - 1 : 0; j < V; ++j) {
#pragma unroll
                for (int step = 0; step < kSteps; ++step) mma(acc[V - 1][j], rows[V - 1][step], cols[j][step]);
            }
        }
    };
    // A warp keeps its sums in its own part of the exchange, for itself or for the warp it is added to.
    double2* own = reinterpret_cast<double2*>(shared_memory()) + warp * kBlocks * kWarp + lane;
    const auto keep = [&] {
        blocks([&](double (&sum)[2], int, int, int i) { own[i * kWarp] = make_double2(sum[0], sum[1]); });
    };
    const auto add = [&](int warps_away) {
        blocks([&](double (&sum)[2], int, int, int i) {
            const double2 other = own[(warps_away * kBlocks + i) * kWarp];
            sum[0] += other.x;
            sum[1] += other.y;
        });
    };
#pragma unroll 1
    for (int later = kLanes / kWarps<V> - 1; later >= 0; --later) {  // the lane of the tree's upper half first
        const int of_tree = split + kGramSplits * (warp + later * kWarps<V>);
        blocks([&](double (&sum)[2], int i, int j, int) {
            sum[0] = sum[1] = 0;
            if (kDiagonal && i % 2 == 0 && i == j && i + 1 < V) acc[i + 1][j][0] = acc[i + 1][j][1] = 0;  // unused
        });
        Row x[kAhead], y[kAhead], next[kAhead];
        load(x, up, of_tree + kSumLanes * (lane % 4));
        for (int start = of_tree; start < a.rows; start += 4 * kSumLanes * kAhead) {
            const int row = start + kSumLanes * (lane % 4), after = row + 4 * kSumLanes * kAhead;
            if constexpr (kEarly) load(next, up, after);
            if constexpr (!kDiagonal) load(y, down, row);
#pragma unroll
            for (int step = 0; step < kAhead; step += kSteps) multiply(x + step, y + step);
            if constexpr (kEarly) {
#pragma unroll
                for (int step = 0; step < kAhead; ++step) x[step] = next[step];
            } else {
                load(x, up, after);
            }
        }
        if (later > 0) {
            keep();
        } else if (kWarps<V> < kLanes) {
            add(0);
        }
    }
    for (int half = kWarps<V> / 2; half; half /= 2) {
        if (warp >= half && warp < 2 * half) keep();
        __syncthreads();
        if (warp < half) add(half);
    }
    if (warp != 0) return;
    double* node = a.partial + (matrix * kGramSplits + split) * a.cols * a.cols;
    blocks([&](double (&sum)[2], int bi, int bj, int) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int i = top + column + bi, j = left + V * (2 * (lane % 4) + e) + bj;
            if (i < a.cols && j < a.cols) node[i < j ? i * a.cols + j : j * a.cols + i] = sum[e];
        }
    });
}

template <class T, int V, bool kAligned>
__global__ void __launch_bounds__(kWarps<V>* kWarp) gram_kernel(const GramArgs a) {
    int index = int(a.backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
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
    constexpr bool kVector = (V & (V - 1)) == 0;
    const bool aligned = kVector && a.cols % V == 0 && a.row_stride % V == 0 && a.matrix_stride % V == 0 &&
                         reinterpret_cast<uintptr_t>(a.a) % bytes == 0;
    const dim3 grid{unsigned(batch * kGramSplits * (a.tiles * (a.tiles + 1) / 2))};
    const int blocks = a.tiles > 1 ? V * V : V * (V + 1) / 2;
    const int threads = kWarps<V> * kWarp, shared = threads * blocks * int(sizeof(double2));
    if constexpr (kVector) {
        if (aligned) return launch<gram_kernel<T, V, true>>("gram", grid, threads, shared, stream, false, a);
    }
    launch<gram_kernel<T, V, false>>("gram", grid, threads, shared, stream, false, a);
}

template <class T>
void start(const GramArgs& a, int64_t batch, void* stream) {
    switch (a.tiles > 1 ? kTile / 8 : (a.cols + 7) / 8) {
        case 1:
            return start<T, 1>(a, batch, stream);
        case 2:
            return start<T, 2>(a, batch, stream);
        case 3:
            return start<T, 3>(a, batch, stream);
        case 4:
            return start<T, 4>(a, batch, stream);
        case 5:
            return start<T, 5>(a, batch, stream);
        case 6:
            return start<T, 6>(a, batch, stream);
        case 7:
            return start<T, 7>(a, batch, stream);
        default:
            return start<T, 8>(a, batch, stream);
    }
}

}  // namespace

void gram_partial(const View& a, int64_t batch, int64_t rows, int64_t cols, double* partial, void* stream,
                  bool backwards) {
    const GramArgs args{a.data,    a.stride[0], a.stride[1],
                        int(rows), int(cols),   int(cols <= kWhole ? 1 : (cols + kTile - 1) / kTile),
                        backwards, partial};
    for_dtype(a.dtype, [&](auto element) { start<decltype(element)>(args, batch, stream); });
}

}  // namespace mtlora::cuda
