"""What only a GPU can show of the Triton and CUDA kernels; `python -m mtlora_kernels check` compares their bits."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import mtlora_kernels as mk
from mtlora_kernels.testing import assert_bitwise_equal, differences, random_inputs, run_case
from mtlora_kernels.testing.checks import batch_invariance

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
LLAMA, PER_OUTPUT = (4096, 4096, 16, 16, 2), (768, 768, 16, 15, 768)  # without T
FULL = {"expert_scale": True, "load": True, "activation": "relu"}
DROPOUT = FULL | {"dropout_p": 0.1}
CALLS = [("triton", LLAMA, DROPOUT), ("triton", PER_OUTPUT, DROPOUT), ("cuda", LLAMA, FULL)]
PARTS = ("out", "dx")  # what a token's own row decides

every_call = pytest.mark.parametrize(("impl", "shape", "options"), CALLS, ids=["triton", "triton-per-output", "cuda"])
on_both = pytest.mark.parametrize("impl", ["triton", "cuda"])


@pytest.fixture(autouse=True)
def skip_what_is_not_built(impl):
    if impl not in mk.available_impls("cuda"):
        pytest.skip(f"implementation {impl!r} is not available here")


def on_gpu(*shape, **settings):
    return random_inputs(*shape, device="cuda", **{"dtype": torch.bfloat16} | settings)


@every_call
def test_500_repeats_under_load(impl, shape, options):
    inputs, noise, side = on_gpu(777, *shape, **options), torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    first = run_case(impl, inputs)
    for _ in range(500):
        with torch.cuda.stream(side):
            noise @ noise
        assert differences(run_case(impl, inputs), first) == []


@on_both
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@pytest.mark.parametrize("groups", [2, 32])
def test_a_row_is_the_same_in_every_batch(impl, groups, numerics):
    inputs = on_gpu(8192, *LLAMA[:-1], groups, numerics=numerics)
    sizes = (1, 7, 8, 9, 16, 64, 65, 512, 1024, 2048, 8192)
    assert batch_invariance(impl, inputs, sizes=sizes) == []


def halves(inputs):
    middle = len(inputs.x) // 2
    for rows in (slice(None, middle), slice(middle, None)):
        yield rows, replace(inputs, x=inputs.x[rows], residual=inputs.residual[rows], dout=inputs.dout[rows])


@pytest.mark.slow
@on_both
def test_more_than_2_31_elements_equal_two_halves(impl):
    inputs = on_gpu(2**19 + 16, *LLAMA)
    assert inputs.x.numel() > 2**31
    whole = run_case(impl, inputs)
    for rows, half in halves(inputs):
        results = run_case(impl, half)
        for name in PARTS:
            assert torch.equal(whole[name][rows], results[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["triton"])
def test_more_than_2_31_weights_equal_two_halves(impl):
    inputs = on_gpu(2**17 + 16, 768, 768, 16, 25, 768)
    assert inputs.x.shape[0] * 768 * 25 > 2**31
    with torch.no_grad():
        whole = mk.routed_lora(**inputs.kwargs(), impl=impl)
        for rows, half in halves(inputs):
            assert torch.equal(whole[rows], mk.routed_lora(**half.kwargs(), impl=impl))


def captured_step(impl, inputs):
    """A CUDA graph of forward and backward, and the tensors it writes."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.arguments().items()}
    results = {}

    def step():
        out, load = mk.routed_lora(**leaves, **inputs.options, impl=impl)
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


@every_call
def test_graph_of_forward_and_backward(impl, shape, options):
    seed = torch.tensor([7], device="cuda")
    inputs = on_gpu(300, *shape, **options, dropout_seed=seed)
    graph, leaves, results = captured_step(impl, inputs)
    other = on_gpu(300, *shape, **options, dropout_seed=seed, seed=1)
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(getattr(other, name))
        inputs.dout.copy_(other.dout)
        inputs.dload.copy_(other.dload)
        seed.fill_(8)
    graph.replay()
    expected = run_case(impl, other)
    assert differences(results, expected) == []


