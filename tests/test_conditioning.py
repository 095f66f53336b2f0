"""Projections of gradients that depend on each other: many tasks, few parameters, few digits.

Float32 products of such gradients once gave steps many times as long as g where the answer is 0.
"""

import logging
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor, nn
from utils.asserts import assert_same_bits
from utils.engines import layerwise_by, memory
from utils.models import classes
from utils.training import train

from gem_fast import AGEM, GEM, Engine, EpisodicMemory, Fused, Loop, Objective, Status, ops, project_
from gem_fast.gradients import LayerwiseGradients, RowGradients
from gem_fast.gradients.fused.task_batch import TaskSizes
from gem_fast.gradients.layerwise import InnerProducts

pytestmark = pytest.mark.usefixtures("one_thread")

Array = NDArray[np.float64]
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
# What float32 products may change the direction by: kProjectionError in csrc/core/tolerances.h.
PROJECTION_ERROR = 1e-4


class Problem(NamedTuple):
    G: Tensor
    g: Tensor
    scale: float
    """The length of g, or of g + margin G^T 1 if that is longer."""
    margin: float

    @property
    def at_margin(self) -> Tensor:
        return self.g.double() + self.margin * self.G.double().sum(0)


def dependent(
    t: int, p: int, rank: int, noise: float, dtype: torch.dtype, margin: float, scale: float, seed: int
) -> Problem:
    """Rows of that rank but for `noise` of their length, and a gradient that is more or less against them."""
    rng = np.random.default_rng(seed)
    G = rng.standard_normal((t, min(rank, t, p))) @ rng.standard_normal((min(rank, t, p), p))
    G += noise * np.linalg.norm(G, axis=1, keepdims=True) / np.sqrt(p) * rng.standard_normal((t, p))
    G *= 10.0 ** rng.uniform(-1, 1, (t, 1))
    g = rng.standard_normal(p) - rng.choice([0.0, 0.3, 3.0]) * G.mean(0)
    rows, gradient = (torch.from_numpy(x * scale).to(dtype) for x in (G, g))
    problem = Problem(rows, gradient, 0.0, margin)
    return problem._replace(scale=max(float(gradient.double().norm()), float(problem.at_margin.norm())))


def exact(problem: Problem) -> Tensor:
    """g~ in float64 from G itself rather than from P, whose condition is the square of G's."""
    G, g_m = problem.G.double(), problem.at_margin
    if not bool((G @ problem.g.double() < 0).any()):
        return problem.g.double()
    unit = G / G.norm(dim=1, keepdim=True).clamp_min(1e-300)
    u, _ = nnls(unit.T.numpy(), -g_m.numpy(), maxiter=100 * len(G) + 100)
    return g_m + unit.T @ torch.from_numpy(u)


def assert_is_safe(problem: Problem, projected: Tensor, eps: float) -> None:
    """No longer than it may be, and no past task's loss rises, up to the rounding of what was written."""
    G, x = problem.G.double(), projected.double()
    bound = problem.at_margin.norm() if bool((projected != problem.g).any()) else problem.g.double().norm()
    assert x.norm() <= bound * (1 + 1e-6 + eps) + eps * problem.scale
    slopes = G @ x / G.norm(dim=1).clamp_min(1e-300)
    assert slopes.min() >= -(2e-6 + eps) * problem.scale


