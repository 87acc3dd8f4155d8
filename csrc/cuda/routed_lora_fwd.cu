#include "cuda/routed_lora.h"
#include "cuda/sum_rows.h"

namespace mtlora::cuda {

void routed_lora_fwd(const RoutedLoraFwd& f) {
    project(f);
    expand(f);  // right after project, which it overlaps
    if (f.load.data) {
        sum_rows(f.pi.data, f.compute_dtype, f.tokens * f.groups, int(f.experts), f.inverse_count,
                 static_cast<float*>(f.load.data), f.workspace, f.stream);
    }
}

}  // namespace mtlora::cuda
