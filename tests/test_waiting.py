"""On a GPU the host never waits: a step enqueues its work and goes on, whatever computes G.

A device that raises where a value would be read (utils/fake_gpu.py) stands in for one. Waiting is allowed where a task
joins the past: its memory is looked through once, and the pass compared with one backward per task. Comparisons that
are due by the number of a step alone wait, too, and are left out here.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from utils.descriptor_models import Hypernetwork, Modulated
from utils.fake_gpu import FakeGpu, Waits, move_to_fake_gpu, on_fake_gpu
from utils.models import MultiHead, mlp

from gem_fast import AGEM, GEM, EpisodicMemory, Fused, Loop, ReservoirMemory, ops, sampling
from gem_fast.gradients.fused.schedule import Schedule


class Words(nn.Module):
    """An embedding with a padding index, attention, and a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.out(self.norm(x + mixed).mean(1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4 * 9, 3)
    )


def vectors(n: int) -> Tensor:
    return torch.randn(n, 6)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, vectors),
    "heads": (lambda: MultiHead(3), vectors),
    "convolutions": (convolutions, lambda n: torch.randn(n, 2, 5, 5)),
    "words": (Words, lambda n: torch.randint(11, (n, 4))),
}
ENGINES: dict[str, Callable[[], Any]] = {
    "rows": lambda: Fused(form="rows"),
    "layerwise": lambda: Fused(form="layerwise"),
    "refresh": lambda: Fused(refresh_every=2),
    "loop": Loop,
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    monkeypatch.setattr(ops, "_DEVICES", ("cpu", "meta"))
    monkeypatch.setattr(sampling, "new_generator", lambda device: torch.Generator())
    gpu, due = FakeGpu(), Schedule.due

    def due_where_it_may_wait(self: Schedule, tasks: Sequence[Hashable], *, is_new: bool) -> list[int]:
        return due(self, tasks, is_new=is_new) if gpu.waits else []

    monkeypatch.setattr(Schedule, "due", due_where_it_may_wait)
    return gpu


def train(
    gpu: FakeGpu,
    model: nn.Module,
    inputs: Callable[[int], Tensor],
    hook: Callable[..., GEM],
    told: dict[int, Tensor] | None = None,
    observed: bool = False,
    in_one_call: bool = False,
) -> GEM:
    """Three tasks of a few steps; only the first step of each may wait.

    told: the tasks' descriptors, if the model takes one; observed: whether the hook gets them with each batch;
    in_one_call: by gem.step.
    """
    with gpu:
        move_to_fake_gpu(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gem = hook(model, optimizer)
        for task, steps in enumerate((3, 2, 4)):
            for i in range(steps):
                x, y = on_fake_gpu(inputs(3)), on_fake_gpu(torch.randint(3, (3,)))
                if in_one_call:
                    gpu.waits = i == 0
                    loss = gem.step(x, y, task)
                    gpu.waits = True
                    assert loss.device == x.device
                    continue
                optimizer.zero_grad()
                given = told[task] if told else task
                output = model(x, given) if told or gem.objective.pass_task else model(x)
                F.cross_entropy(output, y).backward()
                gpu.waits = i == 0
                gem.observe(x, y, task, told[task] if told and observed else None)
                optimizer.step()
                gpu.waits = True
    assert gpu.refused == []
    assert gem.last is not None
    assert len(gem.last.v) == (1 if isinstance(gem, AGEM) else 2)
    return gem


@pytest.mark.parametrize("in_one_call", [False, True], ids=["hook", "step"])
@pytest.mark.parametrize("memory_batch", [None, 4])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_no_step_waits(gpu: FakeGpu, name: str, engine: str, memory_batch: int | None, in_one_call: bool) -> None:
    new_model, inputs = MODELS[name]
    # 8 examples of the first task, 6 of the second: sizes differ, and where 7 are drawn the second has fewer.
    train(
        gpu,
        new_model(),
        inputs,
        lambda model, optimizer: GEM(
            model,
            optimizer,
            memory=EpisodicMemory(per_task=8),
            engine=ENGINES[engine](),
            memory_batch=memory_batch and 7,
        ),
        in_one_call=in_one_call,
    )


def test_no_step_of_agem_waits(gpu: FakeGpu) -> None:
    train(gpu, mlp(), vectors, lambda *of: AGEM(*of, memory=EpisodicMemory(per_task=8), memory_batch=5))


def test_no_step_with_a_reservoir_waits(gpu: FakeGpu) -> None:
    train(gpu, mlp(), vectors, lambda *of: GEM(*of, memory=ReservoirMemory(per_task=5)))


def test_subsets_are_drawn_where_the_memory_is(gpu: FakeGpu) -> None:
    gem = train(gpu, mlp(), vectors, lambda *of: GEM(*of, memory=EpisodicMemory(per_task=8), memory_batch=2))
    assert set(gem.generators.state_dict()) == {"cpu", "meta"}


@pytest.mark.parametrize(
    ("engine", "model", "is_mapping"),
    [
        ("rows", Modulated, True),
        ("rows", Hypernetwork, False),
        ("layerwise", Modulated, False),
        ("layerwise", Hypernetwork, True),
        ("loop", Modulated, True),
    ],
)
def test_no_step_with_descriptors_waits(gpu: FakeGpu, engine: str, model: type[nn.Module], is_mapping: bool) -> None:
    with gpu:
        told = dict(enumerate(torch.randn(3, 4)))
        on_gpu = {task: on_fake_gpu(descriptor) for task, descriptor in told.items()}

    def hook(model: nn.Module, optimizer: torch.optim.Optimizer) -> GEM:
        options = {"descriptors": told} if is_mapping else {}
        memory = EpisodicMemory(per_task=8)
        return GEM(model, optimizer, memory=memory, engine=ENGINES[engine](), memory_batch=4, **options)

    train(gpu, model(), vectors, hook, told=on_gpu, observed=not is_mapping)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: bool((x > 0).any()),
        lambda x: float(x[0, 0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.to("cpu"),
        lambda x: x + torch.ones(2, 3),
        lambda x: x.copy_(torch.ones(2, 3)),
    ],
)
def test_the_device_notices(gpu: FakeGpu, wait: Callable[[Tensor], object]) -> None:
    x = on_fake_gpu(torch.randn(2, 3))
    with gpu:
        wait(x.clone())
        gpu.waits = False
        with pytest.raises(Waits):
            wait(x)
