"""`python -m benchmarks spectral --report`: what the penalty does to the spectra of the training run's experts.

Figures of the kinds 1B and S2 of the paper (arXiv 2603.01526), on the adapters of `benchmarks train`, trained once
without and once with the penalty.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import mtlora_kernels as mk

from .digits import load_digits
from .results import RESULTS
from .train import QUICK_STEPS, STEPS, deterministic, kernels, train
from .train_report import TrainRun
from .vit import pretrained_backbone

matplotlib.use("Agg")  # no display on the machines this runs on
from matplotlib import pyplot as plt

COEFFICIENT = 0.03  # 200 steps on digits: accuracy as without it, small singular values fall; the paper draws with 1
BAND_NAMES = ("top 20 %", "20 to 50 %", "50 to 100 %")


def _experts(run: TrainRun) -> Tensor:
    """lora_B of all blocks, [L, N, d, r]."""
    return torch.stack([p for name, p in run.parameters.items() if name.endswith("lora_B")])


def _statistics(run: TrainRun) -> dict[str, Tensor]:
    """Mean over layers, or over layers and experts: shares and alignment per band, singular values by index."""
    lora_b = _experts(run)
    _, s, _ = mk.batched_rsvd(lora_b.flatten(0, 1), lora_b.shape[-1])
    alignment = mk.analysis.band_alignment(lora_b).mean(0)
    sizes = torch.tensor([end - first for first, end in mk.analysis.band_edges(lora_b.shape[-1])])
    total = alignment.cpu() * sizes
    return {
        "singular values": mk.analysis.band_shares(lora_b).mean(0).cpu(),
        "alignment": total / total.sum(),
        "spectrum": s.mean(0).cpu(),
        "weight": torch.exp(-s / (s.mean(1, keepdim=True) + 1e-8)).mean(0).cpu(),
    }


def _bars(ax: plt.Axes, groups: dict[str, Tensor], label: str) -> None:
    for i, (name, heights) in enumerate(groups.items()):
        positions = [k + (i - 0.5) * 0.35 for k in range(len(heights))]
        ax.bar_label(ax.bar(positions, heights.tolist(), 0.35, label=name), fmt="%.3g", fontsize=7)
    ax.set_xticks(range(len(BAND_NAMES)), BAND_NAMES)
    ax.set_ylabel(label)
    ax.legend(fontsize="small")


def draw(plain: dict[str, Tensor], penalised: dict[str, Tensor], title: str, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    bands = {f"share of {name}": plain[name] for name in ("singular values", "alignment")}
    _bars(axes[0], bands, "without the penalty")
    index = range(1, len(plain["spectrum"]) + 1)
    for label, statistics in (("without the penalty", plain), ("with it", penalised)):
        axes[1].plot(index, statistics["spectrum"].tolist(), marker="o", label=f"singular value, {label}")
    axes[1].plot(index, plain["weight"].tolist(), marker="s", color="tab:red", label="w(s)")
    axes[1].set_xlabel("index")
    axes[1].legend(fontsize="small")
    change = 100 * (penalised["spectrum"] / plain["spectrum"] - 1)
    axes[2].bar(index, change.tolist())
    axes[2].set_xlabel("index")
    axes[2].set_ylabel("change of the singular value by the penalty, %")
    figure.suptitle(title, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(
    device: torch.device, *, quick: bool = False, impls: Sequence[str] = (), save: bool = True, folder: Path = RESULTS
) -> int:
    impl = impls[0] if impls else kernels(device)
    steps, found = QUICK_STEPS if quick else STEPS, {}
    with deterministic():
        digits = load_digits()
        backbone = pretrained_backbone(digits, device)
        for coefficient in (0.0, COEFFICIENT):
            trained = train(backbone, digits, impl, steps, device, coefficient)
            mean = sum(trained.accuracy.values()) / len(trained.accuracy)
            found[coefficient] = _statistics(trained)
            print(f"\ncoefficient {coefficient}: last loss {trained.losses[-1]:.4f}, mean accuracy {mean:.3f}")
            for name, values in found[coefficient].items():
                print(f"  {name:<18}" + " ".join(f"{v:9.4f}" for v in values.tolist()))
    if save:
        path = folder / "spectral_report.png"
        title = f"{steps} steps on digits, {impl}; mean over layers and experts; coefficient {COEFFICIENT}"
        draw(found[0.0], found[COEFFICIENT], title, path)
        print(f"\ndrawn: {path}")
    return 0
