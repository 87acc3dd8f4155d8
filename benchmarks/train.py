"""`python -m benchmarks train`: the same training run on the reference and on the kernels.

Fifteen tasks made of real images, one shared set of block adapters, one seed. The losses have to be equal bit
for bit at every step; that, not a tolerance, is what the exit status says.
"""

import copy
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

import mtlora_kernels as mk

from .digits import TASKS, Digits, all_tasks, load_digits, task_batch
from .registry import default_impls
from .results import RESULTS, provenance
from .timing import quantiles, synchronize
from .train_report import TrainRun, cost, difference, print_table, save_runs, verdict
from .vit import BASE, SIZES, TINY, DigitTransformer, MultiTask, pretrained_backbone

STEPS, QUICK_STEPS = 200, 50
PRINT_EVERY_S = 5.0


def kernels(device: torch.device) -> str:
    """The fastest implementation of fp32 adapters: the CUDA kernels take 16-bit elements."""
    return [impl for impl in default_impls(device) if impl != "cuda"][-1]


@contextmanager
def deterministic() -> Iterator[None]:
    """Fixed orders in the rest of the model, so that a difference can only come from the adapters."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def train(
    backbone: DigitTransformer, digits: Digits, impl: str, steps: int, device: torch.device, spectral: float = 0.0
) -> TrainRun:
    """spectral is the factor of the spectral penalty of all adapters, which 0 leaves out."""
    return together([stepwise(backbone, digits, impl, steps, device, spectral)])[0]


def together(runs: Sequence[Generator[None, None, TrainRun]]) -> list[TrainRun]:
    """All runs step by step in turn: a machine that slows down slows each of them."""
    finished: dict[int, TrainRun] = {}
    while len(finished) < len(runs):
        for i, run in enumerate(runs):
            if i not in finished:
                try:
                    next(run)
                except StopIteration as stop:
                    finished[i] = stop.value
    return [finished[i] for i in range(len(runs))]


def stepwise(
    backbone: DigitTransformer, digits: Digits, impl: str, steps: int, device: torch.device, spectral: float
) -> Generator[None, None, TrainRun]:
    """`train`, yielding after every step."""
    torch.manual_seed(1)
    model = MultiTask(copy.deepcopy(backbone), impl).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=backbone.size.lr)
    generator = torch.Generator().manual_seed(2)
    losses, step_us, last_print = [], [], time.perf_counter()
    for step in range(1, steps + 1):
        images, labels = (t.to(device) for t in task_batch(digits, backbone.size.images_per_task, generator))
        synchronize(device)
        start = time.perf_counter()
        loss = F.cross_entropy(model(images).flatten(0, 1), labels.flatten())
        if spectral:
            loss = loss + spectral * mk.spectral_penalty(model.backbone, impl=impl if impl == "reference" else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        synchronize(device)
        now = time.perf_counter()
        step_us.append(1e6 * (now - start))
        if now - last_print > PRINT_EVERY_S:
            print(f"  {impl}: step {step} of {steps}, loss {losses[-1]:.4f}", flush=True)
            last_print = now
        yield
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    label = f"{impl}, spectral penalty" if spectral else impl
    return TrainRun(label, losses, parameters, _accuracy(model, digits, device), quantiles(step_us[1:] or step_us))


@torch.no_grad()
def _accuracy(model: MultiTask, digits: Digits, device: torch.device) -> dict[str, float]:
    model.eval()
    right = model(all_tasks(digits.test_images).to(device)).argmax(-1).cpu() == digits.test_labels
    return dict(zip(TASKS, right.float().mean(1).tolist(), strict=True))


def run(
    device: torch.device,
    *,
    quick: bool = False,
    impls: Sequence[str] = (),
    steps: int | None = None,
    size: str | None = None,
    spectral: float = 0.0,
    save: bool = True,
    folder: Path = RESULTS,
) -> int:
    """Exit status 0, or 1 if a run differed from the reference's. With the penalty, the kernels also train without.

    size is a name of SIZES, by default tiny on a CPU or if quick, else base.
    """
    model = SIZES[size] if size else TINY if quick or device.type == "cpu" else BASE
    steps = steps or (QUICK_STEPS if quick else STEPS)
    source = provenance(device)
    print("  ".join(f"{key} {value}" for key, value in source.items() if value))
    with deterministic():
        digits = load_digits()
        backbone = pretrained_backbone(digits, device, model)
        names = ("reference", *(impls or (kernels(device),)))
        asked = [(impl, spectral) for impl in names] + ([(names[-1], 0.0)] if spectral else [])
        runs = together([stepwise(backbone, digits, impl, steps, device, factor) for impl, factor in asked])
    print_table(runs)
    status = 0
    for other in runs[1 : len(names)]:
        wrong = difference(runs[0], other)
        status |= wrong is not None
        print(f"{other.impl}: {f'DIFFERS FROM THE REFERENCE, {wrong}' if wrong else verdict(runs[0], other)}")
    if spectral:
        print(cost(runs[-1], runs[-2]))
    if save:
        save_runs(runs, source, model.name, folder)
    return status
