"""The reference against float64 loops, finite differences and the published layers."""

import itertools

import pytest
import torch

import mtlora_kernels as mk
from mtlora_kernels.testing import lattice_inputs, random_inputs, rounding_inputs, run_case
from mtlora_kernels.testing.checks import against_float64, against_published
from mtlora_kernels.testing.oracle import float64_results

GROUP_FORM, EXPERT_FORM = (7, 24, 32, 4, 5, 2), (6, 20, 24, 3, 5, 8)
OPTIONS = (
    {},
    {"activation": "relu"},
    {"expert_scale": True, "load": True},
    {"dropout_p": 0.3},
    {"route_weights": True, "load": True},
    {"activation": "relu", "expert_scale": True, "dropout_p": 0.5},
    {"residual": False},
    {"numerics": "eager"},
    {"numerics": "eager", "accumulate_into_residual": True, "expert_scale": True},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [GROUP_FORM, EXPERT_FORM, (5, 16, 48, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_agrees_with_float64_loops(shape, options, dtype):
    inputs = random_inputs(*shape, dtype=dtype, **options)
    actual, expected = run_case("reference", inputs), float64_results(inputs)
    assert actual.keys() == expected.keys()
    for name, t in actual.items():
        # Rounding errors add up along chains of sums, here of fewer than 200 terms of order 1 in all, and a
        # cancelled sum keeps the errors of its terms: 200 half-ulps of the largest entry, at least of 1.
        bound = 100 * torch.finfo(dtype).eps * max(1.0, float(expected[name].abs().max()))
        assert (t.double() - expected[name]).abs().max() <= bound, name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 32, 2, 3, 2), (3, 5, 6, 2, 3, 3)], ids=str)
def test_gradcheck(shape, options):
    inputs = random_inputs(*shape, dtype=torch.float64, **options)
    names = list(inputs.arguments())

    def function(*tensors):
        return mk.routed_lora(**dict(zip(names, tensors, strict=True)), **inputs.options, impl="reference")

    leaves = [t.detach().requires_grad_() for t in inputs.arguments().values()]
    assert torch.autograd.gradcheck(function, leaves)


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PUBLISHED = (
    {},
    {"activation": "relu", "expert_scale": True},
    {"accumulate_into_residual": True},
    {"residual": False},
)
SHAPES = ((33, 64, 64, 16, 16, 1), (16, 64, 96, 8, 15, 6), (9, 48, 48, 4, 25, 48), (17, 40, 40, 4, 1, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", PUBLISHED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eager_numerics_is_the_published_layer(shape, options, dtype):
    inputs = lattice_inputs(*shape, dtype=dtype, numerics="eager", **options)
    assert against_published("reference", inputs) == []
    inputs = rounding_inputs(*shape, dtype=dtype, **options)
    assert against_published("reference", inputs, gradients=False) == []


def test_rounding_inputs_round():
    """The test above tells the two numerics apart: every second output has other bits in fp32 numerics."""
    inputs = rounding_inputs(*SHAPES[0], dtype=torch.bfloat16).with_options(numerics="fp32")
    assert against_published("reference", inputs, gradients=False)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("shape", [(8, 64, 64, 16, 16, 2), (4, 40, 48, 4, 5, 16)], ids=str)
def test_lattice_inputs_are_exact(shape, numerics, dtype):
    for options in (
        {"load": True},
        {"expert_scale": True, "load": True},
        {"dropout_p": 0.5},
        {"scaling": 0.5},
    ):
        for seed in range(3):
            inputs = lattice_inputs(*shape, dtype=dtype, numerics=numerics, seed=seed, **options)
            assert against_float64("reference", inputs) == []


def test_lattice_gradients_are_not_zero():
    inputs = lattice_inputs(16, 64, 64, 16, 16, 2, dtype=torch.bfloat16, expert_scale=True, load=True)
    for name, t in run_case("reference", inputs).items():
        assert (t != 0).float().mean() > 0.01, name


def test_form_depends_on_the_shape_only():
    """A token's output does not change with the number of tokens, on either side of the group-size threshold."""
    for shape, numerics in itertools.product((GROUP_FORM[1:], EXPERT_FORM[1:]), ("fp32", "eager")):
        inputs = random_inputs(300, *shape, dtype=torch.bfloat16, numerics=numerics)
        whole = mk.routed_lora(**inputs.kwargs(), impl="reference")
        inputs.x, inputs.residual = inputs.x[7:8], inputs.residual[7:8]
        assert torch.equal(mk.routed_lora(**inputs.kwargs(), impl="reference"), whole[7:8])
