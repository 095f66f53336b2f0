"""One projection per step: after the step's closure, and once where a step calls that of its base class."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from utils.asserts import assert_same_bits
from utils.models import mlp, stream

from gem_fast import AGEM, GEM, EpisodicMemory

Make = Callable[[nn.Module], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "rprop": lambda model: torch.optim.Rprop(model.parameters(), lr=0.01),
}


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, gem: GEM, how: str, *, zero_first: bool = False) -> None:
    for x, y, task in stream(3):

        def closure(x: Tensor = x, y: Tensor = y, task: int = task) -> Tensor:
            if zero_first:
                optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if not zero_first:  # Lightning's order
                optimizer.zero_grad()
            loss.backward()
            gem.observe(x, y, task)
            return loss

        if how == "none":
            closure()
            optimizer.step()
        elif how == "position":
            assert optimizer.step(closure) is not None
        elif how == "keyword":
            assert optimizer.step(closure=closure) is not None
        elif how == "scaler":  # an enabled one takes none
            assert torch.amp.GradScaler("cpu", enabled=False).step(optimizer, closure) is not None
        else:
            closure()
            optimizer.step(None)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rule", [GEM, AGEM])
@pytest.mark.parametrize("zero_first", [False, True])
def test_as_a_step_without_closure(name: str, rule: type[GEM], zero_first: bool) -> None:
    results = []
    for how in ("none", "position", "keyword", "None", "scaler"):
        torch.manual_seed(0)
        model = mlp()
        optimizer = OPTIMIZERS[name](model)
        gem = rule(model, optimizer, memory=EpisodicMemory(per_task=8))
        train(model, optimizer, gem, how, zero_first=zero_first)
        assert gem.last is not None
        results.append(weights(model))
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_the_closures_value_comes_back_and_it_runs_with_gradients_once() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer)
    calls = []

    def closure() -> str:
        calls.append(torch.is_grad_enabled())
        return "loss"

    x, y, _ = next(stream(1))
    for task in range(2):
        gem.observe(x, y, task)
        with torch.no_grad():
            assert optimizer.step(closure) == "loss"
    assert calls == [True, True]
    assert gem.last is not None


def test_the_closure_runs_before_an_enabled_scalers_step() -> None:
    """As in Lightning's mixed precision: gradients are projected unscaled, and a step with an infinite one is none."""
    results = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = mlp(torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=8))
        for i, (x, y, task) in enumerate(stream(3)):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x.double()), y)).backward()
            gem.observe(x.double(), y, task)
            if i == 5:
                model[0].bias.grad[0] = float("inf")
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update(scale)
        assert gem.last is not None
        results.append(weights(model))
    assert torch.allclose(*results, rtol=1e-6)


@pytest.mark.parametrize("how", ["position", "keyword"])
def test_an_error_in_the_closure_stops_the_step_and_the_next_one_is_as_ever(how: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer)
    train(model, optimizer, gem, how)
    before, last = weights(model), gem.last

    def fails() -> Tensor:
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        optimizer.step(fails) if how == "position" else optimizer.step(closure=fails)
    assert_same_bits(weights(model), before)
    assert gem.last is last
    train(model, optimizer, gem, how)
    assert gem.last is not last


class Twice(torch.optim.Optimizer):
    """As line searches do: the closure is optional, and is called more than once."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            with torch.enable_grad():
                closure()
                return closure()
        return None


def test_a_second_call_of_the_closure_is_refused() -> None:
    model = mlp()
    optimizer = Twice(model.parameters())
    gem = GEM(model, optimizer)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"step must call its closure once when GEM is attached, .* from Twice$"):
        train(model, optimizer, gem, "position")
    assert_same_bits(weights(model), before)
    train(model, optimizer, gem, "none")
    assert gem.last is not None


def test_a_detached_hook_leaves_closures_alone() -> None:
    model = mlp()
    optimizer = Twice(model.parameters())
    with GEM(model, optimizer) as gem:
        pass
    train(model, optimizer, gem, "position")
    assert gem.last is None


def test_other_arguments_and_later_hooks() -> None:
    class WithOption(torch.optim.Optimizer):
        def step(self, closure: Any = None, scale: float = 1.0) -> Any:
            options.append(scale)
            return closure and closure()

    options: list[float] = []
    model = mlp()
    optimizer = WithOption(model.parameters(), {})
    GEM(model, optimizer)
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda _, args, kwargs: seen.append((len(args), sorted(kwargs))))
    optimizer.step(lambda: 1.0, 2.0)
    optimizer.step(closure=lambda: 1.0, scale=3.0)
    optimizer.step(scale=4.0)
    assert options == [2.0, 3.0, 4.0]
    assert seen == [(3, []), (1, ["closure", "scale"]), (1, ["scale"])]


# ---- a step that calls its base class's ------------------------------------------------------------------------------


class Derived(torch.optim.SGD):
    """Does something of its own before and after; torch runs the hooks in this step and in SGD's."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.clamp_(-2, 2)
        return loss


class Evaluating(torch.optim.SGD):
    """Calls the closure itself."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(1.0)
        super().step()
        return loss


@pytest.mark.parametrize("how", ["none", "position", "keyword"])
@pytest.mark.parametrize("kind", [Derived, Evaluating])
def test_a_step_within_a_step_is_one(kind: type[torch.optim.SGD], how: str, caplog: pytest.LogCaptureFixture) -> None:
    results = []
    for make in (torch.optim.SGD, kind):
        torch.manual_seed(0)
        model = mlp()
        optimizer = make(model.parameters(), lr=0.1)
        gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=8), margin=0.5)
        train(model, optimizer, gem, how)
        results.append(weights(model))
    assert_same_bits(*results)
    assert caplog.records == []


def test_a_step_after_one_that_failed_is_a_new_one() -> None:
    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise KeyError
            return super().step(closure)

    model = mlp()
    optimizer = Failing(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer)
    train(model, optimizer, gem, "none")
    for set_to_none in (True, False):
        last = gem.last
        for optimizer.fails in (True, False):
            x, y, _ = next(stream(1))
            optimizer.zero_grad(set_to_none)
            F.cross_entropy(model(x), y).backward()
            gem.observe(x, y, "next")
            try:
                optimizer.step()
            except KeyError:
                assert optimizer.fails
            assert gem.last is not last
            last = gem.last
