"""torch.compile over a whole adapted model: one graph, no recompile over sequence lengths, the same bits."""

import inspect

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
import transformers
from peft import get_peft_model
from tiny_llama import tiny_llama, tokens, train_experts

from mtlora_integrations.peft import MtLoraConfig


def test_one_graph_over_sequence_lengths():
    targets = ["mlp", "self_attn", "q_proj"]
    settings = {"r": 4, "num_experts": 3, "num_groups": 2, "balance_coef": 0.1, "lora_dropout": 0.1}
    model = get_peft_model(tiny_llama(num_hidden_layers=1), MtLoraConfig(target_modules=targets, **settings))
    train_experts(model).train()
    trained = [p for p in model.parameters() if p.requires_grad]

    def results(call, ids):
        torch.manual_seed(1)  # of the dropout
        loss = call(input_ids=ids, labels=ids, use_cache=False).loss
        return [loss, *torch.autograd.grad(loss, trained)]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (8, 13, 32, 57):
        ids = tokens(2, length)
        expected, got = results(model, ids), results(compiled, ids)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


static_cache = pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 4 reads the static cache's length on the host"
)


class Decoder:
    """From one token to its logits, after the prompt, through a static cache."""

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        self.model, self.prompt = model, prompt
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        accepted = inspect.signature(model.model.forward).parameters
        self.keyword = "cache" if "cache" in accepted else "past_key_values"  # renamed within transformers 5
        self(prompt)

    def __call__(self, ids: Tensor, model: nn.Module | None = None) -> Tensor:
        model = self.model if model is None else model
        return model(input_ids=ids, use_cache=True, **{self.keyword: self.cache}).logits

    def reset(self) -> None:
        """Back to the prompt, in place."""
        for layer in self.cache.layers:
            for tensor in (layer.keys, layer.values, layer.cumulative_length):
                tensor.zero_()
        self(self.prompt)


@static_cache
@torch.no_grad()
def test_a_step_of_decoding_is_one_graph():
    # The fused attention of the base model itself has other bits when compiled for one token.
    model = tiny_llama(num_hidden_layers=1, attn_implementation="eager")
    model = get_peft_model(model, MtLoraConfig(target_modules=["mlp"], r=4, num_experts=3))
    base = train_experts(model).eval().base_model.model
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(base, fullgraph=True, backend="aot_eager")
    plain, fast = (Decoder(base, tokens(1, 5)) for _ in range(2))
    for step in range(4):
        token = tokens(1, 1, seed=step)
        assert torch.equal(fast(token, compiled), plain(token))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@static_cache
@torch.no_grad()
@pytest.mark.parametrize("rank", [4, 16])  # of 4 with Triton, after the block; of 16 with CUDA, beside it
def test_decoding_in_a_cuda_graph_has_the_bits_of_eager_steps(rank):
    model = get_peft_model(tiny_llama(), MtLoraConfig(target_modules=["mlp", "q_proj"], r=rank, num_experts=3))
    base = train_experts(model).eval().base_model.model.to("cuda", torch.bfloat16)
    plain, fast = (Decoder(base, tokens(1, 5).cuda()) for _ in range(2))
    token = torch.zeros(1, 1, dtype=torch.long, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fast(token)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fast(token)
    fast.reset()
    for step in range(6):
        token.copy_(tokens(1, 1, seed=step))
        graph.replay()
        assert torch.equal(out, plain(token))
