"""An adapter beside its block in a CUDA graph: which calls run there, and with the same bits."""

import contextlib
import copy
import pickle
import types

import pytest
import torch
from torch import nn

import mtlora_kernels as mk
from mtlora_kernels import beside, ops

WIDTH, SIZES = 64, (16, 4)


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 96), nn.Linear(96, width)

    def forward(self, hidden_states):
        return self.down(self.up(hidden_states).relu())


class InPlace(Block):
    def forward(self, hidden_states):
        return super().forward(hidden_states.mul_(0.5))


class Columns(Block):
    def forward(self, hidden_states):
        return super().forward(hidden_states).mT.contiguous().mT


class Pair(Block):
    def forward(self, hidden_states):
        return super().forward(hidden_states), None


def adapted(block: nn.Module, width: int = WIDTH, **options) -> nn.Module:
    mk.nn.add_block_adapter(block, mk.nn.RoutedLoRA(width, *SIZES, **options))
    nn.init.normal_(block.block_adapter.lora_B, std=0.1)
    return block.eval()


@pytest.fixture
def calls(monkeypatch):
    """The inputs of the calls that run beside their block."""
    found, run = [], beside.routed_lora

    def routed_lora(given, inputs):
        found.append(given)
        return run(given, inputs) if given.is_cuda else ops.run_forward(*inputs)[0]

    monkeypatch.setattr(beside, "routed_lora", routed_lora)
    return found


@pytest.fixture
def capture(monkeypatch):
    """A CPU that takes every call without gradients for part of a CUDA graph."""

    stream = types.SimpleNamespace(record_event=lambda: None)
    monkeypatch.setattr(beside, "IMPL", "reference")
    monkeypatch.setattr(beside, "DTYPE", torch.float32)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(beside, "_captured", lambda x: True)


@pytest.mark.usefixtures("capture")
@pytest.mark.parametrize(
    ("options", "beside_it"),
    [
        ({}, True),
        ({"style": "adaptformer", "num_groups": 2, "numerics": "eager"}, True),
        ({"dropout": 0.5}, True),
        ({"track_load": True}, False),
        ({"impl": "cpu"}, False),
    ],
    ids=str,
)
def test_adapters_that_run_beside_their_block(calls, options, beside_it):
    if options.get("impl", "reference") not in mk.available_impls():
        pytest.skip("the CPU kernels are not built")
    block = adapted(Block(), **{"impl": "reference"} | options)
    x = torch.randn(3, 5, WIDTH)
    expected = block.block_adapter(x, Block.forward(block, x))
    block(x.clone().requires_grad_())
    assert not calls
    with torch.no_grad():
        for call in (block(x), block(hidden_states=x), copy.deepcopy(block)(x)):
            assert torch.equal(call, expected)
    assert len(calls) == 3 * beside_it


@pytest.mark.usefixtures("capture")
@torch.no_grad()
def test_what_was_not_there_before_the_block_is_waited_for(calls):
    block = adapted(Block())
    adapter, out = block.block_adapter, torch.randn(2, 5, WIDTH)
    a, b, router = adapter.lora_A, adapter.lora_B, adapter.lora_route
    x = torch.randn(2, 5, WIDTH)

    def call(x, *weights, residual=out, **options):
        calls.clear()
        mk.routed_lora(x, *weights, residual=residual, **{"impl": "reference"} | options)
        return bool(calls)

    def marked(x=x):
        return beside.mark_input(x, block)

    assert call(marked(), a, b, router) and call(marked(x.mT.contiguous().mT.contiguous()), a, b, router)
    assert call(marked(torch.randn(5, 2, WIDTH)[:, 1]), a.view_as(a), b, router, residual=None)
    assert not call(x, a, b, router)
    assert not call(marked(), a * 1, b, router)
    assert not call(marked(), nn.Parameter(a.clone()), b, router)
    assert not call(marked(), a, list(b), router)
    assert not call(marked(), a, b, route_weights=torch.ones(2, 5, 1, SIZES[1]))
    assert not call(marked(), a, b, router, numerics="eager", accumulate_into_residual=True)
    assert not call(marked(x.mT.contiguous().mT), a, b, router)  # its rows have to be copied
    assert not call(marked(torch.randn(beside.MOST_TOKENS + 1, WIDTH)), a, b, router, residual=None)
    assert not call(marked(x[:0]), a, b, router, residual=out[:0])
    for changed in (x, a, b, router):
        given = marked()
        changed.add_(1)
        assert not call(given, a, b, router)
    seed = torch.tensor([1])
    assert not call(marked(), a, b, router, dropout_p=0.5, dropout_seed=seed)


@pytest.mark.usefixtures("capture")
@pytest.mark.parametrize(
    ("rank", "num_groups", "dtype"), [(8, 1, torch.float32), (16, 4, torch.float32), (16, 1, torch.bfloat16)]
)
@torch.no_grad()
def test_kinds_that_no_gpu_has_shown_are_waited_for(calls, rank, num_groups, dtype):
    adapter = mk.nn.RoutedLoRA(WIDTH, rank, 4, num_groups=num_groups, impl="reference", dtype=dtype)
    block = Block().to(dtype)
    mk.nn.add_block_adapter(block, adapter)
    block(torch.randn(5, WIDTH, dtype=dtype))
    assert not calls


