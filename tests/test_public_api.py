"""The public names, and the documentation's list of implementations."""

import inspect
import re
import typing
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mtlora_kernels as mk
from mtlora_kernels.dispatch import IMPLS

ROOT = Path(mk.__file__).parents[1]

EXPORTS = {
    "SpectralWeights", "analysis", "available_impls", "available_spectral_impls", "balance_loss", "batched_rsvd", "nn",
    "routed_lora", "spectral_penalty", "testing",
}  # fmt: skip
TESTING = {
    "Inputs", "Row", "assert_bitwise_equal", "assert_matches_reference", "differences", "float64_penalty",
    "float64_results", "lattice_inputs", "make_adapters", "published_layer", "random_inputs", "rounding_inputs",
    "run_case", "run_checks", "trap_matrices", "with_layout",
}  # fmt: skip


def test_exports():
    assert set(mk.__all__) - {"nn"} == EXPORTS - {"nn"}
    for name in mk.__all__:
        assert getattr(mk, name) is not None
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", mk.__version__)


def test_testing_exports():
    assert set(mk.testing.__all__) == TESTING
    for name in mk.testing.__all__:
        assert getattr(mk.testing, name).__doc__


def test_signature_of_routed_lora():
    parameters = inspect.signature(mk.routed_lora).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["x", "lora_a", "lora_b", "router", "residual"]
    assert {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY} == {
        "scaling": 1.0, "num_groups": 1, "numerics": "fp32", "activation": None, "expert_scale": None,
        "dropout_p": 0.0, "dropout_seed": None, "route_weights": None, "compute_dtype": None,
        "accumulate_into_residual": False, "return_load": False, "impl": None,
    }  # fmt: skip
    for name in parameters:
        assert re.search(rf"^ +{name}: ", mk.routed_lora.__doc__, re.MULTILINE), f"{name} is not documented"


@pytest.mark.skipif(not hasattr(typing, "get_overloads"), reason="Python 3.11 remembers overloads")
def test_overloads_of_routed_lora():
    signature = inspect.signature(mk.routed_lora)
    overloads = [inspect.signature(f) for f in typing.get_overloads(mk.routed_lora)]
    returns = [Tensor, tuple[Tensor, Tensor], signature.return_annotation]
    assert [o.return_annotation for o in overloads] == returns
    for overload in overloads:
        kinds = {name: (p.kind, p.annotation) for name, p in overload.parameters.items() if name != "return_load"}
        assert kinds == {
            name: (p.kind, p.annotation) for name, p in signature.parameters.items() if name != "return_load"
        }


@pytest.mark.parametrize(
    "name",
    [
        "routed_lora_fwd", "routed_lora_bwd", "batched_rsvd", "spectral_weights", "spectral_penalty_fwd",
        "spectral_penalty_bwd",
    ],
)  # fmt: skip
def test_operators(name):
    assert {str(op) for op in getattr(torch.ops.mtlora_kernels, name).overloads()} == {"default"}
    for device in ("CPU", "CUDA", "MPS", "XPU"):  # the reference runs on any
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"mtlora_kernels::{name}", device)


def test_available_impls():
    for device in ("cpu", "cuda", "cuda:1"):
        available = mk.available_impls(device)
        assert available[0] == "reference"
        assert set(available) <= set(IMPLS)
        assert mk.available_spectral_impls(device)[0] == "reference"


def test_readme_table_is_the_list_of_implementations():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not part of this copy")
    table = re.search(r"^\| *impl *\|.*?\n\n", readme.read_text(), re.MULTILINE | re.DOTALL)
    assert table, "README.md has no table of implementations (first column: impl)"
    rows = re.findall(r"^\| *`(\w+)` *\|", table[0], re.MULTILINE)
    assert sorted(rows) == sorted(IMPLS)


def test_assert_bitwise_equal():
    equal = mk.testing.assert_bitwise_equal
    a = torch.tensor([[1.0, float("nan")], [0.0, -2.0]])
    equal(a, torch.tensor([[1.0, float("nan")], [-0.0, -2.0]]))
    with pytest.raises(AssertionError, match=r"dx: 1 of 4 differ, first at \(1, 1\): .*max abs diff .*, max ulp 1$"):
        equal(torch.nextafter(a, torch.tensor([[1.0, 0.0], [0.0, 0.0]])), a, "dx")
    with pytest.raises(AssertionError, match=r"max ulp 2$"):
        equal(torch.tensor([2.0**-149]), torch.tensor([-(2.0**-149)]))
    with pytest.raises(AssertionError, match=r"dtype is torch.float64, expected torch.float32"):
        equal(a.double(), a)
    with pytest.raises(AssertionError, match="shape is"):
        equal(a[0], a)
    with pytest.raises(AssertionError, match="1 of 4 differ"):
        equal(a.nan_to_num(), a)


@pytest.mark.parametrize("options", [{"style": "adaptformer"}, {"numerics": "eager"}, {"num_groups": 1}], ids=str)
def test_assert_matches_reference(options):
    module = mk.nn.RoutedLoRA(24, 4, 5, **{"num_groups": 2} | options).eval()
    torch.nn.init.normal_(module.lora_B)
    mk.testing.assert_matches_reference(module, torch.randn(2, 3, 24))
    module.register_forward_hook(lambda module, args, out: out * (1 + 2**-22))
    with pytest.raises(AssertionError, match=r"out: .* differ"):
        mk.testing.assert_matches_reference(module, torch.randn(2, 3, 24))
