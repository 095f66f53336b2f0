"""Optimizers and models inside of wrappers: what is found, what it does there, what is refused."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from utils.asserts import assert_same_bits
from utils.models import MultiHead, mlp, stream
from utils.training import sgd, train

from gem_fast import AGEM, GEM, EpisodicMemory
from gem_fast.wrappers import inner_optimizer, task_parameter

# ---- optimizers ------------------------------------------------------------------------------------------------------


class Delegating(torch.optim.Optimizer):
    """Accelerate's: an Optimizer whose constructor was never called, with everything in the one inside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.optimizer.step(closure)


class Lookahead(torch.optim.Optimizer):
    """timm's of older versions, and torch_optimizer's."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._base_optimizer = base
        self.param_groups = base.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._base_optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return self._base_optimizer.step(closure)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation, as in its best known implementation."""

    def __init__(self, params: Any, base: type[torch.optim.Optimizer], **options: float) -> None:
        super().__init__(params, options)
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.base_optimizer.step()


class Handle:
    """No Optimizer at all."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.base_optimizer = optimizer
        self.param_groups = list(optimizer.param_groups)

    def step(self) -> None:
        self.base_optimizer.step()

    def zero_grad(self) -> None:
        self.base_optimizer.zero_grad()


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "constructor not called": lambda model: Delegating(sgd(model)),
    "base optimizer": lambda model: Lookahead(sgd(model)),
    "SAM": lambda model: SAM(model.parameters(), torch.optim.SGD, lr=0.1),
    "no optimizer": lambda model: Handle(sgd(model)),
    "two around it": lambda model: Delegating(Lookahead(sgd(model))),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_step_inside_is_projected(name: str) -> None:
    results = []
    for wrap in (sgd, WRAPPERS[name]):
        torch.manual_seed(0)
        model = mlp()
        optimizer = wrap(model)
        gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=8))
        train(model, optimizer, gem, stream(3))
        assert gem.last is not None
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_same_bits(*results)


def test_a_wrapped_optimizer_has_one_hook() -> None:
    model = mlp()
    optimizer = sgd(model)
    GEM(model, Delegating(optimizer))
    for again in (optimizer, Delegating(optimizer), Lookahead(Delegating(optimizer))):
        with pytest.raises(RuntimeError, match="must have no hook of gem_fast yet"):
            AGEM(model, again)


def test_an_optimizer_with_another_one_for_other_parameters_is_taken_as_it_is() -> None:
    """One that gives some parameters to an AdamW of its own, say, is no wrapper: it steps the others itself."""
    model = mlp()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    optimizer.optimizer = torch.optim.AdamW(model[2].parameters())
    assert inner_optimizer(optimizer) is optimizer
    turning = sgd(model)
    turning.optimizer = turning
    assert inner_optimizer(turning) is turning
    copied = torch.optim.SGD(model.parameters(), lr=0.1)
    copied.base_optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # the same parameters in other groups
    assert inner_optimizer(copied) is copied


class Hidden(torch.optim.Optimizer):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.inside = optimizer
        self.param_groups = optimizer.param_groups


@pytest.mark.parametrize("attach", [GEM, AGEM])
def test_wrappers_that_hide_their_optimizer_are_refused_by_name(attach: type[GEM]) -> None:
    model = mlp()
    message = "optimizer must be one that takes step hooks, got the wrapper Hidden; pass the optimizer inside"
    with pytest.raises(TypeError, match=message):
        attach(model, Hidden(sgd(model)))
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got list; if it is a wrapper, pass the"):
        attach(model, [sgd(model)])


# ---- models that take the task ---------------------------------------------------------------------------------------


class KeywordOnly(MultiHead):
    def forward(self, x: Tensor, *, task: int) -> Tensor:
        return super().forward(x, task)


class AfterAMask(MultiHead):
    def forward(self, x: Tensor, mask: Tensor | None = None, task: int = 0) -> Tensor:
        assert mask is None
        return super().forward(x, task)


class Labelled(MultiHead):
    """As Avalanche's models."""

    def forward(self, x: Tensor, task_labels: int) -> Tensor:
        return super().forward(x, task_labels)


