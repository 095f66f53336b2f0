"""cuda_graph=True: when a graph is captured, when it serves, and when it goes.

A stand-in for torch's graphs runs the captured work again, on the device of utils/fake_gpu.py. The last tests need a
GPU.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from utils.fake_gpu import FakeGpu, OnFakeGpu, move_to_fake_gpu, on_fake_gpu
from utils.models import MultiHead, mlp, stream
from utils.training import train

from gem_fast import GEM, EpisodicMemory, Fused, Loop, ops, sampling
from gem_fast.hook import cuda_graph


class FakeGraph:
    """Keeps the work, and what it returned when it was captured."""

    captured = 0
    replayed = 0

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def capture(self, run: Callable[[], Any]) -> Any:
        FakeGraph.captured += 1
        states = [generator.get_state() for generator in self.generators]
        self.run, self.result = run, run()
        # A capture runs nothing, so nothing was drawn.
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)
        return self.result

    def replay(self) -> None:
        FakeGraph.replayed += 1
        projection, _ = self.run()
        for kept, new in zip(self.result[0], projection, strict=True):
            kept.copy_(new)


class Unable(FakeGraph):
    def capture(self, run: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    monkeypatch.setattr(ops, "_DEVICES", ("cpu", "meta"))
    monkeypatch.setattr(sampling, "new_generator", lambda device: torch.Generator())
    FakeGraph.captured = FakeGraph.replayed = 0
    return FakeGpu()


def train_on_gpu(
    gpu: FakeGpu, new_graph: Any = None, steps: Sequence[int] = (5, 10, 8), new_model: Any = mlp, **options: Any
) -> tuple[list[Tensor], GEM, torch.optim.Optimizer]:
    """So many steps of each task; the parameters after them, the hook and what it is attached to."""
    torch.manual_seed(0)
    with gpu:
        model = move_to_fake_gpu(new_model())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        memory = EpisodicMemory(per_task=6)
        gem = GEM(model, optimizer, memory=memory, cuda_graph=new_graph is not None, **options)
        if new_graph is not None:
            gem._graphed = cuda_graph.Graphed("the memory pass", in_place=True, new_graph=new_graph)
        for task, count in enumerate(steps):
            for _ in range(count):
                step(model, optimizer, gem, task)
        parameters = [p.detach() for p in model.parameters()]
        assert all(isinstance(p, OnFakeGpu) for p in parameters)
    return [p.values for p in parameters], gem, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, gem: GEM, task: int) -> None:
    x, y = on_fake_gpu(torch.randn(4, 6)), on_fake_gpu(torch.randint(3, (4,)))
    optimizer.zero_grad()
    output = model(x, task) if gem.objective.pass_task else model(x)
    F.cross_entropy(output, y).backward()
    gem.observe(x, y, task)
    optimizer.step()


@pytest.mark.parametrize(
    "options",
    [{}, {"memory_batch": 3}, {"engine": Fused(form="layerwise")}, {"engine": Loop()}, {"new_model": MultiHead}],
    ids=["rows", "sampled", "layerwise", "loop", "heads"],
)
def test_steps_from_a_graph_are_those_without(gpu: FakeGpu, options: dict[str, Any]) -> None:
    eager, *_ = train_on_gpu(gpu, **options)
    graphed, gem, _ = train_on_gpu(gpu, FakeGraph, **options)
    for x, y in zip(graphed, eager, strict=True):
        assert torch.equal(x, y)
    # Of the second task's 10 steps and the third's 8, three are eager each; the first has no past.
    assert (FakeGraph.captured, FakeGraph.replayed) == (2, 10 + 8 - 2 * cuda_graph.EAGER_STEPS)
    assert gem.last is not None


def changed_examples(model: nn.Module, gem: GEM) -> None:
    x, _ = gem.memory.examples(0)
    x.mul_(2.0)


def changed_mode(model: nn.Module, gem: GEM) -> None:
    model.eval()


def changed_margin(model: nn.Module, gem: GEM) -> None:
    gem.margin = 0.1


def moved_parameter(model: nn.Module, gem: GEM) -> None:
    first = next(model.parameters())
    assert isinstance(first, OnFakeGpu)
    first.values = first.values.clone()


def replaced_buffer(model: nn.Module, gem: GEM) -> None:
    model.get_submodule("1").register_buffer("scale", on_fake_gpu(torch.ones(3)))


def frozen_parameter(model: nn.Module, gem: GEM) -> None:
    next(model.parameters()).requires_grad_(False)


@pytest.mark.parametrize(
    "change",
    [changed_examples, changed_mode, changed_margin, moved_parameter, replaced_buffer, frozen_parameter, None],
)
def test_another_graph_where_steps_are_of_another_kind(gpu: FakeGpu, change: Any) -> None:
    _, gem, optimizer = train_on_gpu(gpu, FakeGraph, steps=(2, 6))
    assert FakeGraph.captured == 1
    model = gem.objective.model
    with gpu:
        if change is not None:
            change(model, gem)
        for _ in range(cuda_graph.EAGER_STEPS + 1):
            step(model, optimizer, gem, 1)
    assert FakeGraph.captured == (1 if change is None else 2)


class Storageless(Tensor):
    """A tensor that is made of others, as some quantised weights are."""

    def __new__(cls) -> "Storageless":
        return Tensor._make_wrapper_subclass(cls, (2, 2), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


def test_weights_without_memory_of_their_own_have_a_place() -> None:
    model = mlp()
    model.register_buffer("quantised", Storageless())
    parameters = list(model.parameters())
    kind = cuda_graph.kind_of(model, [], parameters, ())
    assert cuda_graph.kind_of(model, [], parameters, ()) == kind
    model.quantised = Storageless()
    assert cuda_graph.kind_of(model, [], parameters, ()) != kind


def test_a_pass_that_cannot_be_captured_stays_eager(gpu: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    eager, *_ = train_on_gpu(gpu)
    with caplog.at_level(logging.WARNING, "gem_fast"):
        graphed, *_ = train_on_gpu(gpu, Unable)
    for x, y in zip(graphed, eager, strict=True):
        assert torch.equal(x, y)
    assert caplog.messages == [
        "the memory pass runs without a CUDA graph: capturing it failed: RuntimeError: operation not permitted when "
        "stream is capturing"
    ]


def test_rows_that_are_refreshed_in_turns_are_not_captured(gpu: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gem_fast"):
        train_on_gpu(gpu, FakeGraph, engine=Fused(refresh_every=2))
    assert FakeGraph.captured == 0
    assert caplog.messages == [
        "the memory pass runs without a CUDA graph: the engine does something else in each step (refresh_every), or "
        "several processes take part"
    ]


def test_on_a_cpu_there_is_no_graph(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=4), cuda_graph=True)
    with caplog.at_level(logging.WARNING, "gem_fast"):
        train(model, optimizer, gem, stream(2, batches=6))
    assert caplog.messages == ["the memory pass runs without a CUDA graph: the model is on cpu, and graphs are a GPU's"]


def test_a_model_on_two_devices_has_no_graph(gpu: FakeGpu) -> None:
    """What it does on the other one would be done when it is captured, and not again."""

    with gpu:
        model = move_to_fake_gpu(mlp())
    model.register_buffer("elsewhere", torch.zeros(2))
    said = cuda_graph.obstacle_of(model, list(model.parameters()), repeats=True)
    assert said == "the model is on cpu and meta, and graphs are a GPU's"
    model.elsewhere = model.elsewhere.to("meta")
    assert cuda_graph.obstacle_of(model, list(model.parameters()), repeats=True) is None


# ---- whole steps -----------------------------------------------------------------------------------------------------


class FakeStepGraph(FakeGraph):
    """A capture runs nothing: what the work did to the model, the optimizer and the generators is undone."""

    tensors: Callable[[], list[Tensor]]

    def capture(self, run: Callable[[], Any]) -> Any:
        before = [(x, x.clone()) for x in type(self).tensors()]
        result = super().capture(run)
        for x, value in before:
            x.copy_(value)
        return result

    def replay(self) -> None:
        FakeGraph.replayed += 1
        loss, last, grads = self.run()
        self.result.loss.copy_(loss)
        for kept, new in zip(self.result.last or (), last or (), strict=True):
            kept.copy_(new)
        for kept, new in zip(self.result.grads, grads, strict=True):
            assert (kept is None) == (new is None)
            if kept is not None:
                kept.copy_(new)


def train_by_steps(
    gpu: FakeGpu, new_graph: Any, new_model: Any = mlp, new_optimizer: Any = torch.optim.SGD, **options: Any
) -> tuple[list[Tensor], list[Tensor], torch.optim.Optimizer, GEM]:
    """Steps of three tasks; the parameters after them and the losses."""
    torch.manual_seed(0)
    with gpu:
        model = move_to_fake_gpu(new_model())
        optimizer = new_optimizer(model.parameters(), lr=0.1)
        gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=6), cuda_graph=new_graph is not None, **options)
        if new_graph is not None:
            gem._graphed = cuda_graph.Graphed("the memory pass", in_place=True, new_graph=FakeGraph)
            gem._step.graphed = cuda_graph.Graphed("the whole step", in_place=False, new_graph=new_graph)
            FakeStepGraph.tensors = staticmethod(
                lambda: [
                    *(p.data for p in model.parameters()),
                    *(x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)),
                ]
            )
        losses = []
        for task, count in enumerate((5, 10, 8)):
            for _ in range(count):
                x, y = on_fake_gpu(torch.randn(4, 6)), on_fake_gpu(torch.randint(3, (4,)))
                losses.append(gem.step(x, y, task).clone())
        parameters = [p.detach() for p in model.parameters()]
    return [p.values for p in parameters], [loss.values for loss in losses], optimizer, gem  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"memory_batch": 3},
        {"engine": Fused(form="layerwise")},
        {"engine": Loop()},
        {"new_model": MultiHead},
        {"new_optimizer": lambda *args, **kwargs: torch.optim.SGD(*args, momentum=0.5, **kwargs)},
    ],
    ids=["rows", "sampled", "layerwise", "loop", "heads", "momentum"],
)
def test_whole_steps_from_a_graph_are_those_without(gpu: FakeGpu, options: dict[str, Any]) -> None:
    eager, losses, *_ = train_by_steps(gpu, None, **options)
    graphed, of_graph, optimizer, gem = train_by_steps(gpu, FakeStepGraph, **options)
    for x, y in zip([*graphed, *of_graph], [*eager, *losses], strict=True):
        assert torch.equal(x, y)
    # Three of each task's steps are run by themselves, and the one that makes the momentum.
    eager_steps = 3 * cuda_graph.EAGER_STEPS + bool(optimizer.state)
    assert (FakeGraph.captured, FakeGraph.replayed) == (3, 5 + 10 + 8 - eager_steps)
    assert gem.last is not None


@pytest.mark.parametrize(
    ("new_optimizer", "reason"),
    [
        (torch.optim.Adam, "Adam is neither SGD nor made with capturable=True"),
        (torch.optim.RMSprop, "RMSprop is neither SGD nor made with capturable=True"),
    ],
)
def test_a_step_that_cannot_be_captured_has_its_memory_pass_captured(
    gpu: FakeGpu, new_optimizer: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    eager, losses, *_ = train_by_steps(gpu, None, new_optimizer=new_optimizer, memory_batch=3)
    with caplog.at_level(logging.WARNING, "gem_fast"):
        graphed, of_graph, *_ = train_by_steps(gpu, FakeStepGraph, new_optimizer=new_optimizer, memory_batch=3)
    for x, y in zip([*graphed, *of_graph], [*eager, *losses], strict=True):
        torch.testing.assert_close(x, y)
    assert caplog.messages == [
        f"the whole step runs without a CUDA graph: {reason}, so the memory pass alone is captured"
    ]
    assert FakeGraph.captured == 2


@pytest.mark.parametrize("change", ["lr", "mode", "length", "hook", "state"])
def test_another_graph_where_a_step_is_another(gpu: FakeGpu, change: str, caplog: pytest.LogCaptureFixture) -> None:
    momentum = partial(torch.optim.SGD, momentum=0.5)
    _, _, optimizer, gem = train_by_steps(gpu, FakeStepGraph, new_optimizer=momentum)
    captured = FakeGraph.captured
    n = 4
    with gpu, caplog.at_level(logging.WARNING, "gem_fast"):
        if change == "lr":
            optimizer.param_groups[0]["lr"] = 0.01
        elif change == "mode":
            gem.objective.model.eval()
        elif change == "length":
            n = 3
        elif change == "state":
            optimizer.load_state_dict(optimizer.state_dict())
            for state in optimizer.state.values():
                state["momentum_buffer"] = state["momentum_buffer"].clone()
        else:
            optimizer.register_step_pre_hook(lambda *_: None)
        for _ in range(cuda_graph.EAGER_STEPS + 1):
            gem.step(on_fake_gpu(torch.randn(n, 6)), on_fake_gpu(torch.randint(3, (n,))), 2)
    assert FakeGraph.captured == captured + (change != "hook")
    said = "the whole step runs without a CUDA graph: SGD has step hooks beside this one, so the memory pass alone is "
    assert caplog.messages == ([said + "captured"] if change == "hook" else [])


# ---- on a GPU --------------------------------------------------------------------------------------------------------


class Reads(Loop):
    """Hands a number to the host, which a capture does not allow."""

    def __call__(self, *args: Any) -> Any:
        rows = super().__call__(*args)
        float(rows.G[0, 0])
        return rows


def trained_on_cuda(*, by_step: bool, **options: Any) -> tuple[list[Tensor], GEM]:
    torch.manual_seed(0)
    model = mlp().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=6), **options)
    for x, y, task in stream(3, batches=8):
        noise = torch.randn(x.shape, device="cuda")  # torch's generator is not left in a capture
        train(model, optimizer, gem, [(x.cuda() + 0.01 * noise, y.cuda(), task)], by_step=by_step)
    return [p.detach().cpu() for p in model.parameters()], gem


@pytest.mark.cuda
@pytest.mark.parametrize("by_step", [False, True], ids=["hook", "step"])
@pytest.mark.parametrize("engine", [Loop, Fused])
def test_passes_are_captured_while_the_losses_live(
    engine: Any, by_step: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A training loop keeps its last loss, and with it autograd's nodes of the parameters."""
    eager, _ = trained_on_cuda(by_step=by_step, engine=engine())
    with caplog.at_level(logging.WARNING, "gem_fast"):
        graphed, gem = trained_on_cuda(by_step=by_step, engine=engine(), cuda_graph=True)
    torch.testing.assert_close(graphed, eager)
    assert caplog.messages == []
    graphs = [graphed for graphed in (gem._graphed, gem._step.graphed) if graphed is not None]
    assert any(graphed._graph is not None for graphed in graphs)


