"""A loss that no parameter can change is refused; a gradient that is zero just now and a stateful model are said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from utils.asserts import assert_same_bits
from utils.models import mlp, stream

from gem_fast import AGEM, GEM, EpisodicMemory, Fused, Loop

Loss = Callable[[Tensor, Tensor], Tensor]


def one_step_with_a_past_task(
    model: nn.Module, loss_fn: Loss, rule: Callable[..., GEM] = GEM, y: Tensor | None = None, **options: Any
) -> tuple[GEM, torch.optim.Optimizer]:
    """Its gradients are ones, whatever the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = rule(model, optimizer, loss_fn=loss_fn, memory=EpisodicMemory(per_task=8), **options)
    x, labels, _ = next(stream(1))
    for task in ("first", "second", "now"):
        gem.observe(x, labels if y is None else y, task)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return gem, optimizer


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).detach()


def one_class(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)).to(dtype)


def wrong_half(output: Tensor, y: Tensor) -> Tensor:
    return (output.argmax(1) != y).float().mean()


CONSTANT: dict[str, tuple[Callable[[], nn.Module], Loss, Tensor | None]] = {
    "cross entropy over one class": (one_class, F.cross_entropy, torch.zeros(5, dtype=torch.long)),
    "cross entropy of a column": (one_class, F.cross_entropy, torch.rand(5, 1)),
    "accuracy": (mlp, wrong_half, None),
    "rounded": (mlp, lambda output, y: output.round().mean(), None),
    "of the targets alone": (mlp, lambda output, y: y.double().mean().float(), None),
    "detached output": (Detached, F.cross_entropy, None),
    "times zero": (mlp, lambda output, y: 0 * F.cross_entropy(output, y), None),
}


@pytest.mark.parametrize("rule", [GEM, AGEM])
@pytest.mark.parametrize("name", CONSTANT)
def test_a_loss_without_a_gradient_is_refused(name: str, rule: type[GEM]) -> None:
    make, loss_fn, y = CONSTANT[name]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    message = r"^loss_fn must be the loss that the model is trained with, got .*, whose gradient on the .* is zero"
    with pytest.raises(ValueError, match=message):
        one_step_with_a_past_task(model, loss_fn, rule, y)
    for key, value in model.state_dict().items():
        if "running" not in key and "tracked" not in key:  # which the pass over the memory itself moves
            assert_same_bits(value, before[key])
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_it_is_refused_in_each_step_until_it_is_mended() -> None:
    model = one_class()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer)
    for task in range(3):
        x, y = torch.randn(8, 6), torch.randn(8, 1)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        gem.observe(x, y, task)
        if task == 0:
            optimizer.step()
            continue
        with pytest.raises(ValueError, match="got cross_entropy, whose gradient on the memory of task 0 is zero"):
            optimizer.step()


def hinge(output: Tensor, y: Tensor) -> Tensor:
    return F.multi_margin_loss(output, y)


def satisfied() -> nn.Module:
    """Sure of what `stream` calls class argmax(x[:3]): its hinge loss is exactly zero, and so is its cross entropy."""
    model = nn.Sequential(nn.Linear(6, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(1e6 * torch.eye(3, 6))
    return model


def zeros() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False))
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def frozen() -> nn.Module:
    """Nothing that the optimizer trains is used: a new head beside those of old tasks."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.old = nn.Linear(6, 3).requires_grad_(False)
            self.new = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.old(x)

    return Model()


@pytest.mark.parametrize("rule", [GEM, AGEM])
@pytest.mark.parametrize(
    ("make", "loss_fn"),
    [(satisfied, hinge), (satisfied, F.cross_entropy), (zeros, F.cross_entropy), (frozen, F.cross_entropy)],
)
def test_a_gradient_that_is_zero_just_now_is_said_once(
    make: Callable[[], nn.Module], loss_fn: Loss, rule: type[GEM], caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    flags = [p.requires_grad for p in model.parameters()]
    gem, optimizer = one_step_with_a_past_task(model, loss_fn, rule)
    said = [r.getMessage() for r in caplog.records if "gradient of exactly zero at present" in r.getMessage()]
    assert len(said) == 1
    assert [p.requires_grad for p in model.parameters()] == flags
    assert gem.last is not None
    assert not gem.last.violations.any()
    optimizer.step()
    assert len([r for r in caplog.records if "exactly zero" in r.getMessage()]) == 1


@pytest.mark.parametrize("engine", [Loop, Fused, lambda: Fused(form="layerwise")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory_batch", [None, 2])
def test_every_engine_and_dtype(engine: Callable[[], Any], dtype: torch.dtype, memory_batch: int | None) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer, engine=engine(), memory_batch=memory_batch)
    for task in range(3):
        gem.observe(torch.randn(5, 6, dtype=dtype), torch.zeros(5, dtype=torch.long), task)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="loss_fn must be the loss that the model is trained with"):
        optimizer.step()


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 6),
    classes=st.integers(2, 4),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    loss_fn=st.sampled_from([F.cross_entropy, F.multi_margin_loss]),
    depth=st.integers(1, 3),
)
def test_no_loss_that_trains_is_refused(
    seed: int, n: int, classes: int, scale: float, loss_fn: Loss, depth: int
) -> None:
    """Whatever the weights, the inputs and how well the examples are fitted: the labels are the model's own answers."""
    torch.manual_seed(seed)
    layers = [layer for _ in range(depth - 1) for layer in (nn.Linear(6, 6), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(6, classes))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    x = torch.randn(n, 6)
    y = model(x).argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer, loss_fn=loss_fn)
    for task in range(2):
        gem.observe(x, y, task)
    optimizer.step()
    assert gem.last is not None


# ---- models that keep state ------------------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Keeps its hidden state from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.GRU(6, 7, batch_first=True)
        self.head = nn.Linear(7, 3)
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.body(x[:, None], self.state)
        self.state = state.detach()
        return self.head(y[:, -1])


class FromReset(nn.Module):
    """As in GEM's docstring."""

    def __init__(self, model: Stateful) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        kept, self.model.state = self.model.state, None
        try:
            return self.model(x)
        finally:
            self.model.state = kept


@pytest.mark.parametrize("rule", [GEM, AGEM])
@pytest.mark.parametrize("resets", [False, True])
def test_a_model_that_keeps_state(resets: bool, rule: type[GEM], caplog: pytest.LogCaptureFixture) -> None:
    model = Stateful()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = rule(FromReset(model) if resets else model, optimizer, memory=EpisodicMemory(per_task=5))
    for x, y, task in stream(4 if resets else 2, batches=1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gem.observe(x, y, task)
        state = model.state
        optimizer.step()
        assert (model.state is state) == (resets or task == 0)
    said = [r.getMessage() for r in caplog.records if "keeps state outside of buffers" in r.getMessage()]
    assert len(said) == (0 if resets else 1)
    assert gem.last is not None


@pytest.mark.parametrize("name", ["dropout", "batch norm", "a record"])
def test_models_that_keep_none_are_not_said_to(name: str, caplog: pytest.LogCaptureFixture) -> None:
    class Record(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x.detach()
            return x

    middle = {"dropout": nn.Dropout(0.5), "batch norm": nn.BatchNorm1d(8), "a record": Record()}[name]
    model = nn.Sequential(nn.Linear(6, 8), middle, nn.Linear(8, 3))
    gem, _ = one_step_with_a_past_task(model, F.cross_entropy)
    assert gem.last is not None
    assert [r for r in caplog.records if "keeps state" in r.getMessage()] == []
