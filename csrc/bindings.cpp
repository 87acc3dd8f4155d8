#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/routed_lora.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace mtlora;

namespace {

py::dict build_info() {
    py::dict info;
    info["compiler"] = MTLORA_COMPILER;
#ifdef MTLORA_CUDA
    info["cuda"] = MTLORA_CUDA_VERSION;
    info["cuda_architectures"] = py::str(MTLORA_CUDA_ARCHITECTURES).attr("split")(",");
#else
    info["cuda"] = py::none();
    info["cuda_architectures"] = py::list();
#endif
    info["isas"] = py::str(MTLORA_ISAS).attr("split")(",");
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    return info;
}

DType dtype_of(int code) {
    if (code < 0 || code > int(DType::f16)) throw std::runtime_error("unknown dtype code " + std::to_string(code));
    return DType(code);
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// A view from (data_ptr, dtype code, strides).
View view(uintptr_t data, int dtype, const py::tuple& strides) {
    View v;
    v.data = pointer<void>(data);
    v.dtype = dtype_of(dtype);
    if (strides.size() > 3) throw std::runtime_error("a view has at most three dimensions");
    for (size_t i = 0; i < strides.size(); ++i) v.stride[i] = strides[i].cast<int64_t>();
    return v;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.def("build_info", &build_info, "How this extension was built.");
    m.def("cpu_isa", &cpu::isa, "The instruction set of the CPU kernels; MTLORA_CPU_ISA overrides the choice.");

    py::class_<View>(m, "View").def(py::init(&view));

#define FIELD(T, name) .def_readwrite(#name, &T::name)
#define ADDRESS(T, name, type) \
    .def_property(#name, nullptr, [](T& p, uintptr_t address) { p.name = pointer<type>(address); })
    // Value-initialised: what Python does not set is zero or absent.
    py::class_<RoutedLora>(m, "RoutedLora") FIELD(RoutedLora, tokens) FIELD(RoutedLora, d_in) FIELD(RoutedLora, d_out)
        FIELD(RoutedLora, rank) FIELD(RoutedLora, experts) FIELD(RoutedLora, groups)
            .def_property("compute_dtype", nullptr, [](RoutedLora& p, int code) { p.compute_dtype = dtype_of(code); })
                FIELD(RoutedLora, scaling) FIELD(RoutedLora, inverse_count) FIELD(RoutedLora, relu)
                    FIELD(RoutedLora, group_form) FIELD(RoutedLora, dropout) FIELD(RoutedLora, keep_scale)
                        FIELD(RoutedLora, drop_threshold) ADDRESS(RoutedLora, seed, const int64_t)
                            FIELD(RoutedLora, threads) FIELD(RoutedLora, x) FIELD(RoutedLora, lora_a)
                                FIELD(RoutedLora, lora_b) FIELD(RoutedLora, router) FIELD(RoutedLora, expert_scale)
                                    FIELD(RoutedLora, h) FIELD(RoutedLora, pi);
    py::class_<RoutedLoraFwd, RoutedLora>(m, "RoutedLoraFwd")
        .def(py::init([] { return RoutedLoraFwd{}; })) FIELD(RoutedLoraFwd, eager)
            FIELD(RoutedLoraFwd, accumulate_into_residual) FIELD(RoutedLoraFwd, residual) FIELD(RoutedLoraFwd, out)
                FIELD(RoutedLoraFwd, load);
    py::class_<RoutedLoraBwd, RoutedLora>(m, "RoutedLoraBwd")
        .def(py::init([] { return RoutedLoraBwd{}; })) FIELD(RoutedLoraBwd, dout) FIELD(RoutedLoraBwd, dload)
            FIELD(RoutedLoraBwd, dx) FIELD(RoutedLoraBwd, dlora_a) FIELD(RoutedLoraBwd, dlora_b)
                FIELD(RoutedLoraBwd, drouter) FIELD(RoutedLoraBwd, dpi) FIELD(RoutedLoraBwd, dexpert_scale)
                    ADDRESS(RoutedLoraBwd, dlogits, float) ADDRESS(RoutedLoraBwd, dh, float);
#undef ADDRESS
#undef FIELD

    m.def("routed_lora_fwd_cpu", &cpu::routed_lora_fwd, py::call_guard<py::gil_scoped_release>());
    m.def("routed_lora_bwd_cpu", &cpu::routed_lora_bwd, py::call_guard<py::gil_scoped_release>());
}
