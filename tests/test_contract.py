"""Every implementation gives the bits of the reference, and on lattice inputs those of exact arithmetic."""

import dataclasses
import os

import pytest
import torch

from mtlora_kernels import available_impls
from mtlora_kernels.testing import assert_bitwise_equal, lattice_inputs, random_inputs, run_case, with_layout
from mtlora_kernels.testing import checks as against
from mtlora_kernels.testing.inputs import LAYOUTS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUP_FORM, EXPERT_FORM = (17, 72, 96, 8, 15, 6), (17, 40, 48, 8, 5, 24)
SHAPES = (
    GROUP_FORM,
    EXPERT_FORM,
    (1, 128, 128, 16, 16, 1),
    (64, 100, 140, 5, 7, 7),
    (33, 24, 24, 3, 2, 24),
    (300, 16, 32, 4, 3, 2),
    (2, 48, 80, 64, 25, 5),
    (3, 32, 64, 4, 100, 4),
    (5, 1, 1, 1, 1, 1),
)
OPTIONS = (
    {"activation": "relu"},
    {"expert_scale": True},
    {"activation": "relu", "expert_scale": True, "load": True},
    {"dropout_p": 0.1},
    {"dropout_p": 0.999},
    {"dropout_p": 0.5, "activation": "relu", "expert_scale": True},
    {"route_weights": True},
    {"route_weights": True, "expert_scale": True, "load": True},
    {"load": True},
    {"residual": False},
    {"scaling": 1},
    {"scaling": 0.0},
    {"scaling": -2.5},
    {"residual_dtype": torch.float32},
    {"residual_dtype": torch.float16},
    {"weight_dtype": torch.float32},
    {"weight_dtype": torch.bfloat16, "expert_scale": True},
    {"compute_dtype": torch.bfloat16, "dropout_p": 0.1},
    {"compute_dtype": torch.float16, "route_weights": True, "load": True},
    {"compute_dtype": torch.float32, "expert_scale": True},
)


@pytest.fixture
def exact_impl() -> str:
    """The one with the reference's arithmetic on CPU tensors; Triton's interpreter follows CUDA's."""
    if "cpu" not in available_impls("cpu"):
        pytest.skip("the C++ kernels (mtlora_kernels._C) are not built")
    return "cpu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(exact_impl, shape, numerics, dtype):
    assert against.against_reference(exact_impl, random_inputs(*shape, dtype=dtype, numerics=numerics, load=True)) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [GROUP_FORM, EXPERT_FORM], ids=str)
def test_options(exact_impl, shape, options, dtype):
    for numerics in ("fp32", "eager"):
        inputs = random_inputs(*shape, dtype=dtype, numerics=numerics, **options)
        assert against.against_reference(exact_impl, inputs) == []


@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_accumulate_into_the_residual(exact_impl, dtype, residual_dtype):
    options = {"numerics": "eager", "accumulate_into_residual": True, "residual_dtype": residual_dtype}
    for shape in (GROUP_FORM, EXPERT_FORM):
        assert against.against_reference(exact_impl, random_inputs(*shape, dtype=dtype, **options)) == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [GROUP_FORM, EXPERT_FORM], ids=str)
def test_layouts(exact_impl, shape, layout):
    for dtype in DTYPES:
        for options in ({}, {"route_weights": True, "expert_scale": True, "load": True}):
            assert against.strided(exact_impl, random_inputs(*shape, dtype=dtype, **options), layout=layout) == []


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts_of_one_tensor_at_a_time(exact_impl, layout):
    inputs = random_inputs(*GROUP_FORM, dtype=torch.bfloat16, expert_scale=True)
    for name, t in inputs.tensors().items():
        moved = dataclasses.replace(inputs, **{name: with_layout(t, layout)})
        same = moved.map(torch.Tensor.contiguous)
        assert against.differences(run_case(exact_impl, moved), run_case("reference", same)) == [], name


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf"), 3e38, 6e4, 1e-40], ids=str)
def test_special_values(exact_impl, special):
    for name in ("x", "lora_a", "lora_b", "router", "residual", "dout"):
        for dtype in DTYPES:
            inputs = random_inputs(*GROUP_FORM, dtype=dtype, activation="relu")
            getattr(inputs, name).flatten()[5] = special
            assert against.against_reference(exact_impl, inputs) == [], name


def test_batch_invariance_and_repeats(impl):
    for shape in (GROUP_FORM, EXPERT_FORM):
        for dtype in (torch.float16, torch.float32) if impl == "triton" else DTYPES:
            inputs = random_inputs(130, *shape[1:], dtype=dtype)
            assert against.batch_invariance(impl, inputs, sizes=(1, 2, 17, 64, 130)) == []
            assert against.repeated(against.run_case, impl, inputs) == []


def test_thread_count_changes_nothing(exact_impl):
    threads = torch.get_num_threads()
    inputs = random_inputs(130, *GROUP_FORM[1:], dtype=torch.bfloat16, load=True, expert_scale=True)
    expected = run_case(exact_impl, inputs)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert against.differences(run_case(exact_impl, inputs), expected) == []
    finally:
        torch.set_num_threads(threads)


def test_no_tokens(impl):
    for shape in (GROUP_FORM, EXPERT_FORM):
        for options in ({"expert_scale": True}, {"dropout_p": 0.1, "load": True}, {"route_weights": True}):
            inputs = random_inputs(0, *shape[1:], **options)
            results = run_case(impl, inputs)
            for name, t in inputs.arguments().items():
                assert_bitwise_equal(results[f"d{name}"], torch.zeros_like(t), name)
            assert results["out"].shape == (0, shape[2])
            assert "load" not in results or results["load"].isnan().all()


LATTICE_SHAPES = ((8, 64, 64, 16, 16, 1), (9, 48, 96, 4, 15, 3), (4, 40, 48, 8, 5, 24), (5, 24, 24, 4, 1, 1))
LATTICE_OPTIONS = (
    {},
    {"activation": "relu", "expert_scale": True},
    {"dropout_p": 0.5},
    {"route_weights": True, "expert_scale": True},
    {"residual": False, "scaling": 0.5},
    {"residual_dtype": torch.float32},
    {"numerics": "eager", "expert_scale": True},
    {"numerics": "eager", "accumulate_into_residual": True},
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LATTICE_SHAPES, ids=str)
def test_lattice(impl, shape, dtype):
    if impl == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bf16 products wrongly")
    for options in LATTICE_OPTIONS:
        inputs = lattice_inputs(*shape, dtype=dtype, **options)
        assert against.against_float64(impl, inputs) == [], options


def test_interpreter_is_tested_where_it_is_on():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("TRITON_INTERPRET=1 runs the Triton kernels in the tests above")
    assert "triton" in available_impls("cpu")