@every_call
def test_compiled_equals_eager(impl, shape, options):
    torch._dynamo.reset()
    inputs = on_gpu(300, *shape, **options)

    def function(**tensors):
        return mk.routed_lora(**tensors, **inputs.options, impl=impl)

    def results(call):
        leaves = {name: t.detach().requires_grad_() for name, t in inputs.arguments().items()}
        out, load = call(**leaves)
        torch.autograd.backward((out, load), (inputs.dout, inputs.dload))
        return {"out": out, "load": load} | {name: leaf.grad for name, leaf in leaves.items()}

    assert differences(results(torch.compile(function, fullgraph=True)), results(function)) == []


@on_both
def test_runs_on_the_current_stream(impl):
    inputs, side = on_gpu(300, *LLAMA), torch.cuda.Stream()
    expected, x = run_case(impl, inputs), inputs.x.clone()
    inputs.x.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # whatever another stream runs now still sees zeros
        inputs.x.copy_(x)
        results = run_case(impl, inputs)
    torch.cuda.synchronize()
    assert differences(results, expected) == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@on_both
def test_runs_on_the_device_of_its_tensors(impl):
    inputs = on_gpu(300, *LLAMA, **FULL)
    expected = run_case(impl, inputs)
    moved = run_case(impl, inputs.map(lambda t: t.to("cuda:1")))
    assert torch.cuda.current_device() == 0
    for name, t in moved.items():
        assert_bitwise_equal(t.to("cuda:0"), expected[name], name)


TRITON = """
import torch
from mtlora_kernels.testing import random_inputs, run_case
for dtype in (torch.bfloat16, torch.float32):
    for shape in ((150, 72, 96, 8, 15, 6), (150, 40, 48, 8, 5, 24)):
        for options in ({"expert_scale": True, "load": True, "activation": "relu", "dropout_p": 0.1},
                        {"numerics": "eager", "residual": False}):
            run_case("triton", random_inputs(*shape, dtype=dtype, device="cuda", **options))
torch.cuda.synchronize()
"""
CUDA = """
import torch
from mtlora_kernels.testing import random_inputs, run_case
for options in ({"expert_scale": True, "load": True, "activation": "relu"}, {"load": True}, {"numerics": "eager"}):
    run_case("cuda", random_inputs(*SHAPE, dtype=torch.bfloat16, device="cuda", **options))
torch.cuda.synchronize()
"""
SPECTRAL = """
import torch
import mtlora_kernels as mk
for dtype in (torch.bfloat16, torch.float32):
    experts = torch.randn(3, 4, 300, 16, device="cuda", dtype=dtype, requires_grad=True)
    for kind in ("pairwise", "gram"):
        mk.spectral_penalty(experts, kind=kind, impl="cuda").backward()
    mk.batched_rsvd(torch.randn(3, 300, 40, device="cuda", dtype=dtype), 8, impl="cuda")
torch.cuda.synchronize()
"""
CUDA_SHAPES = (
    (150, 72, 96, 16, 15, 6), (300, 512, 512, 16, 16, 32), (5, 512, 512, 16, 16, 2), (300, 256, 256, 64, 8, 1),
    (150, 64, 192, 16, 7, 8), (2200, 64, 192, 16, 25, 8),
)  # fmt: skip
# A process for each shape: synccheck gives up ("overflow of tracked cuda::barrier structures") after many launches.
EVERY_KERNEL = {
    "triton": ("triton", TRITON),
    **{"cuda-" + "-".join(map(str, s)): ("cuda", CUDA.replace("SHAPE", str(s))) for s in CUDA_SHAPES},
    "cuda-spectral": ("cuda", SPECTRAL),
}


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "program"), EVERY_KERNEL.values(), ids=EVERY_KERNEL)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool, impl, program):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor its own allocation
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
