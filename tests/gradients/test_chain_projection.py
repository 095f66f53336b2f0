"""The projection for chains of linear layers, without the first layer's columns of G."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from utils.asserts import assert_same_bits
from utils.chains import CHAINS, LOSSES, OTHERS, SIZES, sequential
from utils.engines import (
    Memory,
    assert_projects_as_rows,
    half_of_each,
    log_lines,
    memory,
    relu_chain,
    sparse_rows,
    trained,
)
from utils.models import classes, rows

from gem_fast import GEM, EpisodicMemory, FusedTaskGradients
from gem_fast.paper.data import MNIST_5K, load_data
from gem_fast.task_gradients import Batch, Sample
from gem_fast.task_gradients.chain_projection import ChainProjection

pytestmark = pytest.mark.usefixtures("one_thread")

# Tasks up to which P comes with the first reading of the columns, see csrc/cpu/project.cpp.
FEW = 32


def projection(model: nn.Module, loss_fn: Any = F.cross_entropy, **options: Any) -> ChainProjection:
    return ChainProjection(FusedTaskGradients(model, loss_fn, **options))


@pytest.mark.parametrize("sizes", [SIZES, (4, 4, 4)], ids=["ragged", "equal"])
@pytest.mark.parametrize("name", CHAINS)
def test_projects_as_rows_do(name: str, sizes: tuple[int, ...]) -> None:
    make, inputs = CHAINS[name]
    assert_projects_as_rows(projection, make(), memory(sizes, inputs, classes))


@pytest.mark.parametrize("model", [sequential, CHAINS["functional"][0]], ids=["sequential", "functional"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, model: Callable[[], nn.Module]) -> None:
    loss_fn, targets = LOSSES[name]
    assert_projects_as_rows(projection, model(), memory(SIZES, rows, targets), loss_fn)


@pytest.mark.parametrize("t", [2, 7, FEW, FEW + 1])
def test_numbers_of_tasks(t: int) -> None:
    assert_projects_as_rows(projection, sequential(), memory((3,) * t, rows, classes))


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_parameters(frozen: int) -> None:
    model = sequential()
    list(model.parameters())[frozen].requires_grad_(False)
    assert_projects_as_rows(projection, model, memory(SIZES, rows, classes))


@pytest.mark.parametrize("left", [0, 1, 5])
def test_one_parameter_alone(left: int) -> None:
    model = sequential()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i == left)
    assert_projects_as_rows(projection, model, memory(SIZES, rows, classes))


def digits(sizes: list[int]) -> Memory:
    data = load_data(MNIST_5K)
    x, y = data.train_images.double().div(255), data.train_labels
    return [
        [Batch(k, mine, wanted)]
        for k, (mine, wanted) in enumerate(zip(x[: sum(sizes)].split(sizes), y[: sum(sizes)].split(sizes), strict=True))
    ]


@pytest.mark.usefixtures("simd_level")
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("flat", [True, False], ids=["sequential", "functional"])
def test_real_digits(flat: bool, sampled: bool) -> None:
    layers = [nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10)]
    model = nn.Sequential(nn.Flatten(), *layers) if flat else nn.Sequential(nn.Flatten(), nn.Dropout(0.0), *layers)
    sample = Sample(torch.cat([torch.randperm(30)[:7] + n for n in (0, 40, 79, 117)]), [7] * 4) if sampled else None
    assert_projects_as_rows(projection, model.double(), digits([40, 39, 38, 37]), sample=sample)


@pytest.mark.usefixtures("simd_level")
@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    widths=st.lists(st.integers(1, 70), min_size=3, max_size=5),
    part=st.sampled_from([0.1, 1.0]),
    sampled=st.booleans(),
    seed=st.integers(0, 3),
)
def test_any_sizes(sizes: list[int], widths: list[int], part: float, sampled: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = relu_chain(widths).double()
    batches = memory(sizes, lambda n: sparse_rows(n, widths[0], part), lambda n: torch.randint(widths[-1], (n,)))
    sample = half_of_each(sizes) if sampled else None
    # Few units, and tasks of few examples: gradients that are nearly or wholly dependent leave v undetermined.
    parameters = trained(model)
    grads = [torch.randn_like(p) for p in parameters]
    G = FusedTaskGradients(model, F.cross_entropy)(batches, parameters, sample=sample).G
    ours = [g.clone() for g in grads]
    done = projection(model)(batches, parameters, ours, 0.5, 1e-3, sample=sample)
    assert done is not None
    got, _ = done
    g = torch.cat([x.flatten() for x in grads])
    torch.testing.assert_close(got.q, G @ g, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([x.flatten() for x in ours]), g + got.v @ G, rtol=1e-9, atol=1e-9)
    # v is the minimiser: where it is above the margin the slope is zero, elsewhere not negative.
    slope = G @ (G.T @ got.v) + 1e-3 * got.v + got.q
    scale = float(got.q.abs().max() + (G.norm(dim=1) ** 2).max() * got.v.max() + 1)
    assert (got.v == 0).all() if (got.q >= 0).all() else (got.v >= 0.5).all()
    if (got.q < 0).any():
        assert (slope >= -1e-6 * scale).all()
        assert (slope[got.v > 0.5 + 1e-6] <= 1e-6 * scale).all()


def test_float32_on_real_digits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    batches = [[batch._replace(x=batch.x.float())] for [batch] in digits([64] * 5)]
    assert_projects_as_rows(projection, model, batches, tolerance=1e-4)


def test_gradients_of_any_strides() -> None:
    model = sequential()
    batches = memory(SIZES, rows, classes)
    grads = [torch.randn_like(p) for p in model.parameters()]
    strided = [g.T.contiguous().T if g.dim() == 2 else torch.stack([g, g], 1)[:, 0] for g in grads]
    assert not any(g.is_contiguous() for g in strided)
    project = projection(model)
    for mine in (grads, strided):
        assert project(batches, trained(model), mine) is not None
    for mine, right in zip(strided, grads, strict=True):
        assert_same_bits(mine, right)
    expanded = [grads[0][:1, :1].expand_as(grads[0]), *grads[1:]]
    with pytest.raises(ValueError, match=r"grad\[0\] must have memory of its own"):
        project(batches, trained(model), expanded)


def test_what_takes_rows_is_left_to_them() -> None:
    for make in OTHERS.values():
        model = make()
        grads = [torch.ones_like(p) for p in model.parameters()]
        with log_lines() as lines:
            assert projection(model)(memory(SIZES, rows, classes), trained(model), grads) is None
        assert all((g == 1).all() for g in grads)
        assert lines == []
    model = sequential()
    batches = memory(SIZES, rows, classes)
    grads = [torch.ones_like(p) for p in model.parameters()]
    assert projection(model, tasks_per_pass=2)(batches, trained(model), grads) is None
    assert projection(model, memory_bytes=1)(batches, trained(model), grads) is None
    assert projection(model, chains=False)(batches, trained(model), grads) is None
    assert projection(model)(batches[:1], trained(model), grads) is None
    assert projection(model)([[b for [b] in batches], batches[0]], trained(model), grads) is None
    assert projection(model)(batches, trained(model), grads) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["row", "first weight's gradient", "another gradient"])
@pytest.mark.parametrize("t", [3, FEW + 1])
def test_values_that_are_not_finite(where: str, value: float, t: int) -> None:
    model = sequential()
    batches = memory((3,) * t, rows, classes)
    project = projection(model)
    grads = [torch.randn_like(p) for p in model.parameters()]
    project(batches, trained(model), [g.clone() for g in grads])
    if where == "row":
        batches[2][0].x[1, 1] = value
    else:
        grads[0 if where == "first weight's gradient" else 3].view(-1)[2] = value
    before = [g.clone() for g in grads]
    message = "G must be finite, got a NaN or an infinity in row 2" if where == "row" else "grads must be finite"
    with pytest.raises(RuntimeError, match=message):
        project(batches, trained(model), grads)
    for mine, right in zip(grads, before, strict=True):
        assert_same_bits(mine, right)


def test_the_same_bits_with_any_number_of_threads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 70), nn.ReLU(), nn.Linear(70, 10))
    batches = [[batch._replace(x=batch.x.float())] for [batch] in digits([70, 31, 64, 50])]
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        grads = [torch.randn_like(p) for p in model.parameters()]
        done = projection(model)(batches, trained(model), grads)
        assert done is not None
        results.append([*grads, done[0].v, done[0].q])
    torch.set_num_threads(1)
    for other in results[1:]:
        for mine, right in zip(other, results[0], strict=True):
            assert_same_bits(mine, right)


# ---- in the hook -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"memory_batch": 5}], ids=str)
def test_the_hook_goes_without_rows_where_it_can(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    projected = []
    call = ChainProjection.__call__

    def counted(self: ChainProjection, *args: Any, **kwargs: Any) -> Any:
        done = call(self, *args, **kwargs)
        projected.append(done is not None)
        return done

    monkeypatch.setattr(ChainProjection, "__call__", counted)
    data = load_data(MNIST_5K)
    first = nn.Sequential(nn.Flatten(), nn.Linear(784, 30), nn.ReLU(), nn.Linear(30, 10)).double()
    models = [first, copy.deepcopy(first)]
    engines = [None, FusedTaskGradients(models[1], F.cross_entropy)]
    for model, engine in zip(models, engines, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=20), task_gradients=engine, **options)
        for step in range(24):
            x = data.train_images[10 * step : 10 * step + 10].double() / 255
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), data.train_labels[10 * step : 10 * step + 10])
            loss.backward()
            gem.observe(x, data.train_labels[10 * step : 10 * step + 10], step // 4)
            optimizer.step()
    # With one past task the loop is as fast.
    assert projected == [False] * 4 + [True] * 16
    for mine, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-10)
