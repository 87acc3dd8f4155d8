"""What a training run leaves behind, printed and saved."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from .digits import TASKS
from .results import LOSS_FIELDS, TRAIN_FIELDS, append
from .timing import Timing


@dataclass(frozen=True)
class TrainRun:
    """One run: losses are exact, parameters are the trained ones, accuracy is per task on unseen images."""

    impl: str
    losses: list[float]
    parameters: dict[str, Tensor]
    accuracy: dict[str, float]
    step: Timing


def difference(reference: TrainRun, other: TrainRun) -> str | None:
    """The first thing that is not equal bit for bit, or None."""
    for step, (expected, loss) in enumerate(zip(reference.losses, other.losses, strict=True), 1):
        if loss != expected:
            return f"loss of step {step} is {loss!r}, the reference has {expected!r}"
    for name, expected in reference.parameters.items():
        if not torch.equal(other.parameters[name], expected):
            return f"{name} differs after the last step"
    return None


def verdict(reference: TrainRun, other: TrainRun) -> str:
    ours, theirs = other.step.p50 / 1e3, reference.step.p50 / 1e3
    return (
        f"{len(other.losses)} losses and every trained parameter equal the reference's bit for bit; "
        f"a step takes {ours:.2f} ms, with the reference {theirs:.2f} ms ({theirs / ours:.1f} x)"
    )


def cost(plain: TrainRun, penalised: TrainRun) -> str:
    extra, step = penalised.step.p50 - plain.step.p50, plain.step.p50
    return f"{penalised.impl}: {extra / 1e3:.2f} ms more than the {step / 1e3:.2f} ms of a step: {extra / step:.1%}"


def print_table(runs: list[TrainRun]) -> None:
    columns = "".join(f"{run.impl:>24}" for run in runs)
    print(f"\n{'step':<18}{columns}")
    steps = len(runs[0].losses)
    for step in sorted({1, steps, *range(max(1, steps // 10), steps + 1, max(1, steps // 10))}):
        print(f"{step:<18}" + "".join(f"{run.losses[step - 1]:>24.17g}" for run in runs))
    print(f"\n{'test accuracy':<18}{columns}")
    for task in TASKS:
        print(f"{task:<18}" + "".join(f"{run.accuracy[task]:>24.3f}" for run in runs))
    print()


def save_runs(runs: list[TrainRun], source: dict[str, str], model: str, folder: Path) -> None:
    source = {**source, "model": model}
    rows = [_row(run, source) for run in runs]
    append(folder / "train.csv", TRAIN_FIELDS, rows)
    losses = [
        {**source, "impl": run.impl, "step": step, "loss": repr(loss)}
        for run in runs
        for step, loss in enumerate(run.losses, 1)
    ]
    append(folder / "train_loss.csv", LOSS_FIELDS, losses)
    print(f"rows appended to {folder / 'train.csv'} and {folder / 'train_loss.csv'}")
    if find_spec("matplotlib"):
        from .plots import draw_train_loss

        print(f"drawn: {draw_train_loss(folder)}")


def _row(run: TrainRun, source: dict[str, str]) -> dict:
    mean = sum(run.accuracy.values()) / len(run.accuracy)
    return {
        **source,
        "impl": run.impl,
        "steps": len(run.losses),
        "p20_us": f"{run.step.p20:.1f}",
        "p50_us": f"{run.step.p50:.1f}",
        "p80_us": f"{run.step.p80:.1f}",
        "loss_first": repr(run.losses[0]),
        "loss_last": repr(run.losses[-1]),
        "mean_accuracy": f"{mean:.4f}",
        "accuracy": " ".join(f"{task}={value:.3f}" for task, value in run.accuracy.items()),
    }
