#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "common/routed_lora.h"
#include "common/spectral.h"
#include "cpu/dispatch.h"
#ifdef MTLORA_CUDA
#include "cuda/routed_lora.h"
#include "cuda/spectral.h"
#include "cuda/sum_rows.h"
#endif

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

#ifdef MTLORA_CUDA
void set_address(View& view, uintptr_t address) {
    view.data = pointer<void>(address);
}
template <class T>
void set_address(T*& field, uintptr_t address) {
    field = pointer<T>(address);
}

// run(plan), with the stream of this call and the addresses of `fields` in it, 0 for what is absent.
template <auto run, class Params, auto... fields>
void call(const Params& plan, uintptr_t stream, const std::array<uintptr_t, sizeof...(fields)>& addresses) {
    Params p = plan;
    p.stream = pointer<void>(stream);
    size_t i = 0;
    (set_address(p.*fields, addresses[i++]), ...);
    run(p);
}

// The fields are in the order in which mtlora_kernels/native gives their addresses.
template <auto run, class P = RoutedLoraFwd>
constexpr auto routed_lora_fwd = &call<run, P, &P::x, &P::residual, &P::lora_a, &P::lora_b, &P::router,
                                       &P::expert_scale, &P::out, &P::h, &P::pi, &P::load, &P::workspace>;
template <auto run, class P = RoutedLoraBwd>
constexpr auto routed_lora_bwd =
    &call<run, P, &P::dout, &P::x, &P::lora_a, &P::lora_b, &P::router, &P::expert_scale, &P::h, &P::pi, &P::dload,
          &P::dx, &P::dlora_a, &P::dlora_b, &P::drouter, &P::dpi, &P::dexpert_scale, &P::workspace>;
template <auto run, class P = Rsvd>
constexpr auto batched_rsvd = &call<run, P, &P::matrices, &P::u, &P::s, &P::v, &P::workspace>;
template <auto run, class P = SpectralWeights>
constexpr auto spectral_weights = &call<run, P, &P::lora_b, &P::weights, &P::workspace>;
template <auto run, class P = SpectralPenaltyFwd>
constexpr auto spectral_penalty_fwd = &call<run, P, &P::lora_b, &P::weights, &P::loss, &P::x, &P::c, &P::workspace>;
template <auto run, class P = SpectralPenaltyBwd>
constexpr auto spectral_penalty_bwd = &call<run, P, &P::lora_b, &P::weights, &P::x, &P::c, &P::dloss, &P::dlora_b,
                                            &P::scaled_k, &P::product, &P::workspace>;