class Passing(nn.Module):
    """A user's own wrapper."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


class Adapted(nn.Module):
    """PEFT's: a named first input, and the model two attributes further in."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = net
        self.base_model.forward = lambda *args, **kwargs: net(*args, **kwargs)
        self.unrelated = nn.Identity()

    def forward(self, x: Tensor, scale: float = 1.0, **kwargs: Any) -> Any:
        return self.base_model.forward(scale * x, **kwargs)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "by position": MultiHead,
    "keyword-only": KeywordOnly,
    "after another": AfterAMask,
    "task_labels": Labelled,
    "DataParallel": lambda: nn.DataParallel(MultiHead()),
    "compiled": lambda: torch.compile(MultiHead(), backend="eager"),
    "own wrapper": lambda: Passing(KeywordOnly()),
    "adapted": lambda: Adapted(AfterAMask()),
    "adapted, in parallel": lambda: nn.DataParallel(Adapted(Labelled())),
}


@pytest.mark.parametrize("attach", [GEM, AGEM])
@pytest.mark.parametrize("name", MODELS)
def test_every_task_goes_through_its_own_head(name: str, attach: type[GEM]) -> None:
    results = []
    for make in (MultiHead, MODELS[name]):
        torch.manual_seed(0)
        model = make()
        [inner] = [module for module in model.modules() if isinstance(module, MultiHead)]
        optimizer = sgd(model)
        gem = attach(model, optimizer, memory=EpisodicMemory(per_task=8))
        forward = functools.partial(MultiHead.forward, inner)
        train(model, optimizer, gem, stream(3), loss_of=lambda x, y, task, of=forward: F.cross_entropy(of(x, task), y))
        assert gem.objective.pass_task
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*results, atol=1e-6)


def test_which_parameter_takes_the_task() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, task_labels: int, task: int) -> Tensor:
            return x

    class OnlyWords(nn.Module):
        def forward(self, x: Tensor, **task: Any) -> Tensor:
            return x

    class Around(nn.Module):
        """Takes no keywords: what is inside gets none either."""

        def __init__(self) -> None:
            super().__init__()
            self.module = MultiHead()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x, 0)

    class Itself(nn.Module):
        @property
        def base_model(self) -> nn.Module:
            return self

        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return x

    assert task_parameter(Both()) == "task"
    assert [task_parameter(model) for model in (OnlyWords(), Around(), Itself(), mlp())] == [None] * 4
    assert [task_parameter(Passing(Labelled())), task_parameter(Passing(mlp()))] == ["task_labels", None]


def test_a_parameter_of_another_name_takes_the_task_where_it_is_named() -> None:
    class Experience(MultiHead):
        def forward(self, x: Tensor, experience: int) -> Tensor:
            return super().forward(x, experience)

    model = Experience()
    optimizer = sgd(model)
    gem = GEM(model, optimizer, pass_task="experience")
    train(model, optimizer, gem, stream(2), loss_of=lambda x, y, task: F.cross_entropy(model(x, task), y))
    assert gem.last is not None


# ---- torch.jit -------------------------------------------------------------------------------------------------------


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 3)
        self.second = nn.Linear(6, 3)

    def forward(self, x: Tensor, task: int = 0) -> Tensor:
        return self.first(x) if task == 0 else self.second(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # works as long as torch has it
@pytest.mark.parametrize("kind", ["traced", "scripted", "traced layer", "scripted with a task"])
@pytest.mark.parametrize("attach", [GEM, AGEM])
def test_compiled_by_jit(kind: str, attach: type[GEM]) -> None:
    def compiled(model: nn.Module) -> nn.Module:
        if kind == "traced layer":
            return nn.Sequential(torch.jit.trace(model[0], torch.randn(2, 6)), *model[1:])
        return torch.jit.trace(model, torch.randn(2, 6)) if kind == "traced" else torch.jit.script(model)

    results = []
    for convert in (lambda model: model, compiled):
        torch.manual_seed(0)
        model = convert(Scripted() if kind == "scripted with a task" else mlp())
        optimizer = sgd(model)
        gem = attach(model, optimizer, memory=EpisodicMemory(per_task=8))
        assert bool(gem.objective.pass_task) == (kind == "scripted with a task")
        for x, y, task in stream(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x, task=task) if gem.objective.pass_task else model(x), y).backward()
            gem.observe(x, y, task)
            optimizer.step()
        assert gem.last is not None
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*results, atol=1e-6)
