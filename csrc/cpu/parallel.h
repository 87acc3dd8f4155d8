// Independent tasks over threads. Every task owns its outputs, so the thread count changes no result.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/simd.h"

namespace mtlora::cpu::MTLORA_ISA {

// body(task, buffer): buffers holds `floats` of scratch for each thread.
template <class Body>
static void parallel_for(int threads, int64_t tasks, float* buffers, int64_t floats, Body body) {
    if (tasks <= 1 || threads <= 1) {
        for (int64_t task = 0; task < tasks; ++task) body(task, buffers);
        return;
    }
#pragma omp parallel num_threads(int(min(threads, tasks)))
    {
        float* mine = buffers + thread_index() * floats;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) body(task, mine);
    }
}

template <class Body>
static void parallel_for(int threads, int64_t tasks, int64_t floats, Body body) {
    parallel_for(threads, tasks, scratch(max(1, min(threads, tasks)) * floats), floats, body);
}

// Rows cut into chunks of about equal size, a multiple of `multiple` and not much above `target`; as many chunks
// as give each of `threads` the same number, if there are rows enough.
struct Chunks {
    int64_t count, size;
};

static inline Chunks cut(int64_t rows, int64_t target, int64_t multiple, int64_t threads) {
    const int64_t wanted = min(round_up(ceil_div(rows, target), threads), ceil_div(rows, multiple));
    const int64_t size = round_up(ceil_div(rows, wanted), multiple);
    return {ceil_div(rows, size), size};
}

}  // namespace mtlora::cpu::MTLORA_ISA
