"""Fused passes that go wrong after they were right: found out when a task joins, or in pass 1, 2, 4, 8..."""

import copy
import random
from collections.abc import Callable, Hashable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode
from utils.engines import (
    Memory,
    assert_rows_close,
    assert_untouched,
    half_of_each,
    log_lines,
    memory,
    relu_mlp,
    trained,
)
from utils.forwards import Net
from utils.models import MultiHead, Transformer, classes, mlp, rows, tokens
from utils.states import through_a_file
from utils.training import train

from gem_fast import GEM, Batch, Engine, EpisodicMemory, Fused, Loop, Objective, RowGradients, Sample
from gem_fast.gradients.fused import comparison, verifier
from gem_fast.gradients.fused.schedule import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")

# How G is kept and which examples count. A model that is left to the loop has rows in any case.
WAYS: dict[str, dict[str, Any]] = {
    "rows": {},
    "rows, some anew in each step": {"refresh_every": 2},
    "layerwise": {"row_bytes": 1},
}


class Run:
    """Steps of a fused engine and of the loop on the same model.

    Attributes:
        lines: what was logged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pass_task: bool = False,
        sampled: bool = False,
        engine: Engine | None = None,
        **options: Any,
    ) -> None:
        self.lines: list[str] = []
        self.model = model
        self.engine = Fused(**options) if engine is None else engine
        self._objective = Objective(model, F.cross_entropy, pass_task)
        self._sampled = sampled

    def step(self, batches: Memory) -> Tensor:
        """The engine's G."""
        parameters, sample = trained(self.model), self._sample(batches)
        with log_lines() as lines:
            got = self.engine(self._objective, batches, parameters, sample)
        self.lines += lines
        assert_untouched(self.model)
        return got.G.clone() if isinstance(got, RowGradients) else rows_of(got, len(batches), parameters)

    def assert_as_the_loop(self, batches: Memory, *, bits: bool = False) -> None:
        """A step gives the loop's rows: to rounding, or with the same bits."""
        got = self.step(batches)
        expected = Loop()(self._objective, batches, trained(self.model), self._sample(batches)).G
        if bits:
            assert got.equal(expected)
        else:
            assert_rows_close(got, expected, 1e-10)

    def _sample(self, batches: Memory) -> Sample | None:
        if not self._sampled:
            return None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return half_of_each([len(batch.x) for [batch] in batches])


def rows_of(G: Any, t: int, parameters: list[nn.Parameter]) -> Tensor:
    found = []
    for k in range(t):
        row = [torch.zeros_like(parameter) for parameter in parameters]
        G.combine_(row, torch.eye(t, dtype=torch.float64)[k])
        found.append(torch.cat([part.flatten() for part in row]))
    return torch.stack(found)


def of_task(k: int, x: Tensor) -> list[Batch]:
    return [Batch(k, x, torch.randint(3, (len(x),)))]


# ---- when a task joins -----------------------------------------------------------------------------------------------


