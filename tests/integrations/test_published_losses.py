"""The official trainer's two extra terms on swapped models: values and gradients, however the model is run."""

import copy
import os
import types

import pytest
import torch
import torch.distributed as dist
from host_layers import D, close, make
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mtlora_integrations import swap_in
from mtlora_integrations.published_losses import collect_balance_loss, compute_spectral_regularization

COEF = 3.0  # the term's part of a router's gradient shows
FP32 = 1e-4  # sums that cancel, such as the gradient of one expert's scale
TRAINER = types.SimpleNamespace(state=types.SimpleNamespace(global_step=7, epoch=2.5))


class Model(nn.Module):
    """Two blocks with a block adapter each, then a component layer; each part may be checkpointed."""

    def __init__(self, use_reentrant: bool | None = None, twice: bool = False):
        super().__init__()
        self.first, self.second = make("lowrank grouped", blc=True), make("adaptformer", blc=True)
        self.head = make("component", blc=True)
        self.use_reentrant, self.twice = use_reentrant, twice
        for p in self.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.1)

    def run(self, part: nn.Module, x: Tensor) -> Tensor:
        return part(x) if self.use_reentrant is None else checkpoint(part, x, use_reentrant=self.use_reentrant)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.first, self.second) if self.twice else (self.first, self.second):
            x = x + self.run(block, x)
        return self.run(self.head, x)


def published_collect(model: nn.Module) -> Tensor:
    """The mean that the official trainer takes, by its attribute."""
    terms = [m.last_blc for m in model.modules() if getattr(m, "last_blc", None) is not None]
    return sum(terms) / len(terms)


def published_spectral(model: Model) -> Tensor:
    """The official penalty, matrix by matrix, by LAPACK."""
    terms = []
    matrices = [e.weight for block in (model.first, model.second) for e in block.lora_B]
    for b in matrices + [getattr(model.head, f"lora_B{i}").weight for i in range(model.head.lora_num)]:
        s = torch.linalg.svdvals(b.detach())
        w = torch.exp(-s / (s.mean() + 1e-8))
        c = torch.linalg.norm(b.detach()) / b.shape[1] ** 0.5 + 1e-8
        terms.append(((w[:, None] * w * (b.T @ b - c**2 * torch.eye(b.shape[1]))) ** 2).sum())
    return sum(terms) / len(terms)


def inputs() -> Tensor:
    return torch.randn(4, 5, D, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(
    model: nn.Module, *, balance=collect_balance_loss, spectral=None, scale: float = 1.0
) -> dict[str, Tensor]:
    """As a trainer: the loss of the output, both terms, the scale of everything, backward."""
    model.zero_grad()
    loss = model(inputs()).square().mean()
    values = {"balance": balance(model)}
    loss = loss + COEF * values["balance"]
    if spectral is not None:
        values["spectral"] = spectral(model)
        loss = loss + 0.1 * values["spectral"]
    (loss * scale).backward()
    values = {name: value.detach() for name, value in values.items()}
    return values | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def ours(model: nn.Module) -> Tensor:
    return compute_spectral_regularization(TRAINER, model)


def at_rest(model: nn.Module) -> bool:
    """No term, no graph and no gradient stays behind: the model can be copied."""
    copy.deepcopy(model)
    names = ("last_blc", "balance_grad", "experts_grad")
    return all(getattr(m, name, None) is None for m in model.modules() for name in names)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_balance_equals_the_published_term(use_reentrant, scale):
    torch.manual_seed(0)
    model = Model()
    expected = gradients(model, balance=published_collect, scale=scale)
    swap_in(model, strict=True)
    close(gradients(model, balance=published_collect, scale=scale), expected, FP32)
    model.use_reentrant = use_reentrant
    for _ in range(2):
        close(gradients(model, scale=scale), expected, FP32)
    if use_reentrant is not False:  # where the rerun leaves a term behind, as in the host, until the next forward
        assert at_rest(model)
    without = gradients(model, balance=lambda model: collect_balance_loss(model).detach(), scale=scale)
    for name in ("first.lora_route.weight", "second.lora_route.weight", "head.lora_route.weight"):
        gap = (without[name] - expected[name]).abs().max() / expected[name].abs().max()
        assert gap > 0.01, (name, gap)


@pytest.mark.parametrize("use_reentrant", [None, True])
def test_a_layer_that_runs_twice_counts_once(use_reentrant):
    torch.manual_seed(0)
    model = Model(twice=True)
    expected = gradients(model, balance=published_collect)
    swap_in(model, strict=True)
    model.use_reentrant = use_reentrant
    close(gradients(model), expected, FP32)


def test_balance_without_swapped_layers():
    torch.manual_seed(0)
    model = Model()
    expected = gradients(model, balance=published_collect)
    close(gradients(model), expected, FP32)
    model.eval()
    model.head.training = False
    model(inputs())
    assert collect_balance_loss(model) is None


def test_evaluation_between_steps_leaves_nothing():
    torch.manual_seed(0)
    model = Model(use_reentrant=True)
    swap_in(model, strict=True)
    expected = gradients(model)
    with torch.no_grad():
        model(inputs())
        assert collect_balance_loss(model) > 0
    close(gradients(model), expected, FP32)


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_spectral_equals_the_published_term(use_reentrant, swapped):
    torch.manual_seed(0)
    model = Model()
    expected = gradients(model, balance=published_collect, spectral=published_spectral)
    if swapped:
        swap_in(model, strict=True)
        model.use_reentrant = use_reentrant
    close(gradients(model, spectral=ours), expected, FP32)
    assert (TRAINER._last_svd_step, TRAINER._last_svd_epoch) == (7, 2)
    assert use_reentrant is False or at_rest(model)


def test_spectral_alone_and_of_nothing():
    torch.manual_seed(0)
    model = Model()
    swap_in(model, strict=True)
    published_spectral(model).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours(model).backward()
    close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected, FP32)
    assert compute_spectral_regularization(TRAINER, nn.Linear(2, 2)) == 0


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Model(use_reentrant=True)
    swap_in(model, strict=True)
    parallel = DistributedDataParallel(model)
    loss = parallel(inputs()[2 * rank : 2 * rank + 2]).square().mean()
    loss = loss + COEF * collect_balance_loss(parallel) + 0.1 * ours(parallel)
    loss.backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, f"{folder}/grads")
    dist.barrier()  # neither leaves while the other still talks to it
    os._exit(0)  # ordinary ends were seen to abort now and then, in the destructor of a thread of gloo's


@pytest.mark.slow
def test_data_parallel_under_reentrant_checkpointing(tmp_path):
    """Two processes: the gradients are the mean of both halves'. DDP takes each parameter's gradient once, which
    a second way to the experts, beside the rerun, would break."""
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    model = Model()
    swap_in(model, strict=True)
    for half in inputs().detach().split(2):
        loss = model(half).square().mean() + COEF * collect_balance_loss(model) + 0.1 * ours(model)
        (loss / 2).backward()
    close(torch.load(tmp_path / "grads"), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, FP32)
