#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mtlora::cpu {

#define MTLORA_DECLARE(ISA)                                 \
    namespace ISA {                                         \
    void routed_lora_fwd(const RoutedLoraFwd& p);           \
    void routed_lora_bwd(const RoutedLoraBwd& p);           \
    void batched_rsvd(const Rsvd& p);                       \
    void spectral_weights(const SpectralWeights& p);        \
    void spectral_penalty_fwd(const SpectralPenaltyFwd& p); \
    void spectral_penalty_bwd(const SpectralPenaltyBwd& p); \
    }
MTLORA_DECLARE(base)
#ifdef MTLORA_X86
MTLORA_DECLARE(avx2)
MTLORA_DECLARE(avx512)
#endif
#undef MTLORA_DECLARE

namespace {

struct Kernels {
    const char* isa;
    bool supported;
    void (*routed_lora_fwd)(const RoutedLoraFwd&);
    void (*routed_lora_bwd)(const RoutedLoraBwd&);
    void (*batched_rsvd)(const Rsvd&);
    void (*spectral_weights)(const SpectralWeights&);
    void (*spectral_penalty_fwd)(const SpectralPenaltyFwd&);
    void (*spectral_penalty_bwd)(const SpectralPenaltyBwd&);
};

#define MTLORA_KERNELS(ISA, SUPPORTED) \
    {#ISA,                             \
     SUPPORTED,                        \
     ISA::routed_lora_fwd,             \
     ISA::routed_lora_bwd,             \
     ISA::batched_rsvd,                \
     ISA::spectral_weights,            \
     ISA::spectral_penalty_fwd,        \
     ISA::spectral_penalty_bwd}

Kernels choose() {
#ifdef MTLORA_X86
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    const Kernels best_first[] = {
#ifdef MTLORA_X86
        MTLORA_KERNELS(avx512, has_avx512),
        MTLORA_KERNELS(avx2, has_avx2),
#endif
        MTLORA_KERNELS(base, true),
    };
#undef MTLORA_KERNELS
    const char* named = std::getenv("MTLORA_CPU_ISA");
    for (const Kernels& kernels : best_first) {
        if (named ? std::strcmp(named, kernels.isa) == 0 && kernels.supported : kernels.supported) return kernels;
    }
    throw std::runtime_error("MTLORA_CPU_ISA=" + std::string(named) +
                             " is not an instruction set of this machine and build; leave it unset, or use " +
                             "base, avx2 or avx512 where available.");
}

const Kernels& kernels() {
    static const Kernels chosen = choose();
    return chosen;
}

struct Free {
    void operator()(float* p) const { std::free(p); }
};

}  // namespace

const char* isa() {
    return kernels().isa;
}
void routed_lora_fwd(const RoutedLoraFwd& p) {
    kernels().routed_lora_fwd(p);
}
void routed_lora_bwd(const RoutedLoraBwd& p) {
    kernels().routed_lora_bwd(p);
}
void batched_rsvd(const Rsvd& p) {
    kernels().batched_rsvd(p);
}
void spectral_weights(const SpectralWeights& p) {
    kernels().spectral_weights(p);
}
void spectral_penalty_fwd(const SpectralPenaltyFwd& p) {
    kernels().spectral_penalty_fwd(p);
}
void spectral_penalty_bwd(const SpectralPenaltyBwd& p) {
    kernels().spectral_penalty_bwd(p);
}

float* scratch(int64_t floats) {
    thread_local std::unique_ptr<float, Free> memory;
    thread_local int64_t capacity = 0;
    if (floats > capacity) {
        memory.reset();
        capacity = 0;
        const size_t bytes = (size_t(floats) * sizeof(float) + 63) / 64 * 64;
        memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
        if (!memory) throw std::bad_alloc();
        std::memset(memory.get(), 0, bytes);
        capacity = floats;
    }
    return memory.get();
}

int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

}  // namespace mtlora::cpu