class Cut(nn.Module):
    """Cuts the padding that all texts of the mini-batch have, and takes the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 5, padding_idx=0)
        self.body = nn.LSTM(5, 7, batch_first=True)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        longest = int((x != 0).sum(1).max())
        return self.head(self.body(self.words(x[:, :longest]))[1][0][-1])


def texts(length: int, n: int = 12) -> Tensor:
    x = torch.randint(1, 11, (n, 8))
    x[:, length:] = 0
    return x


def small(n: int = 12) -> Tensor:
    return torch.rand(n, 6).double()


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


JOINING: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[[], Tensor]]] = {
    # The model, what the tasks are at first, and the one that joins.
    "padding cut to the longest": (lambda: Cut().double(), lambda: texts(8), lambda: texts(3)),
    "scaled by the largest value": (
        lambda: Net(lambda net, x: net.b(net.a(x / x.abs().max().clamp(min=1)))),
        small,
        lambda: 3 * small(),
    ),
    "where a value is above 1": (
        lambda: Net(lambda net, x: net.b(net.a(x.tanh() if x.max() > 1 else x))),
        small,
        lambda: 1 + small(),
    ),
    "chunks of a fixed number of examples": (
        lambda: Net(lambda net, x: net.b(net.a(torch.cat([centred(part) for part in x.split(6)])))),
        small,
        lambda: small(8),
    ),
    "from a number of examples on": (
        lambda: Net(lambda net, x: net.b(net.a(centred(x) if len(x) > 30 else x))),
        small,
        lambda: small(20),
    ),
}


@pytest.mark.parametrize("sampled", [False, True], ids=["all examples", "a sample"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", JOINING)
def test_a_task_that_joins_is_compared(kind: str, way: str, sampled: bool) -> None:
    make, first, joining = JOINING[kind]
    if sampled and kind in ("chunks of a fixed number of examples", "from a number of examples on"):
        joining = {"c": lambda: small(15), "f": lambda: small(60)}[kind[0]]
    run = Run(make(), sampled=sampled, **WAYS[way])
    batches = [of_task(0, first()), of_task(1, first())]
    for _ in range(5):
        run.assert_as_the_loop(batches)
    assert run.lines == []
    batches.insert(0, of_task(2, joining()))
    for _ in range(3):
        run.assert_as_the_loop(batches, bits=True)
    assert ["mixes the examples" in line for line in run.lines] == [True]


@pytest.mark.parametrize("memory_batch", [None, 5])
@pytest.mark.parametrize("kind", JOINING)
def test_training_ends_as_with_the_loop(kind: str, memory_batch: int | None) -> None:
    make, first, joining = JOINING[kind]
    start = make()
    tasks = [of_task(k, joining() if k == 2 else first())[0] for k in range(5)]
    ends = []
    for engine in (Fused(), Loop()):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=48), memory_batch=memory_batch, engine=engine)
        with log_lines() as lines:
            for task, x, y, *_ in tasks:
                train(model, optimizer, gem, [(x, y, task)] * 4)
        # A sample of few examples may never come to where the model mixes them.
        assert len(lines) in ({0} if isinstance(engine, Loop) else {1} if memory_batch is None else {0, 1})
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert (ends[0] - ends[1]).norm() <= 1e-8 * ends[1].norm()


def test_layerwise_alone_raises_and_does_so_again() -> None:
    run = Run(JOINING["padding cut to the longest"][0](), form="layerwise")
    batches = [of_task(0, texts(8)), of_task(1, texts(8))]
    run.assert_as_the_loop(batches)
    batches.append(of_task(2, texts(3)))
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r'form="layerwise" takes a model .* mixes the examples'):
            run.step(batches)
    assert run.lines == []


# ---- in pass 1, 2, 4, 8... -------------------------------------------------------------------------------------------


class Switched(nn.Module):
    """Another model from some time on: `phase` is set by the user."""

    def __init__(self, change: Callable[["Switched", Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)
        self.phase = 0
        self._change = change
        self.double()

    def forward(self, x: Tensor, task: Hashable = None) -> Tensor:
        x = self._change(self, x) if self.phase else x
        return self.b(torch.tanh(self.a(x)))


SWITCHED: dict[str, Callable[[Switched, Tensor], Tensor]] = {
    "centred on the mean": lambda net, x: centred(x),
    "centred on the mean, with dropout": lambda net, x: F.dropout(centred(x), 0.5),
    "scaled by the number of examples": lambda net, x: x / len(x),
    "sorted": lambda net, x: x.sort(0).values,
    "a weight used outside of its layer": lambda net, x: F.linear(F.linear(x, net.a.weight), net.a.weight.T),
}


@pytest.mark.parametrize("sampled", [False, True], ids=["all examples", "a sample"])
@pytest.mark.parametrize("options", [*WAYS.values(), {"tasks_per_pass": 2}], ids=[*WAYS, "several passes"])
@pytest.mark.parametrize("kind", SWITCHED)
def test_one_task_is_compared_in_pass_8(kind: str, options: dict[str, Any], sampled: bool) -> None:
    model = Switched(SWITCHED[kind])
    run = Run(model, sampled=sampled, **options)
    batches = memory((6, 6, 6, 6), rows, classes)
    for number in range(1, 11):
        model.phase = int(number > 5)
        torch.manual_seed(number)
        if number in (6, 7):
            run.step(batches)  # wrong, and nobody knows yet
            assert run.lines == []
        elif number > 8 and "dropout" in kind:
            run.step(batches)  # rows of the step before have another dropout
        else:
            run.assert_as_the_loop(batches, bits=number >= 8)
    assert len(run.lines) == 1
    assert "differ from those of one backward per task" in run.lines[0]
    assert run.lines[0].endswith("the last comparison, 4 passes ago, found no difference")


def test_a_model_that_takes_the_task() -> None:
    model = Switched(SWITCHED["a weight used outside of its layer"])
    run = Run(model, pass_task=True)
    batches = memory((6, 5, 6), rows, classes)
    for number in range(1, 11):
        model.phase = int(number > 6)
        if number == 7:
            run.step(batches)
        else:
            run.assert_as_the_loop(batches, bits=number >= 8)
    assert len(run.lines) == 1
    heads = Run(MultiHead(4).double(), pass_task=True)
    for t in (2, 3, 4):
        heads.assert_as_the_loop(memory((4, 3, 5, 4)[:t], rows, classes))
    assert heads.lines == []


def test_a_switch_by_a_counter_of_calls() -> None:
    class Counting(Switched):
        calls = 0

        def forward(self, x: Tensor, task: Hashable = None) -> Tensor:
            self.calls += 1
            self.phase = int(self.calls > 40)
            return super().forward(x)

    run = Run(Counting(SWITCHED["centred on the mean"]))
    batches = memory((6, 6, 6), rows, classes)
    found = next(number for number in range(1, 129) if (run.step(batches), run.lines)[1])
    assert found in (16, 32, 64)
    run.assert_as_the_loop(batches, bits=True)


def test_a_running_statistic_is_as_without_the_comparison() -> None:
    """The same bits as of an engine that compares nothing, with dropout and with repeated attempts."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3))
    batches = memory((6, 5, 6), rows, classes, torch.float32)
    compare, calls = comparison.compare, []

    def first_differs(*args: Any) -> None:
        calls.append(number)
        if calls.count(number) == 1:
            raise comparison.RowsDiffer("the gradients of a differ")
        compare(*args)

    results = []
    for due in (Schedule.due, lambda *args, **options: []):
        twin = copy.deepcopy(model)
        run = Run(twin)
        with mock.patch.object(Schedule, "due", due), mock.patch.object(comparison, "compare", first_differs):
            outcome = []
            for number in range(9):
                torch.manual_seed(number)
                outcome += [run.step(batches), *(buffer.clone() for buffer in twin.buffers())]
        assert run.lines == []
        assert all(mine.equal(right) for mine, right in zip(twin.parameters(), model.parameters(), strict=True))
        results.append(outcome)
    assert len(calls) > 10
    assert all(mine.equal(right) for mine, right in zip(*results, strict=True))


