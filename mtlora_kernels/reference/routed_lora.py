"""Forward of `routed_lora` in plain PyTorch: the specification that every kernel reproduces bit for bit.

    h   = act(dropout(x) A^T)                                   [T, r]
    pi  = softmax over N of x R^T                               [T, G, N]
    out = residual + scaling * sum_i pi[:, group(o), i] * (B_i h)[o] * s_i

mtLoRA, arXiv 2603.01526, eq. 3 to 6 and its published modules. Tensors arrive flattened and validated:
x [T, d_in], lora_a [r, d_in], lora_b [N, d_out, r], router [G*N, d_in] or route_weights [T, G, N],
residual [T, d_out], expert_scale [N], seed int64 [1]. ``E`` is the compute dtype; ``.to(E)`` marks a rounding.
"""

import torch
from torch import Tensor

from .arithmetic import acc_dtype, arithmetic_for, next_power_of_two, sum_rows, tree_sum, zero_padded
from .philox import keep_mask

GROUP_FORM_MIN_SIZE = 16  # the N dimension of one tensor-core tile: below it, one product per group wastes most of it


def uses_group_form(group_size: int) -> bool:
    """One product z_g B_flat[g] per group, or, for small groups, the sum over experts of pi_i (B_i h)."""
    return group_size >= GROUP_FORM_MIN_SIZE


def output_dtype(residual: Tensor | None, compute_dtype: torch.dtype) -> torch.dtype:
    return compute_dtype if residual is None else torch.promote_types(residual.dtype, compute_dtype)


def inverse_count(tokens: int, num_groups: int) -> float:
    """1 / (T*G), the factor of the mean in `load`; NaN for no tokens, as the mean of nothing is in PyTorch."""
    return 1 / (tokens * num_groups) if tokens else float("nan")


def is_representable(value: float, dtype: torch.dtype) -> bool:
    """Whether the dtype holds value exactly: a product by it rounds once in that dtype, as it does through fp32."""
    return torch.tensor(value, dtype=dtype, device="cpu").item() == value


def dropped(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """dropout(x) in x's dtype."""
    if dropout_p == 0:
        return x
    kept = keep_mask(seed, *x.shape, dropout_p)
    return torch.where(kept, (x.to(acc_dtype(x.dtype)) * (1 / (1 - dropout_p))).to(x.dtype), 0)


def expert_weights(pi: Tensor, expert_scale: Tensor | None) -> Tensor:
    """w [T, G, N] = pi_i s_i, the factor of each expert, in the accumulation dtype."""
    w = pi.to(acc_dtype(pi.dtype))
    return w if expert_scale is None else w * expert_scale.to(pi.dtype).to(w.dtype)


def per_output(w_i: Tensor, group_size: int) -> Tensor:
    """One expert's weights [T, G] spread over the outputs of their groups, [T, d_out]."""
    return w_i.repeat_interleave(group_size, 1)


def padded_rank(v: Tensor) -> Tensor:
    """Zeros after the last dim up to a power of two: a tensor core adds 16 k at once, so padding fixes which 16."""
    return zero_padded(v, -1, next_power_of_two(v.shape[-1]))


def flat_experts(b: Tensor, num_groups: int) -> Tensor:
    """[N, d_out, r] -> B_flat [G, S, N*r], r padded."""
    b = padded_rank(b)
    return b.unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3).flatten(2)


def mixed_h(w: Tensor, h: Tensor) -> Tensor:
    """z [G, T, N*r] = w outer h, rounded to the compute dtype, r padded."""
    z = w[..., None] * padded_rank(h).to(w.dtype)[:, None, None, :]
    return z.to(h.dtype).flatten(2).transpose(0, 1)


def routed_lora_fwd(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    router: Tensor | None,
    route_weights: Tensor | None,
    residual: Tensor | None,
    expert_scale: Tensor | None,
    seed: Tensor | None,
    *,
    scaling: float,
    num_groups: int,
    numerics: str,
    activation: str | None,
    dropout_p: float,
    compute_dtype: torch.dtype,
    accumulate_into_residual: bool,
    return_load: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Returns out [T, d_out], load [N] (or None if not asked for), and for backward h [T, r] and pi [T, G, N]."""
    E, acc = compute_dtype, acc_dtype(compute_dtype)
    arithmetic = arithmetic_for(x.device, E)
    x, a, b = x.to(E), lora_a.to(E), lora_b.to(E)
    tokens, (experts, d_out, _) = x.shape[0], b.shape
    group_size = d_out // num_groups

    h = arithmetic.dot(dropped(x, seed, dropout_p), a.T)
    h = (torch.where(h < 0, 0, h) if activation == "relu" else h).to(E).contiguous()
    if route_weights is not None:
        pi = route_weights.to(E, copy=True)
    elif router is None:
        pi = x.new_ones(tokens, num_groups, experts)
    else:
        logits = arithmetic.dot(x, router.to(E).T).to(E).to(acc).view(tokens, num_groups, experts)
        e = arithmetic.exp(logits - logits.amax(-1, keepdim=True))
        pi = (e / tree_sum(e)[..., None]).to(E)
    load = None
    if return_load:
        load = sum_rows(pi.to(acc).reshape(-1, experts)) * inverse_count(tokens, num_groups)

    out_dtype = output_dtype(residual, E)
    if numerics == "eager":
        sum_dtype = out_dtype if accumulate_into_residual else E
        out = residual.to(sum_dtype) if accumulate_into_residual else x.new_zeros(tokens, d_out)
        for i in range(experts):
            e = arithmetic.dot(h, b[i].T).to(E)
            if expert_scale is not None:
                e = expert_scale.to(E)[i] * e
            t = (per_output(pi[:, :, i], group_size) * e) * scaling
            out = (out.to(acc) + t.to(acc)).to(sum_dtype)
        if residual is not None and not accumulate_into_residual:
            out = (residual.to(acc) + out.to(acc)).to(out_dtype)
        return out, load, h, pi

    w = expert_weights(pi, expert_scale)
    if uses_group_form(group_size):
        mixed = arithmetic.dot(mixed_h(w, h), flat_experts(b, num_groups).mT)
        mixed = mixed.transpose(0, 1).reshape(tokens, d_out)
    else:
        mixed = torch.zeros(tokens, d_out, dtype=acc, device=x.device)
        for i in range(experts):
            mixed = mixed + per_output(w[:, :, i], group_size) * arithmetic.dot(h, b[i].T)
    out = mixed * scaling
    return (out if residual is None else residual.to(acc) + out).to(out_dtype), load, h, pi
