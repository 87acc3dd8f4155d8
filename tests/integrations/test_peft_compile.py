"""torch.compile over a whole adapted model: one graph, no recompile over sequence lengths, the same bits."""

import inspect

import pytest
import torch

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


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 reads the static cache's length on the host")
def test_a_step_of_decoding_is_one_graph():
    """The static cache's length is a tensor, so that no step differs from the one before."""
    # The fused attention of the base model itself has other bits when compiled for one token.
    model = tiny_llama(num_hidden_layers=1, attn_implementation="eager")
    model = get_peft_model(model, MtLoraConfig(target_modules=["mlp"], r=4, num_experts=3))
    base = train_experts(model).eval().base_model.model
    accepted = inspect.signature(base.model.forward).parameters
    keyword = "cache" if "cache" in accepted else "past_key_values"  # renamed within transformers 5
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(base, fullgraph=True, backend="aot_eager")
    caches = [{keyword: transformers.StaticCache(config=base.config, max_cache_len=16)} for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            base(input_ids=tokens(1, 5), use_cache=True, **cache)
        for step in range(4):
            token = tokens(1, 1, seed=step)
            expected = base(input_ids=token, use_cache=True, **caches[0]).logits
            assert torch.equal(compiled(input_ids=token, use_cache=True, **caches[1]).logits, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
