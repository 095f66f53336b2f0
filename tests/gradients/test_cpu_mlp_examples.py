"""G from inner products of a few examples: the same projection as from its rows, in a step and by the hook."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from utils.training import train

import gem_fast
from gem_fast import Batch, Fused, Objective, Sample, Status, project_
from gem_fast.gradients import cpu_mlp
from gem_fast.gradients.cpu_mlp import ExampleGradients, examples
from gem_fast.gradients.cpu_mlp import step_pass as cpu_mlp_step_pass
from gem_fast.gradients.rows import by_parameter
from gem_fast.sampling import sample_each

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3


def model_of(widths: list[int], dtype: torch.dtype, *, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, [*widths[1:], CLASSES], strict=True):
        layers += [nn.Linear(inputs, outputs, bias=bias, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def memory_of(sizes: list[int], inputs: int, dtype: torch.dtype, part: float) -> list[list[Batch]]:
    """Tasks of so many examples, of whose entries `part` is not zero."""
    x = [torch.randn(n, inputs, dtype=dtype) * (torch.rand(n, inputs) < part) for n in sizes]
    return [[Batch(k, mine, torch.randint(CLASSES, (len(mine),)))] for k, mine in enumerate(x)]


def near_copies() -> tuple[nn.Sequential, list[list[Batch]], Sample]:
    """Tasks of the same examples but for the last digits, one of which pulls against the others.

    P is singular to float32's digits.
    """
    torch.manual_seed(0)
    model = model_of([30, 20], torch.float32)
    [[first]] = memory_of([4], 30, torch.float32, 1.0)
    memory = [[Batch(k, first.x + 1e-7 * k, first.y)] for k in range(8)]
    memory[-1] = [Batch(7, first.x, (first.y + 1) % CLASSES)]
    return model, memory, sample_each([4] * 8, 4, torch.Generator())


def both_forms(
    model: nn.Module, memory: list[list[Batch]], sample: Sample, parameters: list[nn.Parameter]
) -> tuple[ExampleGradients, Tensor]:
    objective = Objective(model, F.cross_entropy)
    engine = Fused()
    G = engine(objective, memory, parameters, sample)
    assert isinstance(G, ExampleGradients)
    rows = Fused(form="rows")(objective, memory, parameters, sample).G
    return G, rows


def with_rows(by_rows: bool) -> Any:
    """Has P come from rows or from products, whichever costs less."""
    return mock.patch.object(examples, "_products_cost_less", return_value=not by_rows)


def loss_gradient(model: nn.Module, x: Tensor, y: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.autograd.grad(F.cross_entropy(model(x), y), parameters, allow_unused=True))


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=6),
    widths=st.lists(st.integers(20, 70), min_size=2, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    part=st.sampled_from([0.1, 1.0]),
    bias=st.booleans(),
    frozen=st.integers(0, 9),
    margin=st.sampled_from([0.0, 0.5]),
    by_rows=st.booleans(),
    seed=st.integers(0, 9),
)
def test_as_from_rows(
    sizes: list[int],
    widths: list[int],
    dtype: torch.dtype,
    part: float,
    bias: bool,
    frozen: int,
    margin: float,
    by_rows: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = model_of(widths, dtype, bias=bias)
    parameters = list(model.parameters())
    if frozen < len(parameters) - 1:
        parameters.pop(frozen).requires_grad_(False)
    memory = memory_of(sizes, widths[0], dtype, part)
    sample = sample_each(sizes, 3, torch.Generator().manual_seed(seed))
    x, y = torch.randn(4, widths[0], dtype=dtype), torch.randint(CLASSES, (4,))
    with with_rows(by_rows):
        G, rows = both_forms(model, memory, sample, parameters)
    torch.testing.assert_close(G.G, rows)
    assert G.depends == [True] * len(parameters)

    expected, got = ([-g for g in loss_gradient(model, x, y, parameters)] for _ in range(2))
    right = project_(expected, rows, margin)
    mine = project_(got, G, margin)
    assert int(mine.status) == int(right.status) == Status.SOLVED
    digits = 1e-9 if dtype == torch.float64 else 2e-4
    scale = float(torch.cat([g.flatten() for g in expected]).norm()) + 1e-12
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm()) <= digits * scale
    torch.testing.assert_close(mine.q, right.q, rtol=1e-4, atol=1e-5)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=2, max_size=6),
    widths=st.lists(st.integers(20, 70), min_size=2, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    part=st.sampled_from([0.1, 1.0]),
    frozen=st.integers(0, 9),
    margin=st.sampled_from([0.0, 0.5]),
    by_rows=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_step_in_one_pass_is_as_from_rows(
    sizes: list[int],
    widths: list[int],
    dtype: torch.dtype,
    part: float,
    frozen: int,
    margin: float,
    by_rows: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = model_of(widths, dtype)
    parameters = list(model.parameters())
    if frozen < len(parameters) - 1:
        parameters.pop(frozen).requires_grad_(False)
    memory = memory_of(sizes, widths[0], dtype, part)
    sample = sample_each(sizes, 5, torch.Generator().manual_seed(seed))
    [[mine]] = memory_of([4], widths[0], dtype, part)
    objective, engine = Objective(model, F.cross_entropy), Fused()
    with with_rows(by_rows):
        for _ in range(2):  # passes 1 and 2 are compared, 3 is not
            assert isinstance(engine(objective, memory, parameters, sample), ExampleGradients)
        joint = engine.with_current(objective, mine, memory, parameters, sample, (margin, 0.0))
    assert joint is not None
    assert joint.projection is not None
    expected = loss_gradient(model, mine.x, mine.y, parameters)
    torch.testing.assert_close(joint.loss, F.cross_entropy(model(mine.x), mine.y).detach())
    projection = gem_fast.Projection(*joint.projection)
    rows = Fused(form="rows")(objective, memory, parameters, sample).G
    right = project_(expected, rows, margin)
    assert int(projection.status) == int(right.status) == Status.SOLVED
    digits = 1e-9 if dtype == torch.float64 else 2e-4
    scale = float(torch.cat([g.flatten() for g in expected]).norm()) + 1e-12
    for a, b in zip(joint.grads, expected, strict=True):
        assert a is not None
        assert float((a - b).norm()) <= digits * scale
    torch.testing.assert_close(projection.q, right.q, rtol=1e-4, atol=1e-5)


def in_float64(G: ExampleGradients) -> Tensor:
    """(t, p): the rows that follow from what a pass through dense examples has left behind, without rounding."""
    plan, n = G._plan, sum(G._plan.sizes)
    planes = [
        plane.view(-1, examples.padded(columns))[:n, :columns].double()
        for plane, columns in zip(
            G._kept.split([G._rows * examples.padded(columns) for columns in plan.shapes]), plan.shapes, strict=True
        )
    ]
    x = plan.input(G._batch)[0]
    assert x is not None
    layers = zip([planes[0], *planes[1::2]], [x.double(), *planes[2::2]], strict=True)
    parts = [part for delta, x in layers for part in (torch.einsum("no,ni->noi", delta, x).flatten(1), delta)]
    return torch.stack([rows.sum(0) for rows in torch.cat(parts, 1).split(plan.sizes)])


def test_a_step_whose_float32_products_are_not_enough_takes_them_in_float64() -> None:
    model, memory, sample = near_copies()
    parameters = list(model.parameters())
    objective, engine = Objective(model, F.cross_entropy), Fused()
    for _ in range(2):
        engine(objective, memory, parameters, sample)
    [last] = memory[-1]  # which pulls against the others
    joint = engine.with_current(objective, Batch(9, last.x, last.y), memory, parameters, sample, (0.0, 0.0))
    assert joint is not None
    assert joint.projection is not None
    expected = loss_gradient(model, last.x, last.y, parameters)
    rows = Fused(form="rows")(objective, memory, parameters, sample).G
    right, mine = project_(expected, rows, 0.0), gem_fast.Projection(*joint.projection)
    assert int(mine.status) == int(right.status) == Status.SOLVED
    assert 0 < float(mine.residual) < 1e-9
    assert bool(mine.v.any())
    torch.testing.assert_close(joint.grads, expected, rtol=1e-3, atol=1e-5)


def test_a_projection_that_float32_products_are_not_enough_for_takes_them_in_float64() -> None:
    """Not from rows, which are rounded to float32: their q has eight digits."""
    model, memory, sample = near_copies()
    parameters = list(model.parameters())
    G, rows = both_forms(model, memory, sample, parameters)
    expected = [
        -part[:7].mean(0).view_as(p) for part, p in zip(by_parameter(rows, parameters), parameters, strict=True)
    ]
    got = [g.clone() for g in expected]
    g = torch.cat([x.flatten() for x in expected]).double()
    exact = in_float64(G)
    right, mine = project_(expected, rows, 0.0), project_(got, G, 0.0)
    assert int(mine.status) == int(right.status) == Status.SOLVED
    assert 0 < float(mine.residual) < 1e-9
    torch.testing.assert_close(mine.q, exact @ g, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    after = torch.cat([x.flatten() for x in got]).double()
    torch.testing.assert_close(after, g + exact.mT @ mine.v, rtol=1e-6, atol=1e-7)
    assert float(after.norm()) <= float(g.norm()) * (1 + 1e-5)


@settings(max_examples=30)
@given(
    t=st.integers(2, 80),
    widths=st.lists(st.integers(5, 30), min_size=2, max_size=3),
    noise=st.sampled_from([0.0, 1e-3, 1.0]),
    part=st.sampled_from([0.1, 1.0]),
    frozen=st.integers(0, 9),
    margin=st.sampled_from([0.0, 0.5]),
    by_step=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_many_dependent_tasks(
    t: int, widths: list[int], noise: float, part: float, frozen: int, margin: float, by_step: bool, seed: int
) -> None:
    """More tasks than G has rank, or tasks that are alike: no past task's loss rises, and the step is no longer."""
    torch.manual_seed(seed)
    model = model_of(widths, torch.float32)
    parameters = list(model.parameters())
    if frozen < len(parameters) - 1:
        parameters.pop(frozen).requires_grad_(False)
    [[first]] = memory_of([3], widths[0], torch.float32, part)
    memory = [
        [Batch(k, mine.x * noise + first.x, mine.y)]
        for k, [mine] in enumerate(memory_of([3] * t, widths[0], torch.float32, part))
    ]
    sample = sample_each([3] * t, 2, torch.Generator().manual_seed(seed))
    [[current]] = memory_of([4], widths[0], torch.float32, part)
    objective, engine = Objective(model, F.cross_entropy), Fused()
    for _ in range(2):  # passes 1 and 2 are compared, 3 is not
        G = engine(objective, memory, parameters, sample)
    rows = Fused(form="rows")(objective, memory, parameters, sample).G.double()
    g = loss_gradient(model, current.x, current.y, parameters)
    joint = engine.with_current(objective, current, memory, parameters, sample, (margin, 0.0)) if by_step else None
    if joint is not None and joint.projection is not None:
        got, projection = [x for x in joint.grads if x is not None], gem_fast.Projection(*joint.projection)
    else:
        got = [x.clone() for x in g]
        projection = project_(got, G, margin)
    assert projection.status == Status.SOLVED
    before, after = (torch.cat([x.flatten() for x in some]).double() for some in (g, got))
    at_margin = before + margin * rows.sum(0)
    scale = max(float(before.norm()), float(at_margin.norm()))
    bound = at_margin.norm() if bool(projection.v.any()) else before.norm()
    assert after.norm() <= bound * (1 + 1e-5) + 1e-6 * scale
    slopes = rows @ after / rows.norm(dim=1).clamp_min(1e-300)
    assert slopes.min() >= -(float(projection.residual) + 3e-6) * scale


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_errors_name_the_row_or_the_gradient(bad: float) -> None:
    model = model_of([30, 20], torch.float32)
    parameters = list(model.parameters())
    memory = memory_of([4, 4, 4], 30, torch.float32, 1.0)
    G, _ = both_forms(model, memory, sample_each([4] * 3, 2, torch.Generator()), parameters)
    grads = [torch.randn_like(p) for p in parameters]
    grads[0][0, 0] = bad
    kept = [g.clone() for g in grads]
    with pytest.raises(RuntimeError, match="grads must be finite"):
        project_(grads, G)
    torch.testing.assert_close(grads, kept, equal_nan=True)