void routed_lora_add_cuda(const View& residual, const View& mixture, const View& out, const py::tuple& shape,
                          uintptr_t stream) {
    cuda::routed_lora_add(residual, mixture, out, shape[0].cast<int64_t>(), shape[1].cast<int64_t>(),
                          pointer<void>(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.def("build_info", &build_info, "How this extension was built.");
    m.def("cpu_isa", &cpu::isa, "The instruction set of the CPU kernels; MTLORA_CPU_ISA overrides the choice.");

    py::class_<View>(m, "View").def(py::init(&view));

    // Value-initialised: what Python does not set is zero or absent.
    py::class_<RoutedLora>(m, "RoutedLora")
        .def_readwrite("tokens", &RoutedLora::tokens)
        .def_readwrite("d_in", &RoutedLora::d_in)
        .def_readwrite("d_out", &RoutedLora::d_out)
        .def_readwrite("rank", &RoutedLora::rank)
        .def_readwrite("experts", &RoutedLora::experts)
        .def_readwrite("groups", &RoutedLora::groups)
        .def_property("compute_dtype", nullptr, [](RoutedLora& p, int code) { p.compute_dtype = dtype_of(code); })
        .def_readwrite("scaling", &RoutedLora::scaling)
        .def_readwrite("inverse_count", &RoutedLora::inverse_count)
        .def_readwrite("relu", &RoutedLora::relu)
        .def_readwrite("group_form", &RoutedLora::group_form)
        .def_readwrite("dropout", &RoutedLora::dropout)
        .def_readwrite("keep_scale", &RoutedLora::keep_scale)
        .def_readwrite("drop_threshold", &RoutedLora::drop_threshold)
        .def_property("seed", nullptr, [](RoutedLora& p, uintptr_t a) { p.seed = pointer<const int64_t>(a); })
        .def_readwrite("threads", &RoutedLora::threads)
        .def_readwrite("x", &RoutedLora::x)
        .def_readwrite("lora_a", &RoutedLora::lora_a)
        .def_readwrite("lora_b", &RoutedLora::lora_b)
        .def_readwrite("router", &RoutedLora::router)
        .def_readwrite("expert_scale", &RoutedLora::expert_scale)
        .def_readwrite("h", &RoutedLora::h)
        .def_readwrite("pi", &RoutedLora::pi);
    py::class_<RoutedLoraFwd, RoutedLora>(m, "RoutedLoraFwd")
        .def(py::init([] { return RoutedLoraFwd{}; }))
        .def_readwrite("eager", &RoutedLoraFwd::eager)
        .def_readwrite("accumulate_into_residual", &RoutedLoraFwd::accumulate_into_residual)
        .def_readwrite("scaling_exact", &RoutedLoraFwd::scaling_exact)
        .def_readwrite("residual", &RoutedLoraFwd::residual)
        .def_readwrite("out", &RoutedLoraFwd::out)
        .def_readwrite("load", &RoutedLoraFwd::load);
    py::class_<RoutedLoraBwd, RoutedLora>(m, "RoutedLoraBwd")
        .def(py::init([] { return RoutedLoraBwd{}; }))
        .def_readwrite("dout", &RoutedLoraBwd::dout)
        .def_readwrite("dload", &RoutedLoraBwd::dload)
        .def_readwrite("dx", &RoutedLoraBwd::dx)
        .def_readwrite("dlora_a", &RoutedLoraBwd::dlora_a)
        .def_readwrite("dlora_b", &RoutedLoraBwd::dlora_b)
        .def_readwrite("drouter", &RoutedLoraBwd::drouter)
        .def_readwrite("dpi", &RoutedLoraBwd::dpi)
        .def_readwrite("dexpert_scale", &RoutedLoraBwd::dexpert_scale)
        .def_property("dlogits", nullptr, [](RoutedLoraBwd& p, uintptr_t a) { p.dlogits = pointer<float>(a); })
        .def_property("dh", nullptr, [](RoutedLoraBwd& p, uintptr_t a) { p.dh = pointer<float>(a); })
        .def_readwrite("token_chunk", &RoutedLoraBwd::token_chunk);

    py::class_<Rsvd>(m, "Rsvd")
        .def(py::init([] { return Rsvd{}; }))
        .def_readwrite("batch", &Rsvd::batch)
        .def_readwrite("rows", &Rsvd::rows)
        .def_readwrite("cols", &Rsvd::cols)
        .def_readwrite("rank", &Rsvd::rank)
        .def_readwrite("sketch", &Rsvd::sketch)
        .def_readwrite("power_iterations", &Rsvd::power_iterations)
        .def_readwrite("seed", &Rsvd::seed)
        .def_readwrite("threads", &Rsvd::threads)
        .def_readwrite("matrices", &Rsvd::matrices)
        .def_property("u", nullptr, [](Rsvd& p, uintptr_t a) { p.u = pointer<float>(a); })
        .def_property("s", nullptr, [](Rsvd& p, uintptr_t a) { p.s = pointer<float>(a); })
        .def_property("v", nullptr, [](Rsvd& p, uintptr_t a) { p.v = pointer<float>(a); });
    py::class_<Spectral>(m, "Spectral")
        .def_readwrite("layers", &Spectral::layers)
        .def_readwrite("experts", &Spectral::experts)
        .def_readwrite("rows", &Spectral::rows)
        .def_readwrite("rank", &Spectral::rank)
        .def_readwrite("pairwise", &Spectral::pairwise)
        .def_readwrite("threads", &Spectral::threads)
        .def_readwrite("lora_b", &Spectral::lora_b)
        .def_property("weights", nullptr, [](Spectral& p, uintptr_t a) { p.weights = pointer<float>(a); });
    py::class_<SpectralWeights, Spectral>(m, "SpectralWeights").def(py::init([] { return SpectralWeights{}; }));
    py::class_<SpectralPenaltyFwd, Spectral>(m, "SpectralPenaltyFwd")
        .def(py::init([] { return SpectralPenaltyFwd{}; }))
        .def_property("loss", nullptr, [](SpectralPenaltyFwd& p, uintptr_t a) { p.loss = pointer<float>(a); })
        .def_property("x", nullptr, [](SpectralPenaltyFwd& p, uintptr_t a) { p.x = pointer<void>(a); })
        .def_property("c", nullptr, [](SpectralPenaltyFwd& p, uintptr_t a) { p.c = pointer<float>(a); });
    py::class_<SpectralPenaltyBwd, SpectralPenaltyFwd>(m, "SpectralPenaltyBwd")
        .def(py::init([] { return SpectralPenaltyBwd{}; }))
        .def_property("dloss", nullptr, [](SpectralPenaltyBwd& p, uintptr_t a) { p.dloss = pointer<const float>(a); })
        .def_property("dlora_b", nullptr, [](SpectralPenaltyBwd& p, uintptr_t a) { p.dlora_b = pointer<void>(a); });

    m.def("routed_lora_fwd_cpu", &cpu::routed_lora_fwd, py::call_guard<py::gil_scoped_release>());
    m.def("routed_lora_bwd_cpu", &cpu::routed_lora_bwd, py::call_guard<py::gil_scoped_release>());
    m.def("batched_rsvd_cpu", &cpu::batched_rsvd, py::call_guard<py::gil_scoped_release>());
    m.def("spectral_weights_cpu", &cpu::spectral_weights, py::call_guard<py::gil_scoped_release>());
    m.def("spectral_penalty_fwd_cpu", &cpu::spectral_penalty_fwd, py::call_guard<py::gil_scoped_release>());
    m.def("spectral_penalty_bwd_cpu", &cpu::spectral_penalty_bwd, py::call_guard<py::gil_scoped_release>());
#ifdef MTLORA_CUDA
    m.def("routed_lora_fwd_cuda", routed_lora_fwd<&cuda::routed_lora_fwd>);
    m.def("routed_lora_add_cuda", &routed_lora_add_cuda);
    m.def("routed_lora_bwd_cuda", routed_lora_bwd<&cuda::routed_lora_bwd>);
    m.def("routed_lora_bwd_workspace", &cuda::routed_lora_bwd_workspace);
    m.def("sum_rows_workspace", &cuda::sum_rows_workspace);
    m.def("rsvd_workspace", &cuda::rsvd_workspace);
    m.def("batched_rsvd_cuda", batched_rsvd<&cuda::batched_rsvd>);
    m.def("spectral_workspace", &cuda::spectral_workspace);
    m.def("spectral_bwd_workspace", &cuda::spectral_bwd_workspace);
    m.def("spectral_weights_cuda", spectral_weights<&cuda::spectral_weights>);
    m.def("spectral_penalty_fwd_cuda", spectral_penalty_fwd<&cuda::spectral_penalty_fwd>);
    m.def("spectral_features_cuda", spectral_penalty_fwd<&cuda::spectral_features>);
    m.def("spectral_loss_cuda", spectral_penalty_fwd<&cuda::spectral_loss>);
    m.def("spectral_penalty_bwd_cuda", spectral_penalty_bwd<&cuda::spectral_penalty_bwd>);
    m.def("spectral_slope_cuda", spectral_penalty_bwd<&cuda::spectral_slope>);
    m.def("spectral_gradient_cuda", spectral_penalty_bwd<&cuda::spectral_gradient>);
#endif
}
