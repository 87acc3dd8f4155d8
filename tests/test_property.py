"""Drawn shapes, dtypes, layouts and options: the C++ kernels and the reference never differ."""

import dataclasses
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtlora_kernels import available_impls
from mtlora_kernels.testing import differences, random_inputs, run_case, with_layout
from mtlora_kernels.testing.inputs import LAYOUTS

CASES = int(os.environ.get("MTLORA_PROPERTY_CASES", "100"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif("cpu" not in available_impls("cpu"), reason="mtlora_kernels._C is not built")


@st.composite
def calls(draw):
    """Inputs of one call in drawn layouts."""
    T, d_in, r = draw(st.integers(0, 70)), draw(st.integers(1, 80)), draw(st.integers(1, 20))
    G, S, N = draw(st.integers(1, 9)), draw(st.integers(1, 40)), draw(st.integers(1, 34))
    dtype = st.sampled_from(DTYPES)
    maybe_dtype = st.none() | dtype
    numerics = draw(st.sampled_from(("fp32", "eager")))
    residual = draw(st.booleans())
    route_weights = draw(st.booleans())
    options = {
        "dtype": draw(dtype),
        "weight_dtype": draw(maybe_dtype),
        "residual_dtype": draw(maybe_dtype),
        "compute_dtype": draw(maybe_dtype),
        "residual": residual,
        "router": N > 1 or draw(st.booleans()),
        "route_weights": route_weights,
        "expert_scale": draw(st.booleans()),
        "load": draw(st.booleans()),
        "scaling": draw(st.sampled_from((1.0, 2.0, 1.7, -0.3, 0.0, 1e-6))),
        "numerics": numerics,
        "accumulate_into_residual": residual and numerics == "eager" and draw(st.booleans()),
        "activation": draw(st.sampled_from((None, "relu"))),
        "dropout_p": draw(st.sampled_from((0.0, 0.0, 0.1, 0.5, 0.9))),
        "dropout_seed": draw(st.integers(0, 2**63 - 1)),
    }
    inputs = random_inputs(T, d_in, G * S, r, N, G, seed=draw(st.integers(0, 2**31)), **options)
    layouts = {name: draw(st.sampled_from(LAYOUTS)) for name in inputs.tensors()}
    return dataclasses.replace(inputs, **{name: with_layout(getattr(inputs, name), k) for name, k in layouts.items()})


@settings(
    max_examples=CASES,
    deadline=None,
    derandomize=CASES <= 100,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
@given(calls())
def test_cpu_kernels_equal_the_reference(inputs):
    assert differences(run_case("cpu", inputs), run_case("reference", inputs)) == []
