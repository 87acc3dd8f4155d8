"""Who returns what on matrices that break decompositions, against float64 LAPACK."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlora_kernels.testing import trap_matrices

from .results import PROVENANCE
from .spectral_contenders import Contender, decompositions

ACCURACY_FIELDS = (
    *PROVENANCE, "matrix", "shape", "contender", "impl", "singular_values", "u_orthonormal", "v_orthonormal",
    "reconstruction",
)  # fmt: skip


def _errors(contender: Contender, a: Tensor) -> dict[str, str]:
    """Against float64 LAPACK, each relative to the largest singular value; "nan" where a factor is not finite."""
    rank = min(a.shape[1:])
    try:
        u, s, vh = (factor.double().cpu() for factor in contender.call(a, rank))
    except RuntimeError as error:  # rivals give up on some of these
        return dict.fromkeys(ACCURACY_FIELDS[-4:], type(error).__name__)
    a = a.double().cpu()
    expected, eye = torch.linalg.svdvals(a), torch.eye(rank, dtype=torch.float64)
    largest = expected[:, :1].clamp(min=1e-300)
    found = (
        ((s - expected).abs() / largest).max(),
        (u.mT @ u - eye).abs().max(),
        (vh @ vh.mT - eye).abs().max(),
        ((a - (u * s[:, None]) @ vh).abs().amax((1, 2)) / largest[:, 0]).max(),
    )
    return {name: f"{error:.2g}" for name, error in zip(ACCURACY_FIELDS[-4:], found, strict=True)}


def accuracy(device: torch.device, impls: Sequence[str], source: dict[str, str]) -> list[dict]:
    rows, shape = [], (3, 512, 16)
    print(f"\n{'matrix':<18}{'contender':<28}" + "".join(f"{name:>18}" for name in ACCURACY_FIELDS[-4:]))
    for name, a in trap_matrices(*shape, device).items():
        for contender in (c for c in decompositions(device, impls) if not c.in_graph):
            errors = _errors(contender, a)
            rows.append(source | {"matrix": name, "shape": "x".join(map(str, shape))} | errors)
            rows[-1] |= {"contender": contender.name, "impl": contender.impl}
            print(f"{name:<18}{contender.name:<28}" + "".join(f"{e:>18}" for e in errors.values()), flush=True)
    return rows
