"""What only a GPU can show of the Triton kernels; `python -m mtlora_kernels check` compares their bits."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import mtlora_kernels as mk
from mtlora_kernels.testing import assert_bitwise_equal, differences, random_inputs, run_case

pytest.importorskip("triton", reason="Triton is not installed")
from triton.runtime.jit import JITFunction

from mtlora_kernels.triton import primitives, routed_lora_bwd, routed_lora_bwd_small, routed_lora_fwd

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
BF16, FP32 = torch.bfloat16, torch.float32
LLAMA, PER_OUTPUT = (4096, 4096, 16, 16, 2), (768, 768, 16, 15, 768)  # without T
FULL = {"expert_scale": True, "load": True, "activation": "relu", "dropout_p": 0.1}
PARTS = ("out", "dx")  # what a token's own row decides


def on_gpu(*shape, **settings):
    return random_inputs(*shape, device="cuda", **{"dtype": BF16} | settings)


@pytest.mark.parametrize("shape", [LLAMA, PER_OUTPUT], ids=str)
def test_200_repeats_under_load(shape):
    inputs, noise, side = on_gpu(777, *shape, **FULL), torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    first = run_case("triton", inputs)
    for _ in range(200):
        with torch.cuda.stream(side):
            noise @ noise
        assert differences(run_case("triton", inputs), first) == []


def halves(inputs):
    middle = len(inputs.x) // 2
    for rows in (slice(None, middle), slice(middle, None)):
        yield rows, replace(inputs, x=inputs.x[rows], residual=inputs.residual[rows], dout=inputs.dout[rows])


@pytest.mark.slow
def test_more_than_2_31_elements_equal_two_halves():
    inputs = on_gpu(2**19 + 16, *LLAMA)
    assert inputs.x.numel() > 2**31
    whole = run_case("triton", inputs)
    for rows, half in halves(inputs):
        results = run_case("triton", half)
        for name in PARTS:
            assert torch.equal(whole[name][rows], results[name]), name


@pytest.mark.slow
def test_more_than_2_31_weights_equal_two_halves():
    inputs = on_gpu(2**17 + 16, 768, 768, 16, 25, 768)
    assert inputs.x.shape[0] * 768 * 25 > 2**31
    with torch.no_grad():
        whole = mk.routed_lora(**inputs.kwargs(), impl="triton")
        for rows, half in halves(inputs):
            assert torch.equal(whole[rows], mk.routed_lora(**half.kwargs(), impl="triton"))


def compiled_kernels() -> dict[str, int]:
    modules = (primitives, routed_lora_fwd, routed_lora_bwd, routed_lora_bwd_small)
    kernels = {v for module in modules for v in vars(module).values() if isinstance(v, JITFunction)}
    device = torch.cuda.current_device()
    return {k.__name__: len(k.device_caches[device][0]) for k in kernels if device in k.device_caches}


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(192, 192, 8, 6, 2), (192, 192, 8, 6, 96)], ids=str)
def test_any_number_of_tokens_compiles_twice_at_most(shape, dtype, numerics):
    inputs, before = on_gpu(4096, *shape, dtype=dtype, numerics=numerics), compiled_kernels()

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


@pytest.mark.slow
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


def captured_step(inputs):
    """A CUDA graph of forward and backward, and the tensors it writes."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.arguments().items()}
    results = {}

    def step():
        out, load = mk.routed_lora(**leaves, **inputs.options, impl="triton")
        grads = torch.autograd.grad((out, load), list(leaves.values()), (inputs.dout, inputs.dload))
        results.update(out=out.detach(), load=load.detach())
        results.update({f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)})

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph, leaves, results


@pytest.mark.parametrize("shape", [LLAMA, PER_OUTPUT], ids=str)
def test_graph_of_forward_and_backward(shape):
    seed = torch.tensor([7], device="cuda")
    inputs = on_gpu(300, *shape, **FULL, dropout_seed=seed)
    graph, leaves, results = captured_step(inputs)
    other = on_gpu(300, *shape, **FULL, dropout_seed=seed, seed=1)
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(getattr(other, name))
        inputs.dout.copy_(other.dout)
        inputs.dload.copy_(other.dload)
        seed.fill_(8)
    graph.replay()
    expected = run_case("triton", other)
    assert differences(results, expected) == []


@pytest.mark.parametrize("shape", [LLAMA, PER_OUTPUT], ids=str)
def test_compiled_equals_eager(shape):
    torch._dynamo.reset()
    inputs = on_gpu(300, *shape, **FULL)

    def function(**tensors):
        return mk.routed_lora(**tensors, **inputs.options, impl="triton")

    def results(call):
        leaves = {name: t.detach().requires_grad_() for name, t in inputs.arguments().items()}
        out, load = call(**leaves)
        torch.autograd.backward((out, load), (inputs.dout, inputs.dload))
        return {"out": out, "load": load} | {name: leaf.grad for name, leaf in leaves.items()}

    assert differences(results(torch.compile(function, fullgraph=True)), results(function)) == []


def test_runs_on_the_current_stream():
    inputs, side = on_gpu(300, *LLAMA), torch.cuda.Stream()
    expected, x = run_case("triton", inputs), inputs.x.clone()
    inputs.x.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # whatever another stream runs now still sees zeros
        inputs.x.copy_(x)
        results = run_case("triton", inputs)
    torch.cuda.synchronize()
    assert differences(results, expected) == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_on_the_device_of_its_tensors():
    inputs = on_gpu(300, *LLAMA, **FULL)
    expected = run_case("triton", inputs)
    moved = run_case("triton", inputs.map(lambda t: t.to("cuda:1")))
    assert torch.cuda.current_device() == 0
    for name, t in moved.items():
        assert_bitwise_equal(t.to("cuda:0"), expected[name], name)


EVERY_KERNEL = """
import torch
from mtlora_kernels.testing import random_inputs, run_case
for dtype in (torch.bfloat16, torch.float32):
    for shape in ((150, 72, 96, 8, 15, 6), (150, 40, 48, 8, 5, 24)):
        for options in ({"expert_scale": True, "load": True, "activation": "relu", "dropout_p": 0.1},
                        {"numerics": "eager", "residual": False}):
            run_case("triton", random_inputs(*shape, dtype=dtype, device="cuda", **options))
torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", EVERY_KERNEL]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor its own allocation
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
