"""What an engine is: one of yours in the hook, a rule of yours in the fused pass, G as an operator in project_."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from utils.engines import assert_as_the_loop, loop, memory, trained
from utils.models import classes, mlp, rows, stream
from utils.training import train

import gem_fast
from gem_fast import GEM, Constraint, Engine, EpisodicMemory, Objective, RowGradients, Sample, TaskGradients, project_
from gem_fast.gradients.fused import rules

SIZES = (4, 3, 4, 5)


class Explicit:
    """G as a matrix that knows nothing of operators of our own."""

    def __init__(self, G: Tensor) -> None:
        self.matrix = G.double()
        self.depends = [True] * 4

    def gram(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        g = torch.cat([grad.flatten() for grad in grads]).double()
        return self.matrix @ self.matrix.T, self.matrix @ g

    def combine_(self, grads: Sequence[Tensor], v: Tensor) -> None:
        parts = (v @ self.matrix).split([grad.numel() for grad in grads])
        for grad, part in zip(grads, parts, strict=True):
            grad += part.view_as(grad)


class Vmapped(Engine):
    """Per-task gradients by torch.func: what a user may have already."""

    def __call__(
        self,
        objective: Objective,
        constraints: Sequence[Constraint],
        parameters: Sequence[Parameter],
        sample: Sample | None = None,
    ) -> TaskGradients:
        names = [name for name, _ in objective.model.named_parameters()]

        def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return objective.scalar_loss(torch.func.functional_call(objective.model, values, (x,)), y)

        values = {name: p.detach() for name, p in objective.model.named_parameters()}
        per_task = [torch.func.grad(loss)(values, batch.x, batch.y) for [batch] in constraints]
        return Explicit(torch.stack([torch.cat([grads[name].flatten() for name in names]) for grads in per_task]))


def after_training(engine: Any) -> list[Tensor]:
    torch.manual_seed(0)
    model = mlp(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=8), engine=engine)
    train(model, optimizer, gem, stream(4, dtype=torch.float64))
    assert gem.last is not None
    assert gem.last.multipliers.equal(gem.last.v)
    state = gem.state_dict()
    of_fused = {"rows", "schedule", "reason", "call_per_task"}
    assert state["engine"].keys() == (set() if isinstance(engine, Vmapped) else of_fused)
    gem.load_state_dict(state)
    return [p.detach() for p in model.parameters()]


def test_an_engine_of_ones_own() -> None:
    for mine, right in zip(after_training(Vmapped()), after_training("auto"), strict=True):
        assert (mine - right).norm() <= 1e-10 * right.norm()


@pytest.mark.parametrize("engine", ["fast", None, gem_fast.Fused])
def test_what_is_no_engine_is_refused(engine: Any) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r'engine must be "auto", gem_fast\.Fused.* or another gem_fast\.Engine, got '):
        GEM(model, optimizer, engine=engine)
    GEM(model, optimizer)  # nothing was attached


def test_a_state_for_an_engine_without_one() -> None:
    engine = Vmapped()
    engine.load_state_dict({})
    with pytest.raises(ValueError, match="engine must have no keys, got rows"):
        engine.load_state_dict({"rows": {}})


@pytest.mark.parametrize(("margin", "ridge"), [(0.0, 0.0), (0.5, 0.0), (0.5, 1e-3)])
def test_every_form_of_G_projects_the_same(margin: float, ridge: float) -> None:
    model = mlp(torch.float64)
    G = loop(model)(memory(SIZES, rows, classes), trained(model)).G
    kept = RowGradients()
    kept.begin_step(list(range(len(G))), trained(model))
    kept.G.copy_(G)
    for g in (-G.mean(0), torch.randn_like(G[0]) - G[0], G.sum(0)):
        sizes = [p.numel() for p in model.parameters()]
        results = []
        for form in (G, kept, Explicit(G)):
            grads = [part.clone() for part in g.split(sizes)]
            results.append((project_(grads, form, margin, ridge), torch.cat(grads)))
        (expected, right), *others = results
        for got, mine in others:
            assert torch.allclose(mine, right, rtol=1e-9, atol=1e-11)
            assert torch.allclose(got.v, expected.v, rtol=1e-7, atol=1e-9)
            assert torch.allclose(got.q, expected.q, rtol=1e-10, atol=1e-12)
            assert int(got.status) == int(expected.status) == 0
            assert got.violations.equal(expected.violations)


def test_what_is_no_form_of_G_is_refused() -> None:
    with pytest.raises(TypeError, match="G must be a tensor or a TaskGradients, got list"):
        project_([torch.zeros(3)], [[0.0] * 3])  # type: ignore[arg-type]


# ---- rules of one's own ----------------------------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Wider(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weight


@contextmanager
def registered(module_type: type[nn.Module], rule: Callable[..., Any]) -> Iterator[None]:
    before = dict(rules._RULES)
    try:
        assert gem_fast.register_rule(module_type)(rule) is rule
        yield
    finally:
        rules._RULES.clear()
        rules._RULES.update(before)


def scale_by(factor: float, calls: list[int]) -> Callable[..., Any]:
    def rule(recorder: Any, module: Scale, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        calls.append(1)
        x, dim = recorder.per_example(module, input)
        output = forward(x)

        def write(grad: Tensor, tasks: Any, out: Tensor) -> None:
            tasks.sum(factor * grad * x.detach(), out)

        recorder.use(module.weight, output, dim, write, module=module, reads=x)
        return output

    return rule


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_registered_rule_is_taken_and_verified(factor: float) -> None:
    calls: list[int] = []
    model = nn.Sequential(Scale(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    with registered(Scale, scale_by(factor, calls)):
        # A rule that is wrong is found out.
        wrong = None if factor == 1.0 else "the gradients of 0.weight differ"
        assert_as_the_loop(model.double(), memory(SIZES, rows, classes), fallback=wrong)
    assert calls


def test_a_rule_is_for_exactly_one_type() -> None:
    calls: list[int] = []
    with registered(Scale, scale_by(1.0, calls)):
        assert_as_the_loop(nn.Sequential(Wider(), nn.Linear(6, 3)).double(), memory(SIZES, rows, classes))
    assert calls == []
