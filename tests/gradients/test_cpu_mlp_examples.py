"""G from inner products of a few examples: the same projection as from its rows, in a step and by the hook."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gem_fast
from gem_fast import Batch, Fused, Objective, Sample, Status, project_
from gem_fast.gradients import cpu_mlp
from gem_fast.gradients.cpu_mlp import ExampleGradients, examples
from gem_fast.gradients.cpu_mlp import step_pass as cpu_mlp_step_pass
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


def test_a_step_whose_products_are_not_enough_is_left_to_rows() -> None:
    model, memory, sample = near_copies()
    parameters = list(model.parameters())
    objective, engine = Objective(model, F.cross_entropy), Fused()
    for _ in range(2):
        engine(objective, memory, parameters, sample)
    x, y = torch.randn(5, 30), torch.randint(CLASSES, (5,))
    joint = engine.with_current(objective, Batch(9, x, y), memory, parameters, sample, (0.0, 0.0))
    assert joint is not None
    expected = loss_gradient(model, x, y, parameters)
    rows = Fused(form="rows")(objective, memory, parameters, sample).G
    assert joint.projection is not None
    got, mine = [g for g in joint.grads if g is not None], gem_fast.Projection(*joint.projection)
    right = project_(expected, rows, 0.0)
    assert int(mine.status) == int(right.status)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_what_the_products_are_not_enough_for_is_left_to_rows() -> None:
    model, memory, sample = near_copies()
    parameters = list(model.parameters())
    G, rows = both_forms(model, memory, sample, parameters)
    expected = [torch.randn_like(p) for p in parameters]
    got = [g.clone() for g in expected]
    before = torch.cat([g.flatten() for g in expected]).norm()
    right, mine = project_(expected, rows, 0.0), project_(got, G, 0.0)
    assert int(mine.status) == int(right.status)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
    assert float(torch.cat([g.flatten() for g in got]).norm()) <= float(before) * (1 + 1e-5)


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


def trained(by_step: bool, **options: Any) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Parameters, losses and the forms of G after a few tasks of sparse inputs."""
    torch.manual_seed(0)
    model = model_of([40, 30, 20], torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = gem_fast.GEM(model, optimizer, memory=gem_fast.EpisodicMemory(per_task=12), memory_batch=3, **options)
    forms, losses = [], []
    for task in range(4):
        weights = torch.randn(40, CLASSES, dtype=torch.float64)
        for _ in range(9):
            x = torch.randn(5, 40, dtype=torch.float64) * (torch.rand(5, 40) < 0.2)
            y = (x @ weights).argmax(1)
            if by_step:
                losses.append(hook.step(x, y, task))
                continue
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            losses.append(loss.detach())
            hook.observe(x, y, task)
            optimizer.step()
    return [p.detach() for p in model.parameters()], losses, forms


def test_a_step_is_as_the_hook_and_as_rows() -> None:
    by_hook, hook_losses, _ = trained(by_step=False)
    for by_step, options in ((True, {}), (False, {"engine": Fused(form="rows")}), (False, {"engine": gem_fast.Loop()})):
        parameters, losses, _ = trained(by_step, **options)
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
        for task in range(3):
            for _ in range(6):
                x, y = torch.randn(5, 40, dtype=torch.float64), torch.randint(CLASSES, (5,))
                if by_step:
                    hook.step(x, y, task)
                    continue
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                hook.observe(x, y, task)
                optimizer.step()
        if handle is not None:
            handle.remove()
        return [p.detach() for p in model.parameters()]

    with mock.patch.object(cpu_mlp, "step_pass", step_pass):
        by_step = run(by_step=True)
    torch.testing.assert_close(by_step, run(by_step=False), rtol=1e-8, atol=1e-10)
    assert (len(done) > 0) == (by == "a scheduler")  # which changes no gradient
