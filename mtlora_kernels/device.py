"""Kernels launch on the current device, whatever the device of their tensors."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_HERE = nullcontext()


def on_device(t: Tensor) -> AbstractContextManager:
    """Makes the tensor's device the current one; does nothing where it is, or where t is not on a GPU."""
    # torch.cuda.current_device() first asks whether CUDA is initialised; a tensor on a GPU has answered that.
    if not t.is_cuda or t.get_device() == torch._C._cuda_getDevice():
        return _HERE
    return torch.cuda.device(t.device)
