"""Every test gets fixed seeds and freshly allocated memory full of NaN, so that nothing unwritten passes."""

import pytest
import torch

from mtlora_kernels import available_impls
from mtlora_kernels.dispatch import IMPLS


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty returns NaN (or the largest integer); operators without a deterministic form only warn."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=IMPLS)
def impl(request) -> str:
    """Every implementation; those that this machine's CPU cannot run are skipped."""
    if request.param not in available_impls("cpu"):
        pytest.skip(f"implementation {request.param!r} is not available on cpu tensors here")
    return request.param
