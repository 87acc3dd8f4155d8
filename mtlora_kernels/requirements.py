"""What arguments of several functions must be. Every error names the argument, what it is and what it must be."""

import torch
from torch import Tensor

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_tensor(
    name: str,
    value: object,
    *,
    dim: int | None = None,
    min_dim: int = 0,
    dtypes: tuple[torch.dtype, ...] = COMPUTE_DTYPES,
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, it must be a tensor")
    if value.is_nested or value.layout != torch.strided:
        raise ValueError(f"{name} is {'nested' if value.is_nested else value.layout}, it must be a dense tensor")
    if value.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {value.dtype}, it must be one of {dtypes}")
    if dim is not None and value.dim() != dim:
        raise ValueError(f"{name} has {value.dim()} dimensions, it must have {dim}")
    if value.dim() < min_dim:
        raise ValueError(f"{name} has {value.dim()} dimensions, it must have at least {min_dim}")


def require_shape(name: str, value: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, it must be {meaning} = {tuple(shape)}")


def require_device(name: str, value: Tensor, device: torch.device, whose: str) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, it must be on {whose}'s device {device}")


def require_sequence(name: str, value: object, content: str) -> None:
    """A list, tuple or the like, not empty; its elements are looked at by `require_alike`."""
    if not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        raise TypeError(f"{name} is {type(value).__name__}, it must be a tensor or a sequence of tensors")
    if len(value) == 0:
        raise ValueError(f"{name} is an empty sequence, it must hold {content}")


def require_alike(name: str, values: object, dtypes: tuple[torch.dtype, ...] = COMPUTE_DTYPES) -> None:
    """Matrices of one shape on one device, as `torch.stack` needs them."""
    for i, value in enumerate(values):
        require_tensor(f"{name}[{i}]", value, dim=2, dtypes=dtypes)
        require_shape(f"{name}[{i}]", value, values[0].shape, f"the shape of {name}[0]")
        require_device(f"{name}[{i}]", value, values[0].device, f"{name}[0]")


def require_int(name: str, value: object, low: int, high: int | None = None, meaning: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {type(value).__name__}, it must be an int")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"in [{low}, {high}]{meaning}"
        raise ValueError(f"{name} is {value}, it must be {wanted}")
