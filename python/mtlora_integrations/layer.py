"""What every swapped layer has in common: its class, its experts' storage, the call, terms that wait for a rerun."""

import warnings
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import mtlora_kernels as mk

from .experts import separate, share


class SwappedLayer:
    """Stands before a host's class in the class of a swapped instance and overrides its forward.

    The instance keeps its attributes, parameters, hooks and isinstance. Settings are class attributes, so that
    nothing is added to what is copied or pickled. A subclass per kind of host layer gives `host_names`,
    `operands`, `expert_lists` and `forward`.
    """

    host_names: ClassVar[tuple[str, ...]]  # classes whose forward it replaces, by name: hosts are never imported
    host: ClassVar[type[nn.Module]]
    numerics: ClassVar[str] = "fp32"
    impl: ClassVar[str | None] = None
    strict: ClassVar[bool] = False
    settings: ClassVar[tuple]  # what made this class, see `swapped_class`

    # Set for one backward: gradients of loss terms that reach the layer when a reentrant checkpoint reruns it.
    balance_grad: Tensor | None = None
    experts_grad: Tensor | None = None
    reruns: bool = False  # the last forward ran without gradients in training: a checkpoint will run it again

    @staticmethod
    def fits(layer: Any) -> bool:
        """Whether a layer with one of the names has this kind's attributes."""
        raise NotImplementedError

    @staticmethod
    def operands(layer: Any) -> dict[str, Any]:
        """Arguments of `mk.routed_lora` that say the layer's shapes."""
        raise NotImplementedError

    @staticmethod
    def expert_lists(layer: Any) -> list[list[nn.Parameter]]:
        """Parameters to keep in one storage."""
        raise NotImplementedError

    @staticmethod
    def note(layer: Any) -> str:
        """What the report adds: in what it differs from the host, what it costs."""
        return ""

    def mixture(
        self, x: Tensor, lora_a: Tensor, lora_b: Tensor, *, dtype: torch.dtype, balance: bool = False, **options: Any
    ) -> Tensor:
        """`routed_lora` with the layer's settings; `last_blc` as the host's trainers expect it."""
        options |= {"numerics": self.numerics, "compute_dtype": dtype, "impl": self.impl}
        result = mk.routed_lora(x, lora_a, lora_b, return_load=balance, **options)
        out, load = result if balance else (result, None)
        # Attributes are set where they change: a module takes its time over that.
        if balance or getattr(self, "last_blc", None) is not None:
            self.last_blc = mk.balance_loss(load) if balance else None
        if self.reruns != (self.training and not torch.is_grad_enabled()):
            self.reruns = not self.reruns
        return out if self.reruns else self._with_waiting_terms(out, lora_b)

    def _with_waiting_terms(self, out: Tensor, lora_b: Tensor) -> Tensor:
        if self.balance_grad is None and self.experts_grad is None:
            return out
        if self.balance_grad is not None:
            out = mk.nn.add_to_loss(out, self.balance_grad * self.last_blc)
            self.last_blc = None  # collected already, before this rerun
        if self.experts_grad is not None:
            out = mk.nn.add_to_loss(out, (self.experts_grad * lora_b).sum())
        self.balance_grad = self.experts_grad = None
        return out

    def host_must_run(self, why: str | None) -> bool:
        """Whether numerics="eager" cannot hold in this call, for a reason that is a sentence or None."""
        if self.numerics != "eager" or why is None:
            return False
        if self.strict:
            raise RuntimeError(f"numerics is 'eager', but {why}")
        warnings.warn(f"numerics is 'eager', but {why}: the host's forward runs instead", stacklevel=3)
        return True

    def _apply(self, fn, *args, **kwargs):
        super()._apply(fn, *args, **kwargs)  # .to(), .half(), .cuda() move every parameter by itself
        self.share_experts()
        return self

    def share_experts(self) -> int:
        """The bytes that share a storage."""
        return sum(share(experts) for experts in self.expert_lists(self))

    def separate_experts(self) -> None:
        for experts in self.expert_lists(self):
            separate(experts)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """The host's own, with copies of the experts: savers that drop all but one of the tensors in a storage
        (transformers 4.36's save_pretrained) would lose the others."""
        saved = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        prefix = args[1] if len(args) > 1 else prefix
        experts = {id(e) for experts in self.expert_lists(self) for e in experts}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if id(parameter) in experts and not keep_vars and prefix + name in saved:
                saved[prefix + name] = saved[prefix + name].clone()
        return saved

    def __reduce_ex__(self, protocol):
        return _empty, self.settings, self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # deepcopy and pickle give every parameter a storage of its own
        self.share_experts()


@cache
def swapped_class(
    host: type[nn.Module], kind: type[SwappedLayer], numerics: str, impl: str | None, strict: bool
) -> type[SwappedLayer]:
    """The class of a swapped instance. It shows the host's name; pickles refer to the host's class."""
    names = {"__module__": host.__module__, "__qualname__": host.__qualname__, "__doc__": host.__doc__}
    values = {"host": host, "numerics": numerics, "impl": impl, "strict": strict}
    return type(host.__name__, (kind, host), names | values | {"settings": (host, kind, numerics, impl, strict)})


def _empty(*settings: Any) -> SwappedLayer:
    cls = swapped_class(*settings)
    return cls.__new__(cls)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """E of the published layers: autocast's dtype where it is on, else the adapter's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def mixed_dtypes(dtype: torch.dtype, *others: torch.dtype) -> str | None:
    """Why the host's rounding points are those of no one dtype, or None."""
    if all(other == dtype for other in others):
        return None
    return f"the layer computes in {dtype} on tensors in {', '.join(map(str, others))}, and rounds in both"


def active_dropout(dropout: Any) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
