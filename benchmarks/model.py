"""`python -m benchmarks model`: what the adapters cost a whole language model, training and decoding."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from .model_contenders import BASE, ModelContender, model_contenders
from .model_layers import Layout
from .model_report import ModelReport, ModelShape
from .registry import default_impls
from .results import RESULTS
from .small_batch import captured
from .timing import time_call

WARM_UP_STEPS = 3  # libraries and clocks settle before base alone is timed
STEP_REPEATS = 3  # a step is long enough to be timed once; three show that nothing else ran
DECODE_REPEATS = 10
CACHE_LENGTH, PREFILL = 512, 16


# LLaMA-2-7B, the paper's 16 x 512 tokens, r = 16, N = 16, alpha = 64, two routing groups on the feed-forward block;
# HydraLoRA's two adapters a layer have one group.
LLAMA_7B = ModelShape(
    "llama-2-7b",
    {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32},
    16,
    512,
    torch.bfloat16,
    (Layout("block ffn", ("mlp",), 16, 16, 2, 64.0), Layout("q, v", ("q_proj", "v_proj"), 16, 16, 1, 64.0)),
)
SMALL = ModelShape(
    "llama-small",
    {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 4},
    2,
    64,
    torch.float32,
    LLAMA_7B.layouts,
)


def build(shape: ModelShape, device: torch.device) -> LlamaForCausalLM:
    """Random weights made on the device, all frozen."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**shape.config, use_cache=False))
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    # The gradient reaches the embeddings in every contender, base alone included: the same backward to compare with.
    model.enable_input_require_grads()
    return model


def run(
    device: torch.device,
    *,
    quick: bool = False,
    impls: Sequence[str] = (),
    save: bool = True,
    folder: Path = RESULTS,
) -> int:
    """Exit status 0, or 1 if losses differ that have to be equal. impls is by default the fastest one."""
    shape = LLAMA_7B if device.type == "cuda" and not quick else SMALL
    report = ModelReport(shape, device, folder if save else None)
    model = build(shape, device)
    ids = torch.randint(shape.config["vocab_size"], (shape.batch, shape.length), device=device)
    for _ in range(WARM_UP_STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
    for layout in shape.layouts:
        measure(report, BASE, layout, model, ids)  # again: after 30 s of work an H100 is 1.5 % slower
        for contender in model_contenders(impls or default_impls(device)[-1:]):
            measure(report, contender, layout, model, ids)
    return report.finish()


def measure(
    report: ModelReport, contender: ModelContender, layout: Layout, model: LlamaForCausalLM, ids: Tensor
) -> None:
    adapted, detach = contender.attach(model, layout, contender.impl)
    adapted.train()
    for checkpointing in (False, True):
        name = "step, checkpointing" if checkpointing else "step"
        with _checkpointing(model, checkpointing), report.row(contender, layout, name) as record:
            _measure_step(record, adapted, ids, report.device)
    adapted.eval()
    with torch.no_grad(), report.row(contender, layout, "decode") as record:
        record(time_call(_decoder(model), report.device, DECODE_REPEATS))
    if report.device.type == "cuda":
        with torch.no_grad(), report.row(contender, layout, "decode in a graph") as record:
            record(time_call(captured(_decoder(model)), report.device, DECODE_REPEATS))
    detach()


def _measure_step(record: Callable, adapted: nn.Module, ids: Tensor, device: torch.device) -> None:
    losses: list[Tensor] = []
    trained = [p for p in adapted.parameters() if p.requires_grad]

    def step() -> None:
        for p in trained:
            p.grad = None
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timing = time_call(step, device, STEP_REPEATS)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    record(timing, peak=peak, loss=losses[-1].item())


@contextmanager
def _checkpointing(model: LlamaForCausalLM, on: bool) -> Iterator[None]:
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    yield
    if on:
        model.gradient_checkpointing_disable()


def _decoder(model: LlamaForCausalLM) -> Callable[[], Tensor]:
    """One token after another through a static cache, which holds every call that is timed."""
    accepted = inspect.signature(model.model.forward).parameters
    keyword = "cache" if "cache" in accepted else "past_key_values"  # renamed within transformers 5
    cache = StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
    prompt = torch.zeros(1, PREFILL, dtype=torch.long, device=model.device)
    model(input_ids=prompt, use_cache=True, **{keyword: cache})
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    return lambda: model(input_ids=token, use_cache=True, **{keyword: cache}).logits
