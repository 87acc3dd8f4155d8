"""Public spectral functions: validate, bring into operator shapes, choose the implementation, call the operators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import spectral_eager
from .requirements import require_int
from .spectral_dispatch import resolve_spectral
from .spectral_inputs import KINDS, Layers, layer_stacks, sketch_size, stacked_matrices


def batched_rsvd(
    matrices: Tensor | Sequence[Tensor],
    rank: int,
    *,
    oversampling: int = 8,
    power_iterations: int = 1,
    seed: int = 0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular values and their vectors of many small matrices, A = U diag(S) Vh.

    Randomized range finder (Halko, Martinsson, Tropp 2011) on the Gram matrix of the shorter side in fp64, exact
    when rank + oversampling >= min(m, n): there S is within 1e-6 of the largest singular value of LAPACK's, U and
    Vh are orthonormal within 1e-5 also where singular values are zero. Deterministic; a matrix's result depends
    neither on its batch nor on its place in it. Of the factor on the shorter side (Vh if m >= n) each vector's
    largest element, the first among equals, is positive.

    Args:
        matrices: [batch, m, n], or a sequence of matrices [m, n] of one shape (stacked on every call). float32,
            bfloat16 or float16; any strides; min(m, n) <= 256.
        rank: number of singular values kept, 1 ... min(m, n).
        oversampling: further directions that the sketch follows; min(rank + oversampling, m, n) <= 64.
        power_iterations: products with A^T A, re-orthonormalised, after the first; each sharpens the range by the
            square of the singular values' ratio. Unused in the exact case.
        seed: key of the sketch, and of the vectors that complete U where singular values are zero.
        impl: None, or a name of `available_spectral_impls`: that one or an error.

    Returns:
        u [batch, m, rank], s [batch, rank] descending, vh [batch, rank, n], in float32. A matrix with a NaN or Inf
        gives NaN in all three, alone.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Nothing was launched.
        RuntimeError: on differentiation.
    """
    a = stacked_matrices(matrices)
    sketch = sketch_size(a, rank, oversampling, power_iterations, seed)
    wide = a.shape[1] < a.shape[2]
    tall = a.mT.contiguous() if wide else a  # kernels read rows, twice
    impl = resolve_spectral(impl, a.device)
    u, s, v = torch.ops.mtlora_kernels.batched_rsvd(tall, rank, sketch, power_iterations, seed, impl)
    return (v, s, u.mT) if wide else (u, s, v.mT)


class SpectralWeights:
    """Keeps the weights of `spectral_penalty` between calls, as the paper does between epochs.

    weights = SpectralWeights(refresh_every=100), then spectral_penalty(lora_b, weights=weights) in every step: the
    singular values and vectors are computed on calls 0, 100, 200, ... and in between are those of the last time.
    One object serves one set of layers. The count is Python's: a CUDA graph replays what it captured.
    """

    def __init__(self, refresh_every: int = 1) -> None:
        require_int("refresh_every", refresh_every, 1)
        self.refresh_every, self.calls = refresh_every, 0
        self._key, self._held = None, ()

    def of(self, stacks: Sequence[Tensor], kind: str, impl: str | None) -> Sequence[Tensor]:
        """One tensor of weights per layer stack [L, N, d, r], computed or kept."""
        key = (kind, *((tuple(b.shape), b.dtype, b.device) for b in stacks))
        if self._key not in (None, key):
            raise ValueError("weights holds those of other layers or of another kind, each set needs its own object")
        if self.calls % self.refresh_every == 0:
            self._key, self._held = key, compute_weights(stacks, kind, impl)
        self.calls += 1
        return self._held


def compute_weights(stacks: Sequence[Tensor], kind: str, impl: str | None) -> list[Tensor]:
    """M_i = V diag(sqrt(w)) V^T [L, N, r, r] ("pairwise") or w [L, N, r] ("gram") of each stack, constants."""
    return [spectral_eager.weights(b.detach(), kind, resolve_spectral(impl, b.device)) for b in stacks]


def spectral_penalty(
    lora_b: Layers, *, kind: str = "pairwise", weights: SpectralWeights | None = None, impl: str | None = None
) -> Tensor:
    """mtLoRA's spectral regularisation of the experts B_i, an fp32 scalar on their device (arXiv 2603.01526).

    With w(s) = exp(-s / (mean s + 1e-8)) of each B_i = U diag(s) V^T, small where the singular value is large:

    "pairwise"  the paper's eq. 2: the sum over layers and pairs i < j of ||B'_i^T B'_j||_F^2, where
                B'_i = U diag(sqrt(w) s) V^T = B_i M_i. Shared directions stay, small ones become orthogonal.
    "gram"      the published trainer's form: the mean over all matrices of ||(w w^T) * (B^T B - c^2 I)||_F^2 with
                c = ||B||_F / sqrt(r) + 1e-8. As published, w is in order of descending s while B^T B is in the
                order of the parameter's columns; every matrix counts, none are sampled.

    w, M_i and c are constants: no gradient flows through the decomposition. All-zero experts, the published initial
    value, give the loss 0 (about 1e-31 for "gram") and a gradient of exact zeros.

    Args:
        lora_b: one layer [N, d, r], a stack [L, N, d, r], a sequence of layers (each [N, d, r] or a sequence of N
            matrices [d, r]; widths may differ), or a module, whose adapters are found by the published parameter
            names. float32, bfloat16 or float16; r <= 64. Separate tensors are stacked on every call.
        kind: "pairwise" or "gram".
        weights: keeps w between calls; None computes it on every call.
        impl: None, or a name of `available_spectral_impls`: that one or an error.

    Returns:
        The loss. Its gradient has each tensor's dtype. The kernels do not synchronise with the host and can be
        captured in a CUDA graph; the reference looks at its convergence.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it. Nothing was launched.
        RuntimeError: on a second derivative.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, it must be one of {KINDS}")
    if weights is not None and not isinstance(weights, SpectralWeights):
        raise TypeError(f"weights is {type(weights).__name__}, it must be a SpectralWeights or None")
    stacks = layer_stacks(lora_b)
    held = compute_weights(stacks, kind, impl) if weights is None else weights.of(stacks, kind, impl)
    total = sum(len(b) * b.shape[1] for b in stacks)
    loss = None
    for b, w in zip(stacks, held, strict=True):
        part = spectral_eager.penalty(b, w, kind, resolve_spectral(impl, b.device))
        if kind == "gram" and len(stacks) > 1:
            part = part * (len(b) * b.shape[1] / total)
        loss = part if loss is None else loss + part.to(loss.device)
    return loss
