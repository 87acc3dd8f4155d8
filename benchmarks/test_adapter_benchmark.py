"""The adapter cases under pytest-benchmark: `pytest benchmarks --benchmark-only`."""

import pytest
import torch

from .checks import mismatches
from .registry import Contender, contenders, default_impls
from .shapes import CPU_QUICK_SHAPES, Shape, make_inputs

pytest.importorskip("pytest_benchmark")
CPU = torch.device("cpu")
FIELD = contenders(default_impls(CPU), ("fp32", "eager"), with_compile=False)


@pytest.mark.parametrize("measure", ["forward", "forward+backward"])
@pytest.mark.parametrize("contender", FIELD, ids=lambda contender: contender.name.replace(" ", "-"))
@pytest.mark.parametrize("shape", CPU_QUICK_SHAPES, ids=lambda shape: shape.name)
def test_adapter(benchmark, shape: Shape, contender: Contender, measure: str) -> None:
    assert not contender.impl or not mismatches(contender, shape, CPU)
    benchmark.group = f"{shape.name} {measure}"
    benchmark(contender.call(make_inputs(shape, CPU), measure))