@pytest.mark.usefixtures("capture")
@torch.no_grad()
def test_experts_that_share_a_storage_are_all_looked_at(calls):
    """One tensor lies over them, which is a view of the first alone."""
    block, x = adapted(Block()), torch.randn(5, WIDTH)
    adapter = block.block_adapter
    block.experts = nn.ParameterList(torch.empty(WIDTH, SIZES[0]) for _ in range(SIZES[1]))
    storage = torch.randn(SIZES[1], WIDTH, SIZES[0])
    for expert, place in zip(block.experts, storage, strict=True):
        expert.data = place
    over = block.experts[0].as_strided(storage.shape, storage.stride())
    for changed in (None, *block.experts):
        calls.clear()
        given = beside.mark_input(x, block)
        if changed is not None:
            changed.add_(1)
        mk.routed_lora(given, adapter.lora_A, over, adapter.lora_route, impl="reference")
        assert len(calls) == (changed is None)


@pytest.mark.usefixtures("capture")
@torch.no_grad()
def test_a_copy_of_a_marked_input_is_not_marked():
    x, block = torch.randn(5, WIDTH), adapted(Block())
    marked = beside.mark_input(x, block)
    getattr(marked, beside.MARK).event = (event for event in ())  # which can be copied no more than a CUDA event
    for copied in (copy.deepcopy(marked), pickle.loads(pickle.dumps(marked))):
        assert torch.equal(copied, x) and getattr(copied, beside.MARK) is None


@pytest.mark.parametrize(("capturing", "current", "expected"), [(True, 1, True), (True, 0, False), (False, 1, False)])
def test_a_capture_is_one_of_the_current_device(monkeypatch, capturing, current, expected):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current, raising=False)
    assert beside._captured(types.SimpleNamespace(is_cuda=True, get_device=lambda: 1)) == expected


class Stream:
    device = "cuda:0"

    def __init__(self, name: str, log: list) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        return f"mark of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def wait_stream(self, stream) -> None:
        self.log.append(f"{self.name} waits for {stream.name}")


@pytest.mark.usefixtures("capture")
@pytest.mark.parametrize("error", [False, True])
@torch.no_grad()
def test_what_forks_joins(monkeypatch, error):
    log = []
    main, side, run = Stream("main", log), Stream("side", log), ops.run_forward

    @contextlib.contextmanager
    def on(stream):
        log.append(f"on {stream.name}")
        yield
        log.append("back")

    def forward(*inputs, wide):
        assert inputs[5] is None and not wide
        if error:
            raise RuntimeError("as it was told")
        return run(*inputs)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: log.append(f"kept for {stream.name}"))
    monkeypatch.setattr(ops, "run_forward", forward)
    monkeypatch.setattr(beside, "_side", lambda of: {main: side}[of])
    block, x = adapted(Block(), numerics="eager", impl="reference"), torch.randn(5, WIDTH)
    if error:
        with pytest.raises(RuntimeError, match="as it was told"):
            block(x)
        assert log == ["side waits for mark of main", "on side", "main waits for side"]
    else:
        out = block(x)
        assert log == ["side waits for mark of main", "on side", "back", "main waits for side", "kept for main"]
        monkeypatch.undo()
        assert torch.equal(out, block(x))


@pytest.mark.usefixtures("capture")
def test_a_block_may_ask_for_gradients():
    block, x = adapted(Block()), torch.randn(5, WIDTH, requires_grad=True)
    with torch.no_grad():
        assert beside.mark_input(x, block) is x


@pytest.mark.usefixtures("capture")
def test_inference_mode(calls):
    """Tensors from outside it show their changes, those made inside do not."""
    block, changing = (adapted(make(), impl="reference") for make in (Block, InPlace))
    x = torch.randn(5, WIDTH)
    with torch.inference_mode():
        block(x)
        assert len(calls) == 1
        changing(x)
        block(x + 1)
    assert len(calls) == 1


@pytest.mark.usefixtures("capture")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@torch.no_grad()
def test_nothing_is_marked_inside_a_transform(calls):
    block, x = adapted(Block(), impl="reference"), torch.randn(2, 5, WIDTH)
    out = torch.vmap(block)(x)
    assert not calls and torch.allclose(out, block(x), atol=1e-5) and len(calls) == 1


@pytest.mark.usefixtures("capture")
@pytest.mark.parametrize("numerics", ["fp32", "eager"])
@torch.no_grad()
def test_a_linear_layer(calls, numerics):
    """The published order of sums starts at the layer's own output."""
    options = {"numerics": numerics, "impl": "reference"}
    layer, x = mk.nn.RoutedLoRALinear(nn.Linear(WIDTH, 32), *SIZES, **options), torch.randn(5, WIDTH)
    assert layer(x).shape == (5, 32) and len(calls) == (numerics == "fp32")