class Streaming(nn.Module):
    """Divides by a running length, which each mini-batch first changes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("length", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.length = 0.7 * self.length + 0.3 * x.detach().norm()
        return self.scale * x / self.length


@pytest.mark.parametrize("sampled", [False, True], ids=["all examples", "a sample"])
@pytest.mark.parametrize("first", [Streaming, lambda: spectral_norm(nn.Linear(6, 6))], ids=["mean", "spectral norm"])
def test_a_task_may_depend_on_what_those_before_it_left_in_buffers(
    first: Callable[[], nn.Module], sampled: bool
) -> None:
    model = nn.Sequential(first(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    run, twin = Run(model, sampled=sampled), Run(copy.deepcopy(model), sampled=sampled, engine=Loop())
    batches = [of_task(k, (k + 1) * torch.randn(6, 6).double()) for k in range(5)]
    for t in (2, 3, 4, 5, 5, 5, 5, 5, 5):
        assert_rows_close(run.step(batches[:t]), twin.step(batches[:t]), 1e-10)
        for mine, right in zip(run.model.buffers(), twin.model.buffers(), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
    assert run.lines == []


def test_a_random_number_for_all_examples_is_the_same_in_both() -> None:
    """The mode that drops nothing does not know it: the loop draws it again."""
    model = Switched(lambda net, x: x * torch.rand((), dtype=x.dtype))
    run = Run(model)
    batches = memory((6, 5, 4), rows, classes)
    for number in range(1, 20):
        model.phase = int(number > 2)
        run.step(batches)
    assert run.lines == []


def test_a_buffer_that_begins_to_count_passes_is_found_out() -> None:
    class Counting(Switched):
        def __init__(self) -> None:
            super().__init__(lambda net, x: (net.calls.add_(1), x)[1])
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    run = Run(Counting())
    batches = memory((6, 5, 6), rows, classes)
    for number in range(1, 9):
        run.model.phase = int(number > 7)
        run.step(batches)
    assert ["the buffer calls is not left as by one pass per task" in line for line in run.lines] == [True]
    assert run.model.calls == 3


class Coarse(nn.Module):
    """Rounds as TF32 does on a GPU: coarsely, and otherwise for another number of examples; not in float64."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return x
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(len(x)))
        return x * (1 + 2**-11 * noise)


