#include <algorithm>

#include "cuda/routed_lora.h"
#include "cuda/sum_rows.h"

namespace mtlora::cuda {
namespace {

// A grid counts tiles of tokens in 16 bits, so `project` takes this many tokens at a time: 32,768 tiles of 64.
constexpr int64_t kProjectTokens = int64_t(1) << 21;

void* advanced(void* data, int64_t elements) {
    constexpr int kElementBytes = 2;
    return static_cast<char*>(data) + elements * kElementBytes;
}

void project_all(const RoutedLoraFwd& f) {
    for (int64_t first = 0; first < f.tokens; first += kProjectTokens) {
        RoutedLoraFwd run = f;
        run.tokens = std::min(kProjectTokens, f.tokens - first);
        run.x.data = advanced(f.x.data, first * f.x.stride[0]);
        run.h.data = advanced(f.h.data, first * f.rank);
        run.pi.data = advanced(f.pi.data, first * f.groups * f.experts);
        project(run);
    }
}

}  // namespace

void routed_lora_fwd(const RoutedLoraFwd& f) {
    project_all(f);
    expand(f);  // right after project, which it overlaps
    if (f.load.data) {
        sum_rows(f.pi.data, f.compute_dtype, f.tokens * f.groups, int(f.experts), f.inverse_count,
                 static_cast<float*>(f.load.data), f.workspace, f.stream);
    }
}

}  // namespace mtlora::cuda
