// A^T A of tall matrices in fp64, in the order of `gram` in reference/jacobi.py.
#pragma once

#include <cstdint>

#include "common/routed_lora.h"
#include "cuda/fp64.cuh"

namespace mtlora::cuda {

// Lanes of the row tree are dealt to this many blocks, each of which leaves one node of the tree.
constexpr int kGramSplits = 4;

// partial [batch, kGramSplits, cols, cols]: the upper triangles of the nodes, for `gram_element`. Columns of a
// [batch, rows, cols] are contiguous, cols <= 256. `backwards` begins with the last matrix, which may still be in L2.
void gram_partial(const View& a, int64_t batch, int64_t rows, int64_t cols, double* partial, void* stream,
                  bool backwards = false);

inline int64_t gram_doubles(int64_t batch, int64_t cols) {
    return batch * kGramSplits * cols * cols;
}

// Element (i, j) from the nodes of one matrix: the last levels of the tree.
__device__ inline double gram_element(const double* partial, int i, int j, int cols) {
    const int64_t node = int64_t(cols) * cols;
    const double* at = partial + (i < j ? i * cols + j : j * cols + i);
    return (at[0] + at[2 * node]) + (at[node] + at[3 * node]);
}

}  // namespace mtlora::cuda