class CoarseWhereMany(Coarse):
    """As where cuDNN takes TF32 for the pass of all tasks, and not for one of them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if len(x) > 40 else x


class Mixing(Coarse):
    """Keeps the mean of each call, whatever the tasks of its examples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        self.running_mean.lerp_(x.detach().mean(0), 0.02)
        return super().forward(x)


@pytest.mark.parametrize("options", [{}, {"tasks_per_pass": 1}, {"form": "layerwise"}])
def test_running_statistics_may_differ_by_rounding(options: dict[str, Any]) -> None:
    """One that is almost zero has no digit in common, be it in the first comparison or in a later one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), Coarse(), nn.BatchNorm1d(64, momentum=1.0), nn.Tanh(), nn.Linear(64, 3))
    run = Run(model, **options)
    batches = memory((40, 40, 40), rows, classes, torch.float32)
    for t in (2, 3, 3, 3, 3):
        run.step(batches[:t])
    assert run.lines == []


@pytest.mark.parametrize("options", [{}, {"form": "layerwise"}])
@pytest.mark.parametrize("may_be_tf32", [True, False])
def test_passes_may_round_otherwise_than_the_loop_where_there_is_tf32(
    options: dict[str, Any], may_be_tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_may_be_tf32", lambda x: may_be_tf32 and x.dtype == torch.float32)
    torch.manual_seed(0)
    layers = [CoarseWhereMany(), nn.Linear(6, 64), nn.BatchNorm1d(64, momentum=1.0), nn.Tanh()]
    layers += [CoarseWhereMany(), nn.Linear(64, 64), nn.BatchNorm1d(64, momentum=1.0), nn.Tanh(), nn.Linear(64, 3)]
    run = Run(nn.Sequential(*layers), **options)
    batches = memory((40, 40, 40), rows, classes, torch.float32)
    if options and not may_be_tf32:
        with pytest.raises(RuntimeError, match="running_mean is not left as by one pass per task"):
            run.step(batches)
        return
    for t in (2, 3, 3, 3, 3):
        run.step(batches[:t])
    assert len(run.lines) == (0 if may_be_tf32 else 1)


@pytest.mark.parametrize("may_be_tf32", [True, False])
def test_a_statistic_that_differs_by_more_than_rounding_is_found(
    may_be_tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_may_be_tf32", lambda x: may_be_tf32 and x.dtype == torch.float32)
    assert_mixing_is_found(Mixing())


def test_a_statistic_that_is_another_one_in_float64_is_no_rounding() -> None:
    class Doubling(Mixing):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2 if x.dtype == torch.float64 else x)

    assert_mixing_is_found(Doubling())


def assert_mixing_is_found(module: nn.Module) -> None:
    run = Run(nn.Sequential(nn.Linear(6, 64), module, nn.Tanh(), nn.Linear(64, 3)))
    run.step(memory((40, 40), rows, classes, torch.float32))
    assert ["running_mean is not left as by one pass per task" in line for line in run.lines] == [True]


@pytest.mark.parametrize("make", [mlp, lambda: Transformer(dropout=0.3)], ids=["mlp", "dropout"])
def test_no_generator_of_the_users_moves(make: Callable[[], nn.Module]) -> None:
    run = Run(make())
    inputs = rows if isinstance(run.model, nn.Sequential) else tokens
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with torch.random.fork_rng():
        batches = memory((5, 4, 6), inputs, classes, torch.float32)
    versions = [parameter._version for parameter in run.model.parameters()]
    for t in (2, 3, 3, 3, 3):
        run.step(batches[:t])
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert [parameter._version for parameter in run.model.parameters()] == versions
    assert run.lines == []


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_a_relu_that_rounding_flips_is_no_mistake(attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(relu_mlp((6, 8, 3)))
    batches = memory((5, 4, 6), rows, classes, torch.float32)
    run.step(batches)
    compare, left = comparison.compare, attempts

    def first_differ(*args: Any) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise comparison.RowsDiffer("the gradients of a differ")
        compare(*args)

    monkeypatch.setattr(comparison, "compare", first_differ)
    run.step(batches)
    assert [line.endswith("the gradients of a differ") for line in run.lines] == [True] * (attempts == 3)


def test_a_flip_at_exactly_these_parameters_is_none_at_others() -> None:
    """A ReLU whose input the two passes see on different sides of zero."""
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    exact = [parameter.detach().clone() for parameter in model.parameters()]

    def flipped(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        is_here = all(p.detach().equal(e) for p, e in zip(model.parameters(), exact, strict=True))
        return 3 * y if is_here and len(y) > 6 else y

    model[0].register_forward_hook(flipped)
    run = Run(model)
    run.step(memory((6, 5, 6), rows, classes, torch.float32))
    assert run.lines == []


# ---- gradients that are rounding -------------------------------------------------------------------------------------


def fitted(model: nn.Sequential, batches: Memory, logit: float) -> Memory:
    """The same inputs with the model's own answers as targets, and the model so sure of each as this logit's margin."""
    last = model[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        best = model(torch.cat([batch.x for [batch] in batches])).topk(2).values
        last.weight.mul_(logit / float((best[:, 0] - best[:, 1]).min()))
        last.bias.mul_(logit / float((best[:, 0] - best[:, 1]).min()))
        return [[batch._replace(y=model(batch.x).argmax(1))] for [batch] in batches]


@settings(max_examples=25)
@given(logit=st.floats(12.0, 20.0), seed=st.integers(0, 99), examples=st.integers(1, 3), shortcuts=st.booleans())
def test_gradients_that_are_rounding_are_no_mistake(logit: float, seed: int, examples: int, shortcuts: bool) -> None:
    """Of examples that fit to the last digits of their probabilities."""
    torch.manual_seed(seed)
    model = relu_mlp((6, 8, 3))
    batches = fitted(model, memory((examples,) * 4, rows, classes, torch.float32), logit)
    run = Run(model, shortcuts=shortcuts)
    for t in (2, 3, 4, 4):
        run.step(batches[:t])
    assert run.lines == []


@pytest.mark.parametrize("logit", [1.0, 12.0, 16.0])
def test_a_mistake_beside_rounding_is_found(logit: float) -> None:
    """One task fits, another does not, and the model mixes their examples."""

    class Centred(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0) if len(x) > 4 else x)

    torch.manual_seed(0)
    model = Centred(*relu_mlp((6, 8, 3)))
    batches = memory((4, 4, 4), rows, classes, torch.float32)
    batches[:1] = fitted(model, batches[:1], logit)
    run = Run(model)
    run.assert_as_the_loop(batches, bits=True)
    assert len(run.lines) == 1


# ---- shortcuts -------------------------------------------------------------------------------------------------------


def test_a_module_that_becomes_another_is_seen_at_once() -> None:
    class Cube(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return x**3

    model = relu_mlp((6, 8, 3)).double()
    run = Run(model)
    batches = memory((6, 5, 6), rows, classes)
    for _ in range(4):
        run.assert_as_the_loop(batches)
    model[1].__class__ = Cube
    for _ in range(3):
        run.assert_as_the_loop(batches)
    assert run.lines == []


def test_a_forward_that_changes_behind_the_shortcuts_back(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(relu_mlp((6, 8, 3)).double())
    batches = memory((6, 5, 6), rows, classes)
    for _ in range(6):
        run.assert_as_the_loop(batches)
    monkeypatch.setattr(nn.ReLU, "forward", lambda module, x: x**3)
    run.step(batches)
    assert run.lines == []
    run.assert_as_the_loop(batches, bits=True)  # pass 8
    assert len(run.lines) == 1


# ---- what comes after, and resumed runs ------------------------------------------------------------------------------


def test_a_model_once_left_to_the_loop_is_compared_on_all_tasks_when_it_changes() -> None:
    make, first, joining = JOINING["padding cut to the longest"]
    run = Run(make())
    batches = [of_task(0, first()), of_task(1, first())]
    run.step(batches)
    batches += [of_task(2, joining()), of_task(3, first())]
    run.assert_as_the_loop(batches, bits=True)
    for _ in range(4):
        run.model.head.requires_grad_(not run.model.head.weight.requires_grad)
        run.assert_as_the_loop(batches, bits=True)
    assert len(run.lines) == 5


@pytest.mark.parametrize("refresh_every", [1, 3])
@pytest.mark.parametrize("saved", [3, 8, 9])
def test_a_resumed_run_does_the_same(saved: int, refresh_every: int) -> None:
    """Whether it is saved before the model changes, or after that is found out in pass 8."""
    model = Switched(SWITCHED["sorted"])
    run = Run(model, refresh_every=refresh_every)
    batches = memory((6,) * 7, rows, classes)
    resumed: Run | None = None
    for number in range(1, 12):
        model.phase = int(number > 5)
        expected = run.step(batches)
        if resumed is not None:
            assert resumed.step(batches).equal(expected)
        if number == saved:
            resumed = Run(model, refresh_every=refresh_every)
            resumed.engine.load_state_dict(through_a_file(run.engine.state_dict()))
    assert resumed is not None
    assert resumed.engine.state_dict()["schedule"] == run.engine.state_dict()["schedule"]
    # One that resumes after the loop took over says so again, for its own log.
    assert len(run.lines) == len(resumed.lines) == 1


def test_a_resumed_run_compares_its_first_pass() -> None:
    """So that it finds out sooner what the uninterrupted run finds in pass 8."""
    model = Switched(SWITCHED["sorted"])
    run, resumed = Run(model), Run(model)
    batches = memory((6,) * 3, rows, classes)
    for number in range(1, 7):
        model.phase = int(number > 5)
        run.step(batches)
    resumed.engine.load_state_dict(through_a_file(run.engine.state_dict()))
    resumed.assert_as_the_loop(batches, bits=True)
    assert run.lines == []
    assert len(resumed.lines) == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reason": 3}, "reason of the state must be a string or None, got int"),
        ({"schedule": 3}, "schedule of the state must be a dictionary, got int"),
        ({"schedule": {"passes": -1, "tasks": []}}, "passes must be an integer between 0 and .*, got -1"),
        ({"schedule": {"passes": 1, "tasks": 2}}, "tasks of the state must be a list, got int"),
        ({"schedule": {"passes": 1, "tasks": [torch.ones(1)]}}, "tasks must be a number, .* got Tensor"),
    ],
)
def test_bad_states(change: dict[str, Any], sentence: str) -> None:
    engine = Fused()
    before = engine.state_dict()
    with pytest.raises(ValueError, match=sentence):
        engine.load_state_dict({**before, **change})
    assert engine.state_dict() == before


@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=2, unique=True), max_size=40), st.integers(0, 40))
def test_schedule(steps: list[list[str]], saved: int) -> None:
    schedule, known = Schedule(), set()
    for number, tasks in enumerate(steps, 1):
        if number == saved:
            schedule = Schedule.from_state(through_a_file(schedule.state_dict()))
        due = schedule.due(tasks, is_new=False)
        assert due == schedule.due(tasks, is_new=False)
        compared = {tasks[k] for k in due}
        new = set(tasks) - known
        assert new <= compared
        is_power = number & (number - 1) == 0
        assert len(compared - new) == bool((new or is_power) and known & set(tasks))
        known |= new
        schedule.passed(tasks, due)


def test_attention_as_one_operator_drops_nothing_in_a_comparison() -> None:
    """As a GPU's kernels have it; the one for a CPU takes a probability, but refuses to drop."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q, k, v = (torch.randn(2, 2, 3, 4, requires_grad=True) for _ in range(3))
    expected = attend(q, k, v)[0]
    expected.sum().backward()
    grads = [x.grad for x in (q, k, v)]
    for arguments, named in (((q, k, v, 0.5), {}), ((q, k, v), {"dropout_p": 0.5})):
        q.grad = k.grad = v.grad = None
        with verifier._NothingDropped():
            output = attend(*arguments, **named)[0]
            output.sum().backward()
        assert output.equal(expected)
        assert all(x.grad.equal(grad) for x, grad in zip((q, k, v), grads, strict=True))


def test_a_comparison_of_long_rows_is_in_float64_by_blocks() -> None:
    """Rows of 100 million numbers take 0.8 GB each in float64."""
    created: list[int] = []

    class Float64(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dtype == torch.float64:
                created.append(result.numel())
            return result

    model = nn.Linear(100, 100)
    parameters = list(model.parameters())
    expected = torch.randn(1, sum(x.numel() for x in parameters))
    got = expected.clone()
    with mock.patch.object(comparison, "_BLOCK", 64), Float64():
        comparison.compare(model, parameters, expected, got)
        got[0, 5000:] = 0.0  # a part of the weight and all of the bias
        with pytest.raises(comparison.RowsDiffer, match="weight"):
            comparison.compare(model, parameters, expected, got)
    assert created
    assert max(created) <= 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_comparison_changes_no_row(dtype: torch.dtype) -> None:
    model = nn.Linear(9, 9).to(dtype)
    expected = torch.randn(1, 90, dtype=dtype)
    got = expected.clone()
    before = expected.clone()
    comparison.compare(model, list(model.parameters()), expected, got)
    assert expected.equal(before)
    assert got.equal(before)
