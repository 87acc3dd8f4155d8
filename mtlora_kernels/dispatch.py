"""Which implementation serves a call: one table, one resolver. An explicit request works or raises."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from .limits import Call, cpu_limits, hopper_limits, low_precision


@dataclass(frozen=True)
class Impl:
    """forward and backward name modules; limits gives the reason why a call is not served, or None."""

    device_type: str | None
    forward: str
    backward: str
    limits: Callable[[Call], str | None]


# fastest first
_TABLE = {
    "cpu": Impl("cpu", "native.cpu", "native.cpu", cpu_limits),
    "cuda": Impl("cuda", "native.cuda", "native.cuda_bwd", hopper_limits),
    "triton": Impl("cuda", "triton.routed_lora_fwd", "triton.routed_lora_bwd", low_precision),
    "reference": Impl(None, "reference.routed_lora", "reference.routed_lora_bwd", lambda call: None),
}
IMPLS = tuple(_TABLE)


class UnsupportedCall(ValueError):
    """impl names an implementation that does not serve calls of this dtype or these sizes."""


def _has_extension(cuda: bool) -> bool:
    if importlib.util.find_spec("mtlora_kernels._C") is None:
        return False
    return not cuda or load_module("_C").build_info()["cuda"] is not None


def load_module(name: str) -> ModuleType:
    return importlib.import_module(f"mtlora_kernels.{name}")


BUILT = {
    "cpu": _has_extension(cuda=False),
    "cuda": torch.version.cuda is not None and _has_extension(cuda=True),
    "triton": importlib.util.find_spec("triton") is not None,
    "reference": True,
}


def _is_hopper(device: torch.device) -> bool:
    if not torch.cuda.is_available():
        return False
    properties = torch.cuda.get_device_properties(device)  # which torch.compile takes as a constant
    return (properties.major, properties.minor) == (9, 0)


def _runs_on(impl: str, device: torch.device) -> bool:
    wanted = _TABLE[impl].device_type
    if impl == "triton" and device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return wanted is None or (wanted == device.type and (impl != "cuda" or _is_hopper(device)))


def available_impls(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names that `impl=` accepts for tensors on this device, the reference first.

    >>> available_impls("cpu")
    ('reference', 'cpu')
    """
    device = torch.device(device)
    return tuple(impl for impl in reversed(IMPLS) if BUILT[impl] and _runs_on(impl, device))


def resolve(impl: str | None, device: torch.device, call: Call) -> str:
    """The implementation of this call. None: the fastest that supports it; a name: that one or ValueError."""
    available = available_impls(device)
    if impl is None:
        # A CPU tensor reaches Triton's interpreter, a test tool, by name only: its own device type is "cuda".
        return next(
            name
            for name, row in _TABLE.items()
            if name in available and row.device_type in (None, device.type) and row.limits(call) is None
        )
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}, it must be None or one of {IMPLS}")
    if impl not in available:
        raise ValueError(f"impl is {impl!r}, it must be one of {available} for tensors on {device}")
    reason = _TABLE[impl].limits(call)
    if reason is not None:
        serving = tuple(name for name in available if _TABLE[name].limits(call) is None)
        raise UnsupportedCall(f"impl is {impl!r}, it must be None or one of {serving} for this call: {reason}")
    return impl


@cache
def routed_lora_kernels(impl: str):
    """(forward, backward) of an implementation; its module is imported on first use."""
    row = _TABLE[impl]
    return load_module(row.forward).routed_lora_fwd, load_module(row.backward).routed_lora_bwd
