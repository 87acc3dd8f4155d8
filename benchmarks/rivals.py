"""What routed_lora is compared with: the same layer written in PyTorch, differentiated by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import Inputs

SMALL_GROUP = 16  # below this one product per group is mostly padding, so all experts share one product


def _routing(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """h [T, r] and pi [T, G, N]."""
    x, n = inputs.x, inputs.lora_b.shape[0]
    logits = F.linear(x, inputs.router).view(-1, inputs.groups, n)
    pi = torch.softmax(logits, -1, dtype=torch.promote_types(x.dtype, torch.float32))
    return F.linear(x, inputs.lora_a), pi.to(x.dtype)


def expert_loop(inputs: Inputs) -> Tensor:
    """One expert after another, each a full [T, d] tensor, as published layers compute it."""
    h, pi = _routing(inputs)
    group_size = inputs.residual.shape[1] // inputs.groups
    mixture = torch.zeros_like(inputs.residual)
    for i, expert in enumerate(inputs.experts):
        weight = pi[:, :, i].repeat_interleave(group_size, 1)
        mixture = mixture + weight * F.linear(h, expert) * inputs.scaling
    return inputs.residual + mixture


def group_product(inputs: Inputs) -> Tensor:
    """The mixture as one product per group, (pi_g outer h) B_flat[g]: the best form without a kernel."""
    h, pi = _routing(inputs)
    b, groups = inputs.lora_b, inputs.groups
    n, d, r = b.shape
    if d // groups < SMALL_GROUP:
        return inputs.residual + inputs.scaling * _all_expert_product(h, pi, b)
    b_flat = b.view(n, groups, -1, r).permute(1, 0, 3, 2).reshape(groups, n * r, -1)
    z = (pi.unsqueeze(-1) * h[:, None, None, :]).flatten(2)
    mixture = torch.bmm(z.transpose(0, 1), b_flat).transpose(0, 1).reshape(-1, d)
    return inputs.residual + inputs.scaling * mixture


def _all_expert_product(h: Tensor, pi: Tensor, b: Tensor) -> Tensor:
    n, d, _ = b.shape
    groups = pi.shape[1]
    outputs = F.linear(h, b.flatten(0, 1)).view(-1, n, groups, d // groups)
    return (outputs * pi.transpose(1, 2).unsqueeze(-1)).sum(1).view(-1, d)