@pytest.mark.cuda
@pytest.mark.parametrize("by_step", [False, True], ids=["hook", "step"])
def test_training_goes_on_where_a_capture_fails(by_step: bool, caplog: pytest.LogCaptureFixture) -> None:
    stream_before = torch.cuda.current_stream()
    eager, _ = trained_on_cuda(by_step=by_step, engine=Reads(), memory_batch=3)
    with caplog.at_level(logging.WARNING, "gem_fast"):
        graphed, _ = trained_on_cuda(by_step=by_step, engine=Reads(), memory_batch=3, cuda_graph=True)
    torch.testing.assert_close(graphed, eager)
    assert len(caplog.messages) == (2 if by_step else 1)
    assert all("runs without a CUDA graph: capturing it failed: " in said for said in caplog.messages)
    assert torch.cuda.current_stream() == stream_before
    # Memory that another stream has used comes back to its own.
    side = torch.cuda.Stream()
    x = torch.zeros(10_000_000, device="cuda")
    address = x.data_ptr()
    x.record_stream(side)
    with torch.cuda.stream(side):
        x.add_(1)
    del x
    torch.cuda.synchronize()
    assert torch.zeros(10_000_000, device="cuda").data_ptr() == address
    graph = torch.cuda.CUDAGraph()
    y = torch.zeros(3, device="cuda")
    with torch.cuda.graph(graph):
        y += torch.ones(3, device="cuda")
    graph.replay()
    assert y.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_graph_of_the_second_device() -> None:
    torch.manual_seed(0)
    models = [mlp().to(f"cuda:{k}") for k in (0, 1)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=6), cuda_graph=True)
        device = next(model.parameters()).device
        train(model, optimizer, gem, [(x.to(device), y.to(device), task) for x, y, task in stream(3, batches=8)])
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q.cpu())
