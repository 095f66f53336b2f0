"""Observed batches and projected steps that do not go together are said once; loops that are right hear nothing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from utils.models import mlp, stream

from gem_fast import AGEM, GEM, EpisodicMemory

UNPROTECTED = "two optimizer steps ran without gem.observe in between"
MISSED = "no step of the"


def lines(caplog: pytest.LogCaptureFixture, which: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if which in record.getMessage()]


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def by_task(tasks: int) -> list[list[tuple[Tensor, Tensor]]]:
    return [[(x, y) for x, y, which in stream(tasks) if which == task] for task in range(tasks)]


# ---- the current task ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [GEM, AGEM])
@pytest.mark.parametrize("name", ["its id", "None"])
def test_a_memory_filled_at_a_tasks_end(rule: type[GEM], name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    optimizer = sgd(model)
    gem = rule(model, optimizer, memory=EpisodicMemory(per_task=8))
    for task, batches in enumerate(by_task(4)):
        gem.current_task = task if name == "its id" else None
        for x, y in batches:
            backward(model, optimizer, x, y)
            optimizer.step()
            assert gem.past_tasks == list(range(task))
            assert (gem.last is None) == (task == 0)
        for x, y in batches:
            gem.observe(x, y, task)
        assert gem.current_task == task
    assert lines(caplog, UNPROTECTED) == lines(caplog, MISSED) == []


def test_a_finished_task_that_counts_as_current_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    optimizer = sgd(model)
    gem = GEM(model, optimizer)
    for task, batches in enumerate(by_task(4)):
        for x, y in batches:
            backward(model, optimizer, x, y)
            optimizer.step()
        for x, y in batches:
            gem.observe(x, y, task)
    [line] = lines(caplog, UNPROTECTED)
    assert "task 0" in line
    assert "set gem.current_task" in line


@pytest.mark.parametrize("steps", [1, 2])
def test_only_two_steps_in_a_row_are_said(steps: int, caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    optimizer = sgd(model)
    gem = GEM(model, optimizer)
    for x, y, task in stream(3):
        backward(model, optimizer, x, y)
        gem.observe(x, y, task)
        for _ in range(steps):
            optimizer.step()
    assert len(lines(caplog, UNPROTECTED)) == steps - 1


def test_the_state_keeps_the_current_task() -> None:
    model = mlp()
    gem = GEM(model, sgd(model))
    x, y, _ = next(stream(1))
    for task in ("a", "b"):
        gem.observe(x, y, task)
    for current in ("new", None, "a"):
        gem.current_task = current
        other = GEM(model, sgd(model))
        other.load_state_dict(gem.state_dict())
        assert other.current_task == current
        assert other.past_tasks == gem.past_tasks == [task for task in ("a", "b") if task != current]


@pytest.mark.parametrize(("bad", "got"), [(torch.tensor(1), "a tensor"), ([1], "list")])
def test_bad_current_tasks(bad: object, got: str) -> None:
    model = mlp()
    gem = GEM(model, sgd(model))
    gem.current_task = "before"
    with pytest.raises(TypeError, match=f"task must be a hashable id such as an int or a string, got {got}"):
        gem.current_task = bad
    assert gem.current_task == "before"


def test_none_is_no_tasks_id() -> None:
    model = mlp()
    gem = GEM(model, sgd(model))
    x, y, _ = next(stream(1))
    with pytest.raises(TypeError, match=r"task must be a hashable id .* got None, which stands for no task"):
        gem.observe(x, y, None)


# ---- steps that the hook does not see --------------------------------------------------------------------------------


class Outer(torch.optim.Optimizer):
    """An optimizer that steps through another one, which it keeps under a name of its own."""

    def __init__(self, params, base: type[torch.optim.Optimizer], **options: float) -> None:
        super().__init__(params, options)
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    def second_step(self) -> None:
        self.base.step()


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("observe_first", [False, True])
def test_an_optimizer_inside_an_optimizer(
    base: type[torch.optim.Optimizer], observe_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for inside in (False, True):
        caplog.clear()
        model = mlp()
        optimizer = Outer(model.parameters(), base, lr=0.1)
        gem = GEM(model, optimizer.base if inside else optimizer)
        for x, y, task in stream(3):
            if observe_first:
                gem.observe(x, y, task)
            backward(model, optimizer, x, y)
            if not observe_first:
                gem.observe(x, y, task)
            optimizer.second_step()
        assert (gem.last is not None) == inside
        if inside:
            assert caplog.records == []
        else:
            [line] = lines(caplog, MISSED)
            assert "the Outer that GEM is attached to" in line
            assert "attach GEM to the optimizer whose step changes the parameters" in line


def test_a_closure_that_the_optimizer_does_not_call_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Ignoring(torch.optim.Optimizer):
        def step(self, closure=None):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p -= 0.1 * p.grad

    model = mlp()
    optimizer = Ignoring(model.parameters(), {})
    gem = GEM(model, optimizer)
    for x, y, task in stream(2):
        backward(model, optimizer, x, y)
        gem.observe(x, y, task)
        optimizer.step(lambda: 0.0)
    assert len(lines(caplog, MISSED)) == 1


ACTIONS = st.sampled_from(
    ["backward", "observe", "fill", "step", "skip", "evaluate", "clip", "load", "freeze", "state"]
)


@settings(max_examples=40)
@given(st.lists(ACTIONS, max_size=25))
def test_no_order_of_right_loops_is_said_to_miss_steps(actions: list[str]) -> None:
    """Accumulation, filling, skipped steps, evaluation, weights written after a step, loading, freezing."""
    model = mlp()
    optimizer = sgd(model)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=4))
    x, y, _ = next(stream(1))
    has_loaded = False
    for i, action in enumerate(actions):
        if action == "backward" and model[0].weight.requires_grad:
            F.cross_entropy(model(x), y).backward()
        elif action == "observe":
            gem.observe(x, y, i // 5)
        elif action == "fill":
            for part in (slice(0, 2), slice(2, 5)):
                gem.observe(x[part], y[part], i // 5)
        elif action in ("step", "clip"):
            optimizer.step()
            if action == "clip":
                with torch.no_grad():
                    model[0].weight.clamp_(-1, 1)
        elif action == "skip":  # GradScaler calls no step
            optimizer.zero_grad()
        elif action == "evaluate":
            with torch.no_grad():
                model.eval()(x)
            model.train()
        elif action == "load" and not has_loaded:
            has_loaded = True
            model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
        elif action == "freeze":
            for p in model[0].parameters():
                p.requires_grad_(not p.requires_grad)
    assert not gem._watch._said_changes


def test_a_detached_hook_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    optimizer = sgd(model)
    with GEM(model, optimizer) as gem:
        pass
    for x, y, task in stream(2):
        backward(model, optimizer, x, y)
        gem.observe(x, y, task)
        optimizer.step()
        optimizer.step()
    assert caplog.records == []
