"""One check to be run, and one that was."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Check:
    kind: str
    shape: Sequence[int]  # sizes, as make takes them
    dtype: torch.dtype
    options: dict  # of the maker and of the operator
    make: Callable[..., object]
    run: Callable[[str, object], list[str]]
    note: dict = field(default_factory=dict)

    def label(self) -> str:
        given = {"dtype": self.dtype} | self.options | self.note
        values = {name: str(value).removeprefix("torch.") for name, value in given.items()}
        return f"{','.join(map(str, self.shape))} " + " ".join(f"{name}={value}" for name, value in values.items())


@dataclass
class Row:
    """One check: mismatches is empty when every output and gradient agrees to the last bit."""

    device: str
    impl: str
    kind: str
    case: str
    mismatches: list[str]
    seconds: float
