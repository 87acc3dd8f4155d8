// Sum over the rows of [rows, n] in the order of reference/arithmetic.py: runs of 256 rows, then the run sums likewise.
#include <cuda_runtime.h>

#include "cuda/elements.cuh"
#include "cuda/launch.h"
#include "cuda/sum_rows.h"

namespace mtlora::cuda {
namespace {

constexpr int kRun = 256;

struct SumArgs {
    const void* rows;
    float* sums;
    int64_t count;
    int n;
    float factor;
};

template <class V>
__global__ void sum_runs_kernel(const SumArgs a) {
    const int64_t first = int64_t(blockIdx.x) * kRun;
    const int rows = int(a.count - first < kRun ? a.count - first : kRun);
    const V* at = static_cast<const V*>(a.rows) + first * a.n + threadIdx.x;
    float sum = 0;
#pragma unroll 16
    for (int i = 0; i < rows; ++i) sum += to_float(at[int64_t(i) * a.n]);
    a.sums[int64_t(blockIdx.x) * a.n + threadIdx.x] = sum * a.factor;
}

}  // namespace

int64_t sum_rows_workspace(int64_t rows, int64_t n) {
    int64_t floats = 0;
    while (rows > kRun) {
        rows = (rows + kRun - 1) / kRun;
        floats += rows * n;
    }
    return floats;
}

void sum_rows(const void* rows, DType dtype, int64_t count, int n, float factor, float* sum, float* workspace,
              void* stream) {
    while (true) {
        const int64_t runs = (count + kRun - 1) / kRun;
        const SumArgs a{rows, runs == 1 ? sum : workspace, count, n, runs == 1 ? factor : 1.0f};
        const dim3 grid{unsigned(runs)};
        for_dtype(dtype, [&](auto element) {
            launch<sum_runs_kernel<decltype(element)>>("sum_rows", grid, n, 0, stream, false, a);
        });
        if (runs == 1) return;
        rows = workspace;
        dtype = DType::f32;
        workspace += runs * n;
        count = runs;
    }
}

}  // namespace mtlora::cuda