@pytest.mark.parametrize("by_rows", [False, True])
def test_a_step_with_a_memory_that_is_not_finite_leaves_the_gradient_as_it_is(by_rows: bool) -> None:
    torch.manual_seed(0)
    model = model_of([30, 20], torch.float32)
    parameters, objective, engine = list(model.parameters()), Objective(model, F.cross_entropy), Fused()
    memory = memory_of([4] * 3, 30, torch.float32, 0.2)
    sample = sample_each([4] * 3, 4, torch.Generator())
    x, y = torch.randn(5, 30), torch.randint(CLASSES, (5,))
    with with_rows(by_rows):
        for _ in range(2):
            engine(objective, memory, parameters, sample)
        memory[1][0].x[2, 7] = float("nan")
        joint = engine.with_current(objective, Batch(9, x, y), memory, parameters, sample, (0.5, 0.0))
    assert joint is not None
    assert joint.projection is None
    torch.testing.assert_close(joint.grads, loss_gradient(model, x, y, parameters))
    with pytest.raises(RuntimeError, match="in row 1"):
        project_([g for g in joint.grads if g is not None], joint.G, 0.5)


def test_gradients_of_any_strides() -> None:
    torch.manual_seed(0)
    model = model_of([30, 20], torch.float32)
    parameters = list(model.parameters())
    G, rows = both_forms(
        model, memory_of([4] * 3, 30, torch.float32, 0.2), sample_each([4] * 3, 2, torch.Generator()), parameters
    )
    dense = [torch.randn_like(p) for p in parameters]
    strided = [g.t().contiguous().t() if g.dim() == 2 else g.clone() for g in dense]
    project_(dense, rows)
    project_(strided, G)
    torch.testing.assert_close(strided, dense, rtol=1e-4, atol=1e-5)


