"""The contenders: every implementation of routed_lora and its rivals, behind one call signature."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import mtlora_kernels as mk

from . import rivals
from .shapes import Inputs

PACKAGE = "mtlora_kernels"


@dataclass(frozen=True)
class Contender:
    """A forward function of Inputs. impl and numerics are empty for rivals, whose bits are not specified."""

    name: str
    forward: Callable[[Inputs], Tensor]
    impl: str = ""
    numerics: str = ""
    compiled: bool = False
    by_expert: bool = False

    def forward_backward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """out and the gradients of x, A, B, R, residual.

        Gradients are returned, as in the middle of a network, not accumulated into .grad: x and residual are
        activations there, and accumulating would add a copy of the residual's gradient to every contender.
        """
        out = self.forward(inputs)
        leaves = inputs.leaves_by_expert if self.by_expert else inputs.leaves
        return out, *torch.autograd.grad(out, leaves, inputs.grad_out)

    def call(self, inputs: Inputs, measure: str) -> Callable[[], object]:
        """What is timed for "forward" or "forward+backward"; forward alone also saves for backward."""
        if measure == "forward":
            return lambda: self.forward(inputs)
        return lambda: self.forward_backward(inputs)


def routed_lora(impl: str, numerics: str) -> Contender:
    def forward(inputs: Inputs) -> Tensor:
        return mk.routed_lora(
            inputs.x,
            inputs.lora_a,
            inputs.lora_b,
            inputs.router,
            inputs.residual,
            scaling=inputs.scaling,
            num_groups=inputs.groups,
            numerics=numerics,
            impl=impl,
        )

    return Contender(f"{PACKAGE} {impl} {numerics}", forward, impl, numerics)


EXPERT_LOOP = Contender("expert loop", rivals.expert_loop, by_expert=True)
GROUP_PRODUCT = Contender("group product", rivals.group_product)


def compiled(rival: Contender) -> Contender:
    forward = torch.compile(rival.forward, dynamic=False)
    return Contender(f"{rival.name} compiled", forward, compiled=True, by_expert=rival.by_expert)


def default_impls(device: torch.device) -> tuple[str, ...]:
    """Every implementation on this device but the reference, which is a specification and slow by design."""
    available = mk.available_impls(device)
    return tuple(impl for impl in available if impl != "reference") or available


def contenders(impls: Sequence[str], numerics: Sequence[str], with_compile: bool) -> list[Contender]:
    """Rivals first: the rows of routed_lora are printed with their ratio to each of them."""
    plain = [EXPERT_LOOP, GROUP_PRODUCT]
    return [
        *plain,
        *([compiled(rival) for rival in plain] if with_compile else []),
        *(routed_lora(impl, kind) for impl in impls for kind in numerics),
    ]
