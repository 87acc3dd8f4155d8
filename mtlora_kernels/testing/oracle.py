"""Independent answers: float64 with loops over tokens, groups and experts, and the published layers.

Neither shares code with the reference. Gradients come from autograd, not from formulas.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Inputs


def _leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Leaves with the values that are computed on: all but residual rounded to the compute dtype."""
    E = inputs.options.get("compute_dtype") or inputs.x.dtype
    leaves = {}
    for name, t in inputs.arguments().items():
        loaded = t.detach() if name == "residual" else t.detach().to(E)
        leaves[name] = loaded.to(dtype or loaded.dtype).requires_grad_()
    return leaves


def _with_gradients(inputs: Inputs, leaves: dict[str, Tensor], out: Tensor, load: Tensor | None) -> dict[str, Tensor]:
    results = {"out": out.detach()}
    outputs, upstream = [out], [inputs.dout.to(out.dtype)]
    if load is not None:
        results["load"] = load.detach()
        outputs, upstream = [out, load], [*upstream, inputs.dload.to(load.dtype)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox 4x32-10 in Python integers."""
    a, b, c, d = counter
    for step in range(10):
        k0, k1 = (key[0] + step * 0x9E3779B9) % 2**32, (key[1] + step * 0xBB67AE85) % 2**32
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ k0, right % 2**32, (left >> 32) ^ d ^ k1, left % 2**32
    return a, b, c, d


def kept(seed: int, tokens: int, features: int, dropout_p: float) -> Tensor:
    """bool [tokens, features]: the dropout mask, one Philox block per four features."""
    key, blocks = (seed % 2**32, seed >> 32), range(-(-features // 4))
    words = [[word for block in blocks for word in philox((block, t, 0, 0), key)] for t in range(tokens)]
    return torch.tensor(words)[:, :features] >= int(dropout_p * 2**32)


def _dropout_factor(inputs: Inputs) -> Tensor | float:
    p = inputs.options.get("dropout_p", 0.0)
    if p == 0:
        return 1.0
    return kept(int(inputs.options["dropout_seed"]), *inputs.x.shape, p).double().to(inputs.x.device) / (1 - p)


def float64_results(inputs: Inputs) -> dict[str, Tensor]:
    """out, load and every gradient in float64, one token, one group, one expert at a time; on the CPU."""
    inputs = inputs.map(lambda t: t.detach().cpu())
    leaves = _leaves(inputs, torch.float64)
    x, lora_a, lora_b = leaves["x"], leaves["lora_a"], leaves["lora_b"]
    groups, scaling = inputs.options["num_groups"], inputs.options["scaling"]
    experts, d_out, _ = lora_b.shape
    # Every weight is cut once: a slice inside the loops would cost autograd a full-size gradient each.
    blocks = [b_i.split(d_out // groups) for b_i in lora_b.unbind()]
    rows = leaves["router"].split(experts) if "router" in leaves else None
    given = leaves["route_weights"].unbind() if "route_weights" in leaves else None
    s = leaves["expert_scale"].unbind() if "expert_scale" in leaves else [1.0] * experts
    branch = (x * _dropout_factor(inputs)).unbind()

    out, load = [], torch.zeros(experts, dtype=torch.float64)
    for t, x_t in enumerate(x.unbind()):
        h = lora_a @ branch[t]
        h = F.relu(h) if inputs.options.get("activation") == "relu" else h
        mixed = []
        for g in range(groups):
            if given is not None:
                pi = given[t][g]
            elif rows is None:
                pi = torch.ones(1, dtype=torch.float64)
            else:
                logits = rows[g] @ x_t
                e = torch.exp(logits - logits.max().detach())
                pi = e / e.sum()
            load = load + pi / (len(x) * groups)
            z = torch.zeros(d_out // groups, dtype=torch.float64)
            for i, pi_i in enumerate(pi.unbind()):
                z = z + pi_i * s[i] * (blocks[i][g] @ h)
            mixed.append(z)
        out.append(scaling * torch.cat(mixed))
    out = torch.stack(out)
    out = out + leaves["residual"] if "residual" in leaves else out
    return _with_gradients(inputs, leaves, out, load if inputs.options["return_load"] else None)


def published_layer(inputs: Inputs) -> dict[str, Tensor]:
    """out and every gradient of the published layers, operator by operator in the dtype of the tensors.

    Block adapters sum the experts from zeros and add the residual stream; component layers
    (accumulate_into_residual) start at the frozen layer's output. AdaptFormer adds relu and expert_scale.
    """
    leaves = _leaves(inputs)
    x, lora_b, options = leaves["x"], leaves["lora_b"], inputs.options
    experts, d_out, _ = lora_b.shape
    factor = _dropout_factor(inputs)
    branch = x if isinstance(factor, float) else x * factor.to(x.dtype)
    hidden = F.linear(branch, leaves["lora_a"])
    if options.get("activation") == "relu":
        hidden = F.relu(hidden)
    if "route_weights" in leaves:
        pi = leaves["route_weights"]
    elif "router" in leaves:
        logits = F.linear(x, leaves["router"]).view(len(x), -1, experts)
        pi = F.softmax(logits, dim=-1, dtype=torch.float32).to(x.dtype)
    else:
        pi = x.new_ones(len(x), 1, experts)
    start_at_residual = options.get("accumulate_into_residual", False)
    result = leaves["residual"] if start_at_residual else x.new_zeros(len(x), d_out)
    for i in range(experts):
        expert = F.linear(hidden, lora_b[i])
        if "expert_scale" in leaves:
            expert = leaves["expert_scale"][i] * expert
        weight = pi[:, :, i].repeat_interleave(d_out // pi.shape[1], dim=-1)
        result = result + weight * expert * options["scaling"]
    if "residual" in leaves and not start_at_residual:
        result = leaves["residual"] + result
    return _with_gradients(inputs, leaves, result, None)


def float64_penalty(lora_b: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The loss and its gradient by LAPACK, loops over layers, experts and pairs, and autograd, in float64."""
    b = lora_b.detach().double().cpu().requires_grad_()
    loss, (layers, experts, _, rank) = b.sum() * 0, b.shape
    for layer in b.unbind():
        weighted = []
        for expert in layer.unbind():
            _, s, vh = torch.linalg.svd(expert.detach(), full_matrices=False)
            w = torch.exp(-s / (s.mean() + 1e-8))
            if kind == "pairwise":
                weighted.append(expert @ vh.T @ torch.diag(w.sqrt()) @ vh)
            else:
                c = expert.detach().norm() / rank**0.5 + 1e-8
                gap = expert.T @ expert - c**2 * torch.eye(rank, dtype=b.dtype)
                loss = loss + (torch.outer(w, w) * gap).square().sum() / (layers * experts)
        for j, second in enumerate(weighted):
            for first in weighted[:j]:
                loss = loss + (first.T @ second).square().sum()
    return loss.detach(), torch.autograd.grad(loss, b)[0]
