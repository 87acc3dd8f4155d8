"""One of two processes on gloo: `python worker.py {train,killed} <folder> <rank>`. See test_distributed.py."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import mtlora_kernels as mk
from mtlora_integrations.peft import MtLoraConfig
from mtlora_integrations.trainer import add_spectral_gradient, expert_parameters

WORLD, STEPS, SAVED_STEP = 2, 4, 2
EXPERTS = 3  # do not divide evenly over the processes
SPECTRAL_COEF = 0.1


def make(kind: str, balance_coef: float = 0.5) -> nn.Module:
    """A tiny LLaMA with adapters of mtlora_kernels.nn ("attached") or of PEFT ("peft"), experts as if trained."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False))
    if kind == "peft":
        settings = {"r": 4, "num_experts": EXPERTS, "num_groups": 2, "balance_coef": balance_coef}
        model = get_peft_model(model, MtLoraConfig(target_modules=["mlp", "q_proj"], **settings))
    else:
        options = {"num_groups": 2, "balance_coef": balance_coef, "freeze_base": True}
        mk.nn.attach_block_adapters(model, r".*\.(mlp|self_attn)", 32, 4, EXPERTS, **options)
    for parameter in expert_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    return model.train()


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2 by whole layers: an adapter reads its weights where the layer that holds it has gathered them."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch(step: int, rank: int) -> Tensor:
    return torch.randint(64, (2, 10), generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    ids = batch(step, rank)
    return model(input_ids=ids, labels=ids).loss


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Run:
    """Trains a model and keeps what can be compared: losses of each process's batch, penalties, first gradients."""

    def __init__(self, model: nn.Module, backward: Callable[[nn.Module, int], list[float]]) -> None:
        self.model, self.backward, self.losses, self.penalties = model, backward, {}, {}
        self.trained = {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=0.05)
        self.gradients: dict[str, Tensor] = {}

    def steps(self, first: int, last: int, after_step: Callable[[int], None] = lambda step: None) -> "Run":
        for step in range(first, last + 1):
            self.optimizer.zero_grad()
            self.losses[step] = self.backward(self.model, step)
            self.penalties[step] = add_spectral_gradient(self.model, SPECTRAL_COEF).item()
            if not self.gradients:
                self.gradients = {name: whole(p.grad) for name, p in self.trained.items()}
            self.optimizer.step()
            after_step(step)
        return self

    def results(self) -> dict:
        parameters = {name: whole(p) for name, p in self.trained.items()}
        kept = {"losses": self.losses, "penalties": self.penalties, "gradients": self.gradients}
        return kept | {"parameters": parameters}


def one_process(model: nn.Module, step: int) -> list[float]:
    """Both processes' batches, one after the other, as two steps of accumulation."""
    mk.nn.set_balance_scale(model, 1 / WORLD)
    losses = [loss_of(model, step, rank) for rank in range(WORLD)]
    for loss in losses:
        (loss / WORLD).backward()
    return [loss.item() for loss in losses]


def one_batch(model: nn.Module, step: int) -> list[float]:
    """Both batches as one, which adds tokens in another order."""
    ids = torch.cat([batch(step, rank) for rank in range(WORLD)])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.item()]


def own_batch(model: nn.Module, step: int) -> list[float]:
    """This process's batch; DDP or FSDP2 averages the gradients."""
    loss = loss_of(model, step, distributed.get_rank())
    loss.backward()
    losses = [torch.zeros(()) for _ in range(WORLD)]
    distributed.all_gather(losses, loss.detach())
    return [loss.item() for loss in losses]


def save(run: Run, folder: Path) -> None:
    model, optimizer = get_state_dict(run.model, run.optimizer)
    checkpoint.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)


def resume(run: Run, folder: Path) -> Run:
    for p in run.trained.values():  # nothing but the checkpoint may bring the values back
        nn.init.ones_(p)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    checkpoint.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    return run


def train(folder: Path) -> dict:
    """Every run by name, including those that go on where the killed ones were saved."""
    results = {}
    for kind in ("attached", "peft"):
        results[kind, "one process"] = Run(make(kind), one_process).steps(1, STEPS).results()
        results[kind, "one batch"] = Run(make(kind, 0.0), one_batch).steps(1, 1).results()
        results[kind, "two batches"] = Run(sharded(make(kind, 0.0)), own_batch).steps(1, 1).results()
        results[kind, "ddp"] = Run(DistributedDataParallel(make(kind)), own_batch).steps(1, STEPS).results()
        results[kind, "fsdp2"] = Run(sharded(make(kind)), own_batch).steps(1, STEPS).results()
        resumed = resume(Run(sharded(make(kind)), own_batch), folder / kind)
        results[kind, "resumed"] = resumed.steps(SAVED_STEP + 1, STEPS).results()
    return results


def killed(folder: Path) -> None:
    """Save after a step and die in the backward pass of the next one."""
    saved: list[Run] = []
    for kind in ("attached", "peft"):
        saved.append(Run(sharded(make(kind)), own_batch).steps(1, SAVED_STEP))
        save(saved[-1], folder / kind)
    distributed.barrier()
    layer = next(m for m in saved[0].model.modules() if type(m).__name__ == "LlamaMLP")
    layer.register_full_backward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    saved[0].steps(SAVED_STEP + 1, STEPS)


if __name__ == "__main__":
    command, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/{command}", rank=rank, world_size=WORLD)
    if command == "killed":
        killed(folder)
    else:
        torch.save(train(folder), folder / f"results{rank}.pt")
    distributed.barrier()  # neither leaves while the other still talks to it
    os._exit(0)  # ordinary ends were seen to abort now and then, in the destructor of a thread of gloo's
