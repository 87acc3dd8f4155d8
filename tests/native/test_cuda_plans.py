"""What callers of the CUDA kernels remember of a call, shown without a GPU: calls of `_C` are recorded, not made."""

from types import SimpleNamespace

import pytest
import torch

from mtlora_kernels.testing import with_layout

_C = pytest.importorskip("mtlora_kernels._C", reason="the extension is not built")
if _C.build_info()["cuda"] is None:
    pytest.skip("built without the CUDA kernels", allow_module_level=True)

from mtlora_kernels.native import cuda, cuda_bwd, cuda_spectral  # noqa: E402

T, D, R, N, G = 24, 64, 16, 4, 2
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ALL = (True, True, True, True, False, False)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[object, int, list[int]]]:
    """(parameters, stream, addresses) of every launch."""
    made = []

    def recorded(*call) -> None:
        made.append(call)

    launches = {name: recorded for name in vars(_C) if name.endswith("_cuda")}
    for module in (cuda, cuda_bwd, cuda_spectral):
        monkeypatch.setattr(module, "_C", SimpleNamespace(**vars(_C) | launches))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    return made


def forward_case(E=BF16, **changes) -> dict:
    case = dict(
        x=torch.randn(T, D).to(E), lora_a=torch.randn(R, D).to(E), lora_b=torch.randn(N, D, R).to(E),
        router=torch.randn(G * N, D).to(E), route_weights=None, residual=torch.randn(T, D).to(E), expert_scale=None,
        seed=None, scaling=2.0, num_groups=G, numerics="fp32", activation=None, dropout_p=0.0, compute_dtype=E,
        accumulate_into_residual=False, return_load=False,
    )  # fmt: skip
    return case | changes


def backward_case(E=BF16, **changes) -> dict:
    kept = "x", "lora_a", "lora_b", "router", "expert_scale", "seed", "scaling", "activation", "dropout_p"
    case = {name: forward_case(E)[name] for name in kept} | dict(
        dout=torch.randn(T, D).to(E), dload=None, h=torch.randn(T, R).to(E), pi=torch.rand(T, G, N).to(E), needs=ALL
    )
    return case | changes


ROUTED = [(cuda.routed_lora_fwd, forward_case, "x residual lora_a lora_b router"),
          (cuda_bwd.routed_lora_bwd, backward_case, "dout x lora_a lora_b router - h pi")]  # fmt: skip


@pytest.mark.parametrize("run, make, order", ROUTED, ids=["forward", "backward"])
def test_calls_of_a_kind_differ_in_addresses_alone(calls, run, make, order):
    cases = make(), make()
    for case in cases:
        run(**case)
    (first, stream, _), (second, _, _) = calls
    assert first is second and stream == 7
    for case, (_, _, addresses) in zip(cases, calls, strict=True):
        for name, address in zip(order.split(), addresses, strict=False):
            assert address == (0 if name == "-" else case[name].data_ptr()), name


CHANGES = [
    {"scaling": 3.0}, {"activation": "relu"}, {"router": None}, {"expert_scale": torch.ones(N, dtype=BF16)},
    {"x": torch.ones(T, 2 * D, dtype=BF16)[:, :D]}, {"E": F16},
]  # fmt: skip
FORWARD_CHANGES = [
    {"numerics": "eager"}, {"numerics": "eager", "accumulate_into_residual": True}, {"return_load": True},
    {"residual": None}, {"lora_b": torch.ones(N, 2 * D, R, dtype=BF16), "residual": None},
]  # fmt: skip
BACKWARD_CHANGES = [{"dload": torch.ones(N)}, {"needs": (False, *ALL[1:])}]


@pytest.mark.parametrize(
    "run, make, change",
    [(cuda.routed_lora_fwd, forward_case, change) for change in CHANGES + FORWARD_CHANGES]
    + [(cuda_bwd.routed_lora_bwd, backward_case, change) for change in CHANGES + BACKWARD_CHANGES],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value.__name__,
)
def test_another_kind_has_a_plan_of_its_own(calls, run, make, change):
    run(**make())
    run(**make(**change))
    run(**make())
    plain, changed, again = (parameters for parameters, _, _ in calls)
    assert changed is not plain and again is plain


@pytest.mark.parametrize("run, make, order", ROUTED, ids=["forward", "backward"])
def test_another_device_has_a_plan_of_its_own(calls, monkeypatch, run, make, order):
    """Workspaces may follow from the number of multiprocessors."""
    for device in (0, 1, 0):
        monkeypatch.setattr(torch.Tensor, "get_device", lambda _: device)  # noqa: B023
        run(**make())
    first, second, again = (parameters for parameters, _, _ in calls)
    assert second is not first and again is first


@pytest.mark.parametrize("run, make, order", ROUTED, ids=["forward", "backward"])
@pytest.mark.parametrize("layout", ["offset", "transposed", "expanded", "fp32"])
def test_what_does_not_fit_the_kernels_is_copied(calls, run, make, order, layout):
    plain = make()
    run(**plain)
    for place, name in enumerate(order.split()):
        if name == "-" or (layout == "fp32" and name in ("x", "residual", "h")):
            continue
        changed = plain[name].float() if layout == "fp32" else with_layout(plain[name], layout)
        for _ in range(2):
            run(**plain | {name: changed})
            parameters, _, addresses = calls[-1]
            assert parameters is calls[0][0] or name.startswith("lora_") or name == "router", name  # their gradients
            assert addresses[place] % 16 == 0 and addresses[place] != changed.data_ptr(), name


@pytest.mark.parametrize("change", [{"kind": "gram"}, {"dtype": F16}, {"dtype": F32}, {"layers": 1}])
def test_spectral_plans(calls, change):
    def run(kind="pairwise", dtype=BF16, layers=2) -> torch.Tensor:
        lora_b = torch.randn(layers, N, D, R).to(dtype)
        weights = cuda_spectral.spectral_weights(lora_b, kind)
        saved = cuda_spectral.spectral_penalty_fwd(lora_b, weights, kind)
        cuda_spectral.spectral_penalty_bwd(torch.ones(()), lora_b, weights, *saved[1:], kind)
        assert [addresses[0] for _, _, addresses in calls[-3:]] == [lora_b.data_ptr()] * 3
        return lora_b

    for options in ({}, change, {}):
        run(**options)
    for plain, changed, again in zip(calls[:3], calls[3:6], calls[6:], strict=True):
        assert changed[0] is not plain[0] and again[0] is plain[0]
    turned = run().mT.contiguous().mT
    cuda_spectral.spectral_weights(turned, "pairwise")
    assert calls[-1][0] is calls[0][0] and calls[-1][2][0] != turned.data_ptr()
