"""One input of the spectral operators, one question: as `checks.py`, and against LAPACK."""

import torch
from torch import Tensor

from ..spectral import batched_rsvd, spectral_penalty
from .compare import differences
from .oracle import float64_penalty
from .spectral_inputs import Adapters, Matrices


def factors(impl: str, inputs: Matrices) -> dict[str, Tensor]:
    return dict(zip("usv", batched_rsvd(inputs.a, **inputs.options, impl=impl), strict=True))


def penalty_results(impl: str | None, inputs: Adapters) -> dict[str, Tensor]:
    """loss and dlora_b for an upstream gradient that is not 1."""
    leaf = inputs.lora_b.detach().requires_grad_()
    loss = spectral_penalty(leaf, **inputs.options, impl=impl)
    (grad,) = torch.autograd.grad(loss * 1.7, leaf)
    return {"loss": loss.detach(), "dlora_b": grad}


def _beyond(errors: dict[str, tuple[Tensor | float, float]]) -> list[str]:
    """One message for each error that is not within its limit; NaN is not."""
    return [f"{name} is {float(e):.3g}, limit {limit:.3g}" for name, (e, limit) in errors.items() if not e <= limit]


def rsvd_against_reference(impl: str, inputs: Matrices) -> list[str]:
    return differences(factors(impl, inputs), factors("reference", inputs))


def rsvd_against_lapack(impl: str, inputs: Matrices) -> list[str]:
    """The exact case against float64 LAPACK, and orthonormal factors also in the null space."""
    u, s, vh = (factor.double().cpu() for factor in factors(impl, inputs).values())
    a = inputs.a.double().cpu()
    expected = torch.linalg.svdvals(a)
    largest = expected[:, 0].clamp(min=1e-300)
    eye = torch.eye(s.shape[1], dtype=torch.float64)
    rest = torch.linalg.matrix_norm(a - (u * s[:, None]) @ vh, 2)
    return _beyond(
        {
            "singular values": (((s - expected).abs().amax(1) / largest).max(), 1e-6),
            "U^T U - I": (torch.linalg.matrix_norm(u.mT @ u - eye, 2).max(), 1e-5),
            "V^T V - I": (torch.linalg.matrix_norm(vh @ vh.mT - eye, 2).max(), 1e-5),
            "A - U S V": ((rest / largest).max(), 1e-5),
        }
    )


def rsvd_against_best(impl: str, inputs: Matrices, *, allowed: float) -> list[str]:
    """A truncated decomposition: the Frobenius error over that of the best one of its rank, and its factors."""
    u, s, vh = (factor.double().cpu() for factor in factors(impl, inputs).values())
    a, rank = inputs.a.double().cpu(), inputs.options["rank"]
    best = torch.linalg.svdvals(a)[:, rank:].square().sum(1).sqrt()
    eye = torch.eye(rank, dtype=torch.float64)
    error = torch.linalg.matrix_norm(a - (u * s[:, None]) @ vh)
    return _beyond(
        {
            "error over the best": ((error / best).max(), allowed),
            "U^T U - I": (torch.linalg.matrix_norm(u.mT @ u - eye, 2).max(), 1e-5),
            "V^T V - I": (torch.linalg.matrix_norm(vh @ vh.mT - eye, 2).max(), 1e-5),
        }
    )


def rsvd_alone(impl: str, inputs: Matrices) -> list[str]:
    """Each matrix, one of them NaN, gives in a batch the bits it gives alone; only the NaN one is NaN."""
    a = inputs.a.clone()
    a[1, 0, 0] = torch.nan
    together = factors(impl, Matrices(a, inputs.options))
    messages = []
    for i in range(len(a)):
        alone = factors(impl, Matrices(a[i : i + 1], inputs.options))
        expected = {name: factor[i : i + 1] for name, factor in together.items()}
        messages += [f"matrix {i}: {message}" for message in differences(alone, expected)]
        wrong = [name for name, factor in alone.items() if factor.isnan().any() != (i == 1)]
        messages += [f"matrix {i}: {name} is NaN or should be" for name in wrong]
    return messages


def penalty_against_reference(impl: str, inputs: Adapters) -> list[str]:
    return differences(penalty_results(impl, inputs), penalty_results("reference", inputs))


def penalty_against_float64(impl: str, inputs: Adapters) -> list[str]:
    """Within a few roundings of the storage dtype; exactly zero gradients and about zero loss for zero experts."""
    results = penalty_results(impl, inputs)
    loss, grad = float64_penalty(inputs.lora_b, inputs.options["kind"])
    eps = torch.finfo(inputs.lora_b.dtype).eps
    if not inputs.lora_b.any():
        return _beyond({"loss": (results["loss"].abs(), 1e-30), "dlora_b": (results["dlora_b"].abs().max(), 0.0)})
    error = torch.linalg.vector_norm(results["dlora_b"].double().cpu() - 1.7 * grad)
    return _beyond(
        {
            "loss, relative": ((results["loss"].double().cpu() - loss).abs() / loss, max(4 * eps, 1e-5)),
            "dlora_b, relative": (error / torch.linalg.vector_norm(1.7 * grad), max(4 * eps, 1e-5)),
        }
    )


def penalty_replayed(impl: str, inputs: Adapters) -> list[str]:
    """A CUDA graph of forward and backward, replayed on other values, gives the bits of eager calls."""
    expected = penalty_results(impl, inputs)
    static = Adapters(torch.zeros_like(inputs.lora_b), inputs.options)
    penalty_results(impl, static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = penalty_results(impl, static)
    static.lora_b.copy_(inputs.lora_b)
    graph.replay()
    return differences(results, expected)
