"""How often and how long Triton compiles: only a GPU can show it."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from mtlora_kernels.testing import random_inputs, run_case

pytest.importorskip("triton", reason="Triton is not installed")
from triton.runtime.jit import JITFunction

from mtlora_kernels.triton import primitives, routed_lora_bwd, routed_lora_bwd_small, routed_lora_fwd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BF16, FP32 = torch.bfloat16, torch.float32


def compiled_kernels() -> dict[str, int]:
    modules = (primitives, routed_lora_fwd, routed_lora_bwd, routed_lora_bwd_small)
    kernels = {v for module in modules for v in vars(module).values() if isinstance(v, JITFunction)}
    device = torch.cuda.current_device()
    return {k.__name__: len(k.device_caches[device][0]) for k in kernels if device in k.device_caches}


@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(192, 192, 8, 6, 2), (192, 192, 8, 6, 96)], ids=str)
def test_any_number_of_tokens_compiles_twice_at_most(shape, dtype, numerics):
    inputs = random_inputs(4096, *shape, dtype=dtype, numerics=numerics, device="cuda")
    before = compiled_kernels()

    def compiles(sizes) -> dict[str, int]:
        for tokens in sizes:
            rows = (t[:tokens] for t in (inputs.x, inputs.residual, inputs.dout))
            run_case("triton", replace(inputs, **dict(zip(("x", "residual", "dout"), rows, strict=True))))
        counts = {name: count - before.get(name, 0) for name, count in compiled_kernels().items()}
        return {name: count for name, count in counts.items() if count}

    once = compiles([1])
    every = compiles(range(2, 4097, 1 if dtype == BF16 and numerics == "fp32" else 37))
    print(f"{shape} {dtype} {numerics}: T = 1 {once}, T = 1..4096 {every}")
    assert every.keys() == once.keys()
    assert all(every[name] <= 2 * count for name, count in once.items()), every


FIRST_CALL = """
import time, torch
from mtlora_kernels.testing import random_inputs
import mtlora_kernels as mk
T, d, r, N, G = {shape}
inputs = random_inputs(T, d, d, r, N, G, dtype={dtype}, device="cuda").map(lambda t: t.requires_grad_())
torch.cuda.synchronize()
start = time.perf_counter()
out = mk.routed_lora(**inputs.kwargs(), impl="triton")
torch.cuda.synchronize()
forward = time.perf_counter() - start
out.backward(inputs.dout)
torch.cuda.synchronize()
print(forward, time.perf_counter() - start - forward)
"""


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(8192, 4096, 16, 16, 2), (64, 768, 16, 100, 2), (64, 768, 16, 15, 768)], ids=str)
def test_first_call_of_a_shape_class_compiles_in_15_seconds(shape, dtype, tmp_path):
    code = FIRST_CALL.format(shape=shape, dtype=dtype)
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    forward, backward = map(float, done.stdout.split())
    print(f"{shape} {dtype}: first forward {forward:.1f} s, first backward {backward:.1f} s")
    assert forward < 15
    assert backward < 15