@settings(max_examples=400)
@given(
    t=st.integers(1, 150),
    p=st.integers(1, 200),
    rank=st.sampled_from([1, 2, 5, 20, 200]),
    noise=st.sampled_from([0.0, 1e-3, 1e-2, 0.1]),
    dtype=st.sampled_from(DTYPES),
    margin=st.sampled_from([0.0, 0.0, 0.5, 10.0]),
    exponent=st.integers(-8, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_many_dependent_tasks(
    t: int, p: int, rank: int, noise: float, dtype: torch.dtype, margin: float, exponent: int, seed: int
) -> None:
    scale = 1.0 if dtype == torch.float16 else 10.0**exponent
    problem = dependent(t, p, rank, noise, dtype, margin, scale, seed)
    eps = float(torch.finfo(dtype).eps)
    projected, again = problem.g.clone(), problem.g.clone()
    projection = project_([projected], problem.G, margin)
    assert projection.status == Status.SOLVED
    assert_is_safe(problem, projected, eps)
    assert_same_bits(projection.v, project_([again], problem.G, margin).v)
    assert_same_bits(projected, again)
    # The residual speaks of g~ before it is rounded to its dtype.
    G = problem.G.double()
    unrounded = problem.g.double() + G.T @ projection.v
    slack = (float(projection.residual) + 1e-14) * problem.scale
    if projection.residual > 0:
        assert (G @ unrounded >= -slack * G.norm(dim=1)).all()
    if noise or rank >= min(t, p):
        # Else the last digits of G decide where g~ goes, and only that it is safe can be asked.
        error = (projected.double() - exact(problem)).norm() / problem.scale
        assert error <= PROJECTION_ERROR + eps


@pytest.mark.parametrize("seed", range(3))
def test_more_tasks_than_parameters(seed: int) -> None:
    rng = np.random.default_rng(seed)
    G, g = (torch.from_numpy(rng.standard_normal(shape)).float() for shape in ((500, 100), (100,)))
    length = g.norm()
    projection = project_([g], G, margin=0.0)
    assert projection.status == Status.SOLVED
    assert g.norm() <= 1e-6 * length


def test_rank_five_and_a_thousandth() -> None:
    problem = dependent(50, 2000, 5, 1e-3, torch.float32, 0.0, 1.0, seed=0)
    projected = problem.g.clone()
    assert project_([projected], problem.G, 0.0).residual < 1e-12
    assert (projected.double() - exact(problem)).norm() <= 1e-6 * problem.scale


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-16, 1e16])
def test_lengths_whose_squares_float32_does_not_hold(scale: float) -> None:
    G, g = torch.randn(4, 50), -torch.randn(50).abs()
    G[2] = g.abs()
    one, scaled = g.clone(), g.clone()
    assert project_([one], G, 0.0).v.any()
    rows = G.clone()
    rows[1:] *= scale
    assert project_([scaled], rows, 0.0).status == Status.SOLVED
    assert (scaled - one).norm() <= 1e-4 * g.norm()


