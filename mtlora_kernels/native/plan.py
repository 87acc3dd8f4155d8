"""How the CUDA kernels are called: calls of a kind share a plan, each passes its stream and addresses."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..memo import Memo


class Plan(NamedTuple):
    """A parameter struct without stream and addresses, and the bytes of the workspace it asks for."""

    params: _C.RoutedLora | _C.Spectral
    workspace: int

    def new_workspace(self, like: Tensor) -> Tensor | None:
        return like.new_empty(self.workspace, dtype=torch.uint8) if self.workspace else None


# By operator, device and all that decides the parameters; False where inputs must be copied first.
plans: Memo[Plan | bool] = Memo()


def raw_stream(t: Tensor) -> int:
    return torch._C._cuda_getCurrentRawStream(t.get_device())  # a tenth of the time of torch.cuda.current_stream


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]
