"""Errors that come from what the memory holds name the task, and the example."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from utils.models import mlp, stream

from gem_fast import AGEM, GEM, EpisodicMemory, Fused, Loop


def step(gem: GEM, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def batch_norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


ONE_EXAMPLE = (
    r"^batch normalisation in training mode must get more than 1 example of a task, got 1 from the memory of task "
    r"'small'; keep or draw more, or put its layers into evaluation mode$"
)


@pytest.mark.parametrize("engine", [Loop, Fused])
@pytest.mark.parametrize("others", [0, 2])
def test_batch_normalisation_with_one_stored_example(engine: Callable[[], Loop | Fused], others: int) -> None:
    model = batch_norm_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer, engine=engine())
    sizes = {**{f"other {k}": 4 for k in range(others)}, "small": 1, "now": 4}
    for task, n in sizes.items():
        gem.observe(torch.randn(n, 6), torch.zeros(n, dtype=torch.long), task)
    with pytest.raises(ValueError, match=ONE_EXAMPLE):
        step(gem, optimizer, model)
    model[1].eval()
    step(gem, optimizer, model)
    assert gem.last is not None


def test_batch_normalisation_with_one_drawn_example() -> None:
    model = batch_norm_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer, memory_batch=1)
    for task in ("small", "now"):
        gem.observe(torch.randn(4, 6), torch.zeros(4, dtype=torch.long), task)
    with pytest.raises(ValueError, match=ONE_EXAMPLE):
        step(gem, optimizer, model)


def test_batch_normalisation_takes_one_example_of_several_positions() -> None:
    model = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.BatchNorm1d(1), nn.Flatten(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer)
    for task in range(3):
        gem.observe(torch.randn(1, 6), torch.zeros(1, dtype=torch.long), task)
    step(gem, optimizer, model)
    assert gem.last is not None


def test_another_error_of_a_model_with_batch_normalisation_is_its_own() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = batch_norm_net()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) < 3:
                raise ValueError("too few for me")
            return self.net(x)

    model = Strict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer)
    for task in range(2):
        gem.observe(torch.randn(1, 6), torch.zeros(1, dtype=torch.long), task)
    with pytest.raises(ValueError, match=r"^too few for me$"):
        step(gem, optimizer, model)


@settings(max_examples=30)
@given(
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    place=st.integers(0, 11),
    where=st.sampled_from(["x", "y"]),
    rule=st.sampled_from([GEM, AGEM]),
    engine=st.sampled_from(["Loop", "Fused", "layerwise"]),
)
def test_a_non_finite_memory(bad: float, place: int, where: str, rule: type[GEM], engine: str) -> None:
    model = mlp(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engines = {"Loop": Loop, "Fused": Fused, "layerwise": lambda: Fused(form="layerwise")}
    options = {"engine": engines[engine]()} if rule is GEM else {}
    gem = rule(model, optimizer, loss_fn=F.mse_loss, memory=EpisodicMemory(per_task=4), **options)
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    (x if where == "x" else y)[place, 1] = bad
    for task in range(3):
        gem.observe(x[4 * task : 4 * task + 4], y[4 * task : 4 * task + 4], task)
    gem.current_task = "next"
    before = [p.detach().clone() for p in model.parameters()]
    message = (
        rf"^the memory's examples must be finite, got a NaN or an infinity in example {place % 4} of task {place // 4}$"
    )
    with pytest.raises(RuntimeError, match=message):
        step(gem, optimizer, model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_finite_memory_is_not_blamed() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer)
    for x, y, task in stream(2):
        gem.observe(x, y, task)
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="G must be finite"):
        step(gem, optimizer, model)


def test_the_users_own_gradient_is_named_first() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer)
    for x, y, task in stream(2):
        gem.observe(x, y, task)
    gem.observe(torch.full((1, 6), float("nan")), torch.zeros(1, dtype=torch.long), "now")
    model[2].bias.grad = torch.full((3,), float("nan"))
    with pytest.raises(RuntimeError, match="grads must be finite"):
        optimizer.step()