def test_products_in_float64_are_exact() -> None:
    G, grads = torch.randn(5, 3000), [torch.randn(1000), torch.randn(2000)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows, parts = G.to(dtype), [x.to(dtype) for x in grads]
        P, q = ops.gram(rows, parts, in_float64=True)
        assert torch.allclose(P, rows.double() @ rows.double().T, rtol=1e-13, atol=1e-12)
        assert torch.allclose(q, rows.double() @ torch.cat(parts).double(), rtol=1e-13, atol=1e-12)


# ---- other forms of G ------------------------------------------------------------------------------------------------


class Operator:
    """Rows that `project_` does not know to be a matrix."""

    def __init__(self, G: Tensor, in_float64: bool = False) -> None:
        self.depends = [True]
        self._G = G
        self._in_float64 = in_float64

    def gram(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        return ops.gram(self._G, grads, self._in_float64)

    def combine_(self, grads: list[Tensor], v: Tensor) -> None:
        ops.combine_(grads, self._G, v)


class InFloat64(Operator):
    def in_float64(self) -> Operator:
        return Operator(self._G, in_float64=True)


@settings(max_examples=150)
@given(
    t=st.integers(1, 60),
    p=st.integers(1, 60),
    rank=st.sampled_from([1, 2, 5, 60]),
    noise=st.sampled_from([0.0, 1e-3, 0.1]),
    dtype=st.sampled_from(DTYPES),
    margin=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_form_without_float64_products_stays_safe(
    t: int, p: int, rank: int, noise: float, dtype: torch.dtype, margin: float, seed: int
) -> None:
    problem = dependent(t, p, rank, noise, dtype, margin, 1.0, seed)
    eps = float(torch.finfo(dtype).eps)
    whole, exact_form, plain = (problem.g.clone() for _ in range(3))
    solved = project_([whole], problem.G, margin)
    assert project_([exact_form], InFloat64(problem.G), margin).status == Status.SOLVED
    if solved.residual > 0:  # P was formed there, too
        assert_same_bits(whole, exact_form)
    projection = project_([plain], Operator(problem.G), margin)
    if projection.status == Status.SOLVED:
        assert_is_safe(problem, plain, eps)
    else:
        assert plain.double().norm() <= problem.at_margin.norm() * (1 + 1e-6 + eps) + eps * problem.scale
        assert (projection.v >= margin).all()


@settings(max_examples=25)
@given(products=st.booleans(), tasks=st.integers(2, 40), noise=st.sampled_from([1e-3, 1.0]), seed=st.integers(0, 99))
def test_layer_by_layer(products: bool, tasks: int, noise: float, seed: int) -> None:
    # Tasks whose examples are nearly the same.
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    base = torch.randn(4, 6)
    batches = memory([4] * tasks, lambda n: base + noise * torch.randn(n, 6), classes, torch.float32)
    parameters = list(model.parameters())
    objective = Objective(model, F.cross_entropy)
    grads = [torch.randn_like(p) for p in parameters]
    length = torch.cat([x.flatten() for x in grads]).double().norm()
    rows = Loop()(objective, batches, parameters)
    assert isinstance(rows, RowGradients)
    G = rows.G.double()
    expected = [torch.cat([x.flatten() for x in grads]).double()]
    project_(expected, G, 0.0)
    with layerwise_by(products):
        projection = project_(grads, Fused(form="layerwise")(objective, batches, parameters), 0.0)
    assert projection.status == Status.SOLVED
    projected = torch.cat([x.flatten() for x in grads]).double()
    assert projected.norm() <= length * (1 + 1e-5)
    assert (G @ projected >= -1e-5 * length * G.norm(dim=1)).all()


@pytest.mark.parametrize("left", [1.0, 1e-1, 1e-2, 1e-3, 1e-4])
def test_examples_that_cancel_out(left: float) -> None:
    # Each example has a twin with nearly the opposite gradient, as at a minimum: little is left of each row of G.
    torch.manual_seed(0)
    t, n, inputs, outputs = 5, 8, 64, 10
    A, B = torch.randn(t, n, inputs), torch.randn(t, n, outputs)
    A[:, n // 2 :] = A[:, : n // 2] + left * torch.randn(t, n // 2, inputs)
    B[:, n // 2 :] = -B[:, : n // 2] + left * torch.randn(t, n // 2, outputs)
    form = LayerwiseGradients([InnerProducts(A.flatten(0, 1), B.flatten(0, 1), [(0, TaskSizes([n] * t))], t)], t)
    G = (B.double().mT @ A.double()).flatten(1)
    g = (torch.randn(outputs * inputs) - 5 * (G / G.norm(dim=1, keepdim=True)).sum(0)).float()
    grad, expected = g.clone().view(outputs, inputs), [g.double()]
    assert project_([grad], form, 0.0).status == Status.SOLVED
    project_(expected, G, 0.0)
    assert (grad.flatten() - expected[0]).norm() <= 1e-5 * g.norm()


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [Loop(), Fused(form="rows"), Fused(form="layerwise")])
def test_twelve_parameters_and_sixty_tasks(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=5), margin=0.0, engine=engine, check=True)
    projected = 0
    with caplog.at_level(logging.WARNING, logger="gem_fast"):
        for task in range(60):
            for _ in range(2):
                x, y = torch.randn(5, 3), torch.randint(3, (5,))
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                length = sum(float(p.grad.double().square().sum()) for p in model.parameters()) ** 0.5
                gem.observe(x, y, task)
                optimizer.step()
                after = sum(float(p.grad.double().square().sum()) for p in model.parameters()) ** 0.5
                assert after <= length * (1 + 1e-6)
                projected += gem.last is not None and bool(gem.last.violations.any())
    assert projected > 30
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averaged_gem_never_lengthens_the_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    agem = AGEM(model, optimizer, memory=EpisodicMemory(per_task=5), memory_batch=16, check=True)
    projected = 0
    for task in range(12):
        x, y = torch.randn(5, 3).to(dtype), torch.randint(3, (5,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        length = sum(float(p.grad.double().square().sum()) for p in model.parameters()) ** 0.5
        agem.observe(x, y, task)
        optimizer.step()
        after = sum(float(p.grad.double().square().sum()) for p in model.parameters()) ** 0.5
        assert after <= length * (1 + 1e-6 + float(torch.finfo(dtype).eps))
        projected += agem.last is not None and bool(agem.last.violations.any())
    assert projected > 3


class Unsolvable(Engine):
    """Gradients that need more digits than float32 products have, in a form that has no others."""

    def __call__(self, objective, constraints, parameters, sample=None):
        form = Operator(torch.randn(60, 12, generator=torch.Generator().manual_seed(0)))
        form.depends = [True] * len(parameters)
        return form


def test_what_cannot_be_relied_on_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=5), margin=0.0, engine=Unsolvable())
    with caplog.at_level(logging.WARNING, logger="gem_fast"):
        train(model, optimizer, gem, [(torch.randn(5, 3), torch.randint(3, (5,)), task) for task in range(4)])
    assert gem.last is not None
    assert gem.last.status == Status.INACCURATE
    assert len(caplog.records) == 1
    assert "INACCURATE" in caplog.text
