"""Kernels launch on the current device, whatever the device of their tensors."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(t: Tensor) -> AbstractContextManager:
    """Makes the tensor's device the current one; does nothing where it is, or where t is not on a GPU."""
    if not t.is_cuda or t.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(t.device)
