"""`python -m benchmarks accuracy`: error against float64 of routed_lora and of the published-style layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from .checks import RESULT_NAMES
from .registry import EXPERT_LOOP, Contender, default_impls, routed_lora
from .results import ACCURACY_FIELDS, RESULTS, append, provenance
from .shapes import Inputs, Shape, make_inputs, shape_table

# d(residual) is the upstream gradient itself, exact everywhere.
COMPARED = RESULT_NAMES[:-1]
# The published layer's sums run in whatever order cuBLAS picks: two such orders differ by less than this.
SAME_ERROR = 1.02


@dataclass(frozen=True)
class Error:
    """max: largest absolute difference. relative: norm of the difference over the norm of the exact result."""

    max: float
    relative: float


def run(
    device: torch.device,
    *,
    quick: bool = False,
    impls: Sequence[str] = (),
    shapes: str = "*",
    numerics: Sequence[str] = ("fp32", "eager"),
    save: bool = True,
    folder: Path = RESULTS,
) -> int:
    """Exit status 0, or 1 if an error of routed_lora is larger than the published-style layer's."""
    rows, larger = [], 0
    for shape in shape_table(device, quick):
        if not fnmatch(shape.name, shapes):
            continue
        inputs = make_inputs(shape, device)
        exact = _results(EXPERT_LOOP, shape, inputs.to(torch.float64))
        published = _errors(EXPERT_LOOP, shape, inputs, exact)
        print(f"\n{shape.name}  relative error (ratio to the {EXPERT_LOOP.name}'s)", flush=True)
        rows += _report(EXPERT_LOOP, shape, published, published)
        for contender in (routed_lora(impl, kind) for impl in impls or default_impls(device) for kind in numerics):
            try:
                ours = _errors(contender, shape, inputs, exact)
            except ValueError as reason:  # impl does not serve the call
                print(f"  {contender.name:<32}skipped: {reason}")
                continue
            rows += _report(contender, shape, ours, published)
            larger += sum(ours[name].relative > published[name].relative * SAME_ERROR for name in ours)
    if save:
        append(folder / "accuracy.csv", ACCURACY_FIELDS, (provenance(device) | row for row in rows))
    print(f"\n{larger} errors are larger than the {EXPERT_LOOP.name}'s")
    return int(larger > 0)


def _results(contender: Contender, shape: Shape, inputs: Inputs) -> dict[str, Tensor]:
    if not shape.backward:
        return {"out": contender.forward(inputs)}
    out, *grads = contender.forward_backward(inputs)
    if contender.by_expert:
        grads[1:-2] = [grads[1], torch.stack(grads[2:-2])]
    return dict(zip(COMPARED, (out.detach(), *grads), strict=False))


def _errors(contender: Contender, shape: Shape, inputs: Inputs, exact: dict[str, Tensor]) -> dict[str, Error]:
    errors = {}
    for name, value in _results(contender, shape, inputs).items():
        gap = value.double() - exact[name]
        errors[name] = Error(float(gap.abs().max()), float(gap.norm() / exact[name].norm()))
    return errors


def _report(contender: Contender, shape: Shape, errors: dict[str, Error], published: dict[str, Error]) -> list[dict]:
    ratios = {name: errors[name].relative / published[name].relative for name in errors}
    cells = (f"{name} {error.relative:.2e} ({ratios[name]:.3f})" for name, error in errors.items())
    print(f"  {contender.name:<32}{'  '.join(cells)}", flush=True)
    return [
        {
            "shape": shape.name,
            "contender": contender.name,
            "impl": contender.impl,
            "numerics": contender.numerics,
            "result": name,
            "max_error": f"{error.max:.4g}",
            "relative_error": f"{error.relative:.4g}",
            "ratio_to_published": f"{ratios[name]:.4f}",
        }
        for name, error in errors.items()
    ]
