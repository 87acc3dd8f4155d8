#pragma once

#include <cstdint>

#include "common/routed_lora.h"

namespace mtlora::cuda {

// Floats that `sum_rows` needs for its partial sums.
int64_t sum_rows_workspace(int64_t rows, int64_t n);

// sum[n] = factor * the sum over rows of contiguous [count, n], n <= 128, count >= 1.
void sum_rows(const void* rows, DType dtype, int64_t count, int n, float factor, float* sum, float* workspace,
              void* stream);

}  // namespace mtlora::cuda