def test_nothing_is_marked_outside_a_graph():
    block, x = adapted(Block()), torch.randn(5, WIDTH)
    with torch.no_grad():
        assert beside.mark_input(x, block) is x
    with torch.inference_mode():
        assert torch.equal(block(x), block.block_adapter(x, Block.forward(block, x)))


def captured(call, x):
    """A replay of call(x) in a CUDA graph, on the values that are given to it."""
    side, static = torch.cuda.Stream(), x.clone()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(static)

    def replay(x):
        static.copy_(x)
        graph.replay()
        return out.clone()

    return replay


class Nest(nn.Module):
    """Blocks in a row, beside each other and inside each other, all with adapters."""

    def __init__(self, width: int, make) -> None:
        super().__init__()
        self.row = nn.ModuleList(make(Block(width)) for _ in range(4))
        self.inner, self.other, self.pair = make(Block(width)), make(Block(width)), make(Pair(width))

    def forward(self, hidden_states):
        x = hidden_states
        for block in self.row:
            x = x + block(x)
        return self.inner(x) + self.other(x) + self.pair(x)[0]


@pytest.mark.gpu
@pytest.mark.skipif("cuda" not in mk.available_impls("cuda"), reason="no Hopper GPU, or not built for it")
class TestOnHopper:
    @pytest.fixture(autouse=True)
    def without_gradients(self):
        with torch.no_grad():
            yield

    @pytest.mark.parametrize("tokens", [1, 7, 16])
    @pytest.mark.parametrize(
        "options",
        [{"num_groups": 2}, {"style": "adaptformer"}, {"numerics": "eager"}, {"style": "bottleneck", "num_groups": 32}],
        ids=str,
    )
    def test_bits_of_every_replay(self, calls, options, tokens):
        width = 1024

        def make(block):
            return adapted(block.to("cuda", torch.bfloat16), width, device="cuda", dtype=torch.bfloat16, **options)

        model = make(Nest(width, make))
        xs = torch.randn(5, tokens, 1, width, device="cuda", dtype=torch.bfloat16)
        replay = captured(model, xs[0])
        assert len(calls) == 8
        for x in xs:
            assert torch.equal(replay(x), model(x))
        model.row[1].block_adapter.lora_A.mul_(2)  # the graph reads parameters where they are
        assert torch.equal(replay(xs[0]), model(xs[0]))
        assert len(calls) == 8

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_weights_of_another_dtype_are_cast_beside_the_block(self, calls, dtype):
        adapter = mk.nn.RoutedLoRA(512, *SIZES, device="cuda", dtype=dtype)
        nn.init.normal_(adapter.lora_B)
        linear = nn.Linear(512, 512, device="cuda", dtype=torch.bfloat16)
        mk.nn.add_block_adapter(linear, adapter)
        xs = torch.randn(3, 4, 512, device="cuda", dtype=torch.bfloat16)
        replay = captured(linear, xs[0])
        assert len(calls) == 1 and all(torch.equal(replay(x), linear(x)) for x in xs)

    @pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
    def test_a_linear_layer(self, calls, leading):
        make = {"device": "cuda", "dtype": torch.bfloat16}
        layer = mk.nn.RoutedLoRALinear(nn.Linear(512, 768, **make), 16, 8, num_groups=4, **make)
        nn.init.normal_(layer.lora_B)
        xs = torch.randn(3, *leading, 512, **make)
        replay = captured(layer, xs[0])
        assert len(calls) == 1 and all(torch.equal(replay(x), layer(x)) for x in xs)

    @pytest.mark.parametrize("numerics", ["fp32", "eager"])
    def test_an_output_in_columns(self, calls, numerics):
        make = {"device": "cuda", "dtype": torch.bfloat16}
        block, xs = adapted(Columns().to(**make), numerics=numerics, **make), torch.randn(3, 4, 2, WIDTH, **make)
        replay = captured(block, xs[0])
        assert len(calls) == 1 and all(torch.equal(replay(x), block(x)) for x in xs)

    def test_a_block_that_changes_its_input_comes_first(self, calls):
        make = {"device": "cuda", "dtype": torch.bfloat16}
        block = adapted(InPlace().to(**make), **make)
        xs = torch.randn(3, 4, WIDTH, **make)
        replay = captured(block, xs[0])
        assert not calls and all(torch.equal(replay(x), block(x.clone())) for x in xs)

    def test_an_error_leaves_no_stream_apart(self, monkeypatch):
        make = {"device": "cuda", "dtype": torch.bfloat16}
        block, x = adapted(Block().to(**make), **make), torch.randn(1, WIDTH, **make)
        expected = block(x)
        run = ops.run_forward

        def fail(*inputs, **options):
            run(*inputs, **options)
            raise RuntimeError("as it was told")

        with monkeypatch.context() as patch:
            patch.setattr(ops, "run_forward", fail)
            with pytest.raises(RuntimeError, match="as it was told"), torch.cuda.graph(torch.cuda.CUDAGraph()):
                block(x)
        assert torch.equal(captured(block, x)(x), expected)
