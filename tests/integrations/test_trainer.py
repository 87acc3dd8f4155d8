"""transformers.Trainer with adapters, and mtLoRA's two terms in it, on a tiny language model."""

import math

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model
from tiny_llama import tiny_llama, tokens, train_experts
from transformers import Trainer, TrainingArguments

import mtlora_kernels as mk
from mtlora_integrations.peft import MtLoraConfig
from mtlora_integrations.trainer import MtLoraTrainer, add_spectral_gradient, expert_parameters, routing_statistics

# No token predicts the first one; up to transformers 5 a Trainer that is not told so divides by it all the same.
DATA = [{"input_ids": row, "labels": torch.cat([torch.tensor([-100]), row[1:]])} for row in tokens(16, 12)]


@pytest.fixture(autouse=True)
def precision_of_its_own(monkeypatch):
    """accelerate keeps a Trainer's precision for the process, and transformers 4 in the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)


def adapted(**settings) -> PeftModel:
    config = MtLoraConfig(target_modules=["mlp", "q_proj"], r=4, num_experts=3, num_groups=2, **settings)
    return train_experts(get_peft_model(tiny_llama(use_cache=False), config))


def arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **settings | changes)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
def test_plain_trainer_with_bf16_and_checkpointing(tmp_path, reentrant):
    losses = []
    for checkpointing in (False, True):
        options = {"gradient_checkpointing": checkpointing, "bf16": True}
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
        model = adapted(lora_dropout=0.1, balance_coef=0.1)
        model.enable_input_require_grads()  # for reentrant checkpoints; transformers 5 does it
        trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=DATA[:4])
        before = trained(trainer.model)
        trainer.train()
        assert all(not torch.equal(p, before[name]) for name, p in trained(trainer.model).items())
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


def test_saves_and_resumes_with_identical_losses(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    settings = {"spectral_coef": 0.1, "balance_coef": 0.1}

    def run(resume=None, **changes):
        model = adapted(lora_dropout=0.2)
        trainer = MtLoraTrainer(model, arguments(tmp_path, **options | changes), train_dataset=DATA, **settings)
        trainer.train(resume_from_checkpoint=resume)
        logs = [row for row in trainer.state.log_history if "loss" in row]
        return {row["step"]: (row["loss"], row["grad_norm"]) for row in logs}, trained(model)

    whole, expected = run()
    resumed, parameters = run(str(tmp_path / "checkpoint-2"), save_strategy="no")
    assert list(whole) == [1, 2, 3, 4, 5] and resumed == whole
    assert all(torch.equal(p, expected[name]) for name, p in parameters.items())
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-4")
    assert torch.isfinite(loaded(tokens(1, 5)).logits).all()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["pairwise", "gram"])
def test_one_step_has_the_gradient_of_the_whole_loss(tmp_path, kind, accumulation):
    """With plain SGD of rate 1 a step is the gradient; by hand the two terms stand in the loss."""
    rows = DATA[:1] * 8  # equal rows: their order says nothing
    settings = {"spectral_coef": 0.3, "spectral_kind": kind, "balance_coef": 0.7}
    options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
    options |= {"max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 0.0}
    options |= {"lr_scheduler_type": "constant"}
    trainer = MtLoraTrainer(adapted(), arguments(tmp_path, **options), train_dataset=rows, **settings)
    before = trained(trainer.model)
    trainer.train()
    step = {name: before[name] - p for name, p in trained(trainer.model).items()}

    model = adapted().train()
    ids = torch.stack([row["input_ids"] for row in rows])
    loads: list[Tensor] = []
    routed_lora = mk.routed_lora

    def with_load(*args, **kwargs):
        out, load = routed_lora(*args, **kwargs | {"return_load": True})
        loads.append(load)
        return out

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtlora_kernels.nn.mixture.routed_lora", with_load)
        loss = model(input_ids=ids, labels=ids).loss
    loss = loss + 0.7 * torch.stack([mk.balance_loss(load) for load in loads]).mean()
    loss = loss + 0.3 * mk.spectral_penalty(expert_parameters(model), kind=kind)
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    for name, gradient in expected.items():
        torch.testing.assert_close(step[name], gradient, rtol=1e-4, atol=1e-5)


def test_logs(tmp_path):
    trainer = MtLoraTrainer(adapted(), arguments(tmp_path), train_dataset=DATA, spectral_coef=0.1, balance_coef=0.1)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    for row in logs:
        assert row["spectral_penalty"] > 0 and row["balance_loss"] >= 0 and 0 < row["routing_entropy"] <= 1
        assert math.isclose(sum(row[f"load/expert_{i}"] for i in range(3)), 1, rel_tol=1e-5)
    assert len({row["spectral_penalty"] for row in logs}) == len(logs)


def test_adapters_that_are_off_do_not_count(tmp_path):
    model = adapted()
    model.add_adapter("second", MtLoraConfig(target_modules=["mlp"], r=2, num_experts=5))
    trainer = MtLoraTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=DATA, balance_coef=1.0)
    trainer.train()
    log = trainer.state.log_history[0]
    assert "load/expert_3" not in log and math.isclose(log["load/expert_0"] * 3, 1, rel_tol=0.2)
    coefficients = [m.balance_coef for m in model.modules() if isinstance(m, mk.nn.RoutedMixture)]
    assert sorted(coefficients) == [0, 0, 0.25, 0.25, 0.25, 0.25]  # two layers of mlp and q_proj


def test_statistics_of_equal_and_of_one_sided_loads():
    equal, one, other = torch.full((4,), 0.25), torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
    got = routing_statistics([equal])
    assert got["routing_entropy"] == 1 and got["balance_loss"] == 0
    got = routing_statistics([one, other, equal])
    assert math.isclose(got["routing_entropy"], 2 / 3, rel_tol=1e-6)
    assert got["load/expert_0"] == pytest.approx((1 + 0.5 + 0.25) / 3) and got["load/expert_3"] == 0.25
    assert routing_statistics([torch.ones(1)])["routing_entropy"] == 0


def test_zero_experts_have_no_penalty_and_no_gradient():
    model = get_peft_model(tiny_llama(), MtLoraConfig(target_modules=["mlp"], r=4, num_experts=3))
    assert add_spectral_gradient(model, 1.0) == 0
    assert all(not p.grad.any() for p in expert_parameters(model))


def test_an_unknown_kind_of_penalty_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="spectral_kind is 'paper', it must be 'pairwise' or 'gram'"):
        MtLoraTrainer(adapted(), arguments(tmp_path), train_dataset=DATA, spectral_kind="paper")


def test_models_without_adapters_say_so(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM without routed adapters"):
        MtLoraTrainer(tiny_llama(), arguments(tmp_path), train_dataset=DATA)
    with pytest.raises(ValueError, match="LlamaForCausalLM without trainable lora_B"):
        add_spectral_gradient(tiny_llama(), 1.0)