def trained(by_step: bool, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and losses after a few tasks of sparse inputs."""
    torch.manual_seed(0)
    model = model_of([40, 30, 20], torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = gem_fast.GEM(model, optimizer, memory=gem_fast.EpisodicMemory(per_task=12), memory_batch=3, **options)

    def batches() -> Iterator[tuple[Tensor, Tensor, int]]:
        for task in range(4):
            weights = torch.randn(40, CLASSES, dtype=torch.float64)
            for _ in range(9):
                x = torch.randn(5, 40, dtype=torch.float64) * (torch.rand(5, 40) < 0.2)
                yield x, (x @ weights).argmax(1), task

    losses = train(model, optimizer, hook, batches(), by_step=by_step)
    return [p.detach() for p in model.parameters()], losses


def test_a_step_is_as_the_hook_and_as_rows() -> None:
    by_hook, hook_losses = trained(by_step=False)
    for by_step, options in ((True, {}), (False, {"engine": Fused(form="rows")}), (False, {"engine": gem_fast.Loop()})):
        parameters, losses = trained(by_step, **options)
        torch.testing.assert_close(parameters, by_hook, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(losses, hook_losses, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("by", ["a pre-hook", "a pre-hook of all optimizers", "another step", "a scheduler"])
def test_a_gradient_changed_between_pass_and_projection_counts_as_it_is(by: str) -> None:
    """Something clips: q must be that of the clipped gradient, not of the mini-batch's examples."""
    done = []

    def step_pass(*args: Any) -> Any:
        done.append(args)
        return cpu_mlp_step_pass(*args)

    def run(by_step: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = model_of([40, 30], torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle, step = None, optimizer.step

        def clip(*args: object) -> None:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.copy_(p.grad.sign())

        def clipped_step() -> None:
            clip()
            step()

        if by == "a pre-hook":
            optimizer.register_step_pre_hook(clip)
        elif by == "a pre-hook of all optimizers":
            handle = register_optimizer_step_pre_hook(clip)
        elif by == "another step":
            optimizer.step = clipped_step  # type: ignore[assignment, method-assign]
        else:
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        hook = gem_fast.GEM(model, optimizer, memory_batch=2)
        batches = ((torch.randn(5, 40, dtype=torch.float64), torch.randint(CLASSES, (5,)), i // 6) for i in range(18))
        train(model, optimizer, hook, batches, by_step=by_step)
        if handle is not None:
            handle.remove()
        return [p.detach() for p in model.parameters()]

    with mock.patch.object(cpu_mlp, "step_pass", step_pass):
        by_step = run(by_step=True)
    torch.testing.assert_close(by_step, run(by_step=False), rtol=1e-8, atol=1e-10)
    assert (len(done) > 0) == (by == "a scheduler")  # which changes no gradient


@pytest.mark.parametrize("part", [0.2, 0.9], ids=["entries", "dense"])
def test_some_rows_are_those_of_all(part: float) -> None:
    model = model_of([30, 20], torch.float32)
    memory = memory_of([4] * 5, 30, torch.float32, part)
    G, _ = both_forms(model, memory, sample_each([4] * 5, 3, torch.Generator()), list(model.parameters()))
    for first, end in ((0, 1), (2, 3), (1, 4), (4, 5)):
        torch.testing.assert_close(G.rows(slice(first, end)), G.G[first:end], rtol=1e-6, atol=1e-7)
