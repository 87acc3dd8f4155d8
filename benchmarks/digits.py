"""Fifteen ten-way classification tasks from scikit-learn's handwritten digits (1797 real images, 8x8)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TRAIN_IMAGES = 1500
SHUFFLE = torch.randperm(64, generator=torch.Generator().manual_seed(0))


def _hidden(rows: slice, columns: slice) -> Callable[[Tensor], Tensor]:
    def hide(images: Tensor) -> Tensor:
        images = images.clone()
        images[:, rows, columns] = 0
        return images

    return hide


# One task per fixed transform of the image [n, 8, 8]; one set of adapters has to serve them all.
TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda v: v,
    "rotate_90": lambda v: v.rot90(1, (1, 2)),
    "rotate_180": lambda v: v.rot90(2, (1, 2)),
    "rotate_270": lambda v: v.rot90(3, (1, 2)),
    "flip_horizontal": lambda v: v.flip(2),
    "flip_vertical": lambda v: v.flip(1),
    "transpose": lambda v: v.transpose(1, 2),
    "anti_transpose": lambda v: v.transpose(1, 2).flip(1, 2),
    "negative": lambda v: 1 - v,
    "binarize": lambda v: (v > 0.5).float(),
    "shift_right": lambda v: v.roll(3, 2),
    "shift_down": lambda v: v.roll(3, 1),
    "hide_left": _hidden(slice(None), slice(0, 3)),
    "hide_bottom": _hidden(slice(5, None), slice(None)),
    "shuffle_pixels": lambda v: v.flatten(1)[:, SHUFFLE].view_as(v),
}


@dataclass(frozen=True)
class Digits:
    """images [n, 8, 8] in [0, 1] and labels [n], shuffled once and split."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise SystemExit("the train benchmark needs scikit-learn: pip install mtlora_kernels[bench]") from error
    raw = datasets.load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32) / 16
    labels = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    n = TRAIN_IMAGES
    return Digits(images[:n], labels[:n], images[n:], labels[n:])


def all_tasks(images: Tensor) -> Tensor:
    """The same images under every task, [tasks, n, 8, 8]."""
    return torch.stack([transform(images) for transform in TASKS.values()])


def task_batch(digits: Digits, per_task: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Fresh images for each task: [tasks, per_task, 8, 8] and labels [tasks, per_task]."""
    chosen = torch.randint(TRAIN_IMAGES, (len(TASKS), per_task), generator=generator)
    pairs = zip(TASKS.values(), chosen, strict=True)
    images = torch.stack([transform(digits.train_images[index]) for transform, index in pairs])
    return images, digits.train_labels[chosen]
