"""The loop, which every other engine must agree with."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from utils.engines import assert_rows_close, assert_untouched, log_lines, loop, trained
from utils.models import MultiHead, conv, mlp
from utils.training import train

from gem_fast import GEM, Batch, Fused, Loop, Objective


def constraints(tasks: int, n: int = 7) -> list[list[Batch]]:
    return [[Batch(task, torch.randn(n + task, 6), torch.randint(3, (n + task,)))] for task in range(tasks)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_k_is_the_gradient_on_memory_k(dtype: torch.dtype) -> None:
    model = mlp(dtype)
    batches = [[Batch(b.task, b.x.to(dtype), b.y) for b in row] for row in constraints(4)]
    parameters = list(model.parameters())
    G, reached = loop(model, F.cross_entropy)(batches, parameters)
    assert reached == [True] * 4
    for row, [batch] in zip(G, batches, strict=True):
        model.zero_grad()
        F.cross_entropy(model(batch.x), batch.y).backward()
        assert row.equal(torch.cat([p.grad.flatten() for p in parameters]))


def test_several_batches_make_one_mean() -> None:
    model = mlp(torch.float64)
    batches = [Batch(b.task, b.x.double(), b.y) for [b] in constraints(3)]
    parameters = list(model.parameters())
    engine = loop(model, F.cross_entropy)
    split = engine([batches], parameters).G.clone()
    whole = [Batch(None, torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]))]
    assert torch.allclose(split, engine([whole], parameters).G)


def test_heads_of_other_tasks_are_zero_and_not_reached() -> None:
    model = MultiHead(3)
    G, reached = loop(model, F.cross_entropy, pass_task=True)(constraints(2), list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, r in zip(names, reached, strict=True) if not r] == ["heads.2.weight", "heads.2.bias"]
    sizes = [p.numel() for p in model.parameters()]
    for k, row in enumerate(G):
        parts = dict(zip(names, row.split(sizes), strict=True))
        for head in range(3):
            assert bool(parts[f"heads.{head}.weight"].any()) == (head == k)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_no_trace(training: bool) -> None:
    model = conv().train(training)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = [p.grad.clone() for p in model.parameters()]
    rows = constraints(2)
    state = torch.get_rng_state()
    loop(model, F.cross_entropy)(rows, list(model.parameters()))
    assert torch.get_rng_state().equal(state)
    assert all(module.training == training for module in model.modules())
    assert all(p.grad.equal(g) for p, g in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_sees_one_pass_per_task_in_order(training: bool) -> None:
    model = conv().train(training)
    twin = conv().train(training)
    twin.load_state_dict(model.state_dict())
    rows = constraints(3)
    loop(model, F.cross_entropy)(rows, list(model.parameters()))
    for [batch] in rows:
        twin(batch.x)
    for (name, mine), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert mine.equal(theirs), name


def test_loss_must_be_a_scalar() -> None:
    model = mlp()
    engine = loop(model, nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar, the mean over the examples, got shape \(7,\)"):
        engine(constraints(1), list(model.parameters()))


def test_works_where_gradients_are_switched_off() -> None:
    model = mlp()
    rows = constraints(2)
    engine = loop(model, F.cross_entropy)
    expected = engine(rows, list(model.parameters())).G.clone()
    with torch.no_grad():
        assert engine(rows, list(model.parameters())).G.equal(expected)


# ---- torch.utils.checkpoint with use_reentrant=True ------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Some of it runs again in the backward."""

    def __init__(self, reentrant: bool = True) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.body = nn.LSTM(6, 5, batch_first=True)
        self.head, self.unused = nn.Linear(5, 3), nn.Linear(2, 2)
        self.reentrant: bool | None = reentrant
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x))
        h = self._run(lambda h: F.dropout(self.b(h), 0.3), h)
        return self.head(self._run(lambda h: self.body(h[:, None])[0][:, 0], h))

    def _run(self, part: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        return part(h) if self.reentrant is None else checkpoint(part, h, use_reentrant=self.reentrant)


def doubles(tasks: int) -> list[list[Batch]]:
    return [[b._replace(x=b.x.double()) for b in row] for row in constraints(tasks)]


@pytest.mark.parametrize("late", [False, True])
def test_reentrant_checkpoints_give_the_rows_and_buffers_of_others(late: bool) -> None:
    """From the first step on, or from the third."""
    model = Checkpointed(reentrant=not late)
    twin = copy.deepcopy(model)
    twin.reentrant = False
    batches = doubles(3)
    engine, objective, theirs = Loop(), Objective(model, F.cross_entropy), loop(twin)
    with log_lines() as lines:
        for step in range(5):
            model.reentrant = not late or step > 1
            torch.manual_seed(step)
            state = torch.get_rng_state()
            got = engine(objective, batches, trained(model))
            assert torch.get_rng_state().equal(state)
            expected = theirs(batches, trained(twin))
            assert_rows_close(got.G, expected.G, 1e-12)
            assert got.depends == expected.depends
            for mine, right in zip(model.buffers(), twin.buffers(), strict=True):
                assert torch.allclose(mine, right, rtol=1e-12)
    assert_untouched(model)
    assert len(lines) == 1
    assert "use_reentrant=True" in lines[0]
    assert "\n" not in lines[0]


def test_reentrant_checkpoints_leave_no_trace_and_run_no_hook() -> None:
    model = Checkpointed()
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))  # in no module
    seen: list[Any] = []
    for parameter in [*trained(model), scale]:
        parameter.grad = torch.randn_like(parameter)
    for parameter in trained(model):
        parameter.register_post_accumulate_grad_hook(seen.append)
    before = [parameter.grad for parameter in [*trained(model), scale]]
    kept = [grad.clone() for grad in before]
    engine = loop(model, lambda output, y: F.cross_entropy(scale * output, y))
    parameters = [*trained(model)[2:], scale]
    G = engine(doubles(2), parameters).G
    assert G.split([p.numel() for p in parameters], 1)[-1].all()
    for parameter, grad, value in zip([*trained(model), scale], before, kept, strict=True):
        assert parameter.grad is grad
        assert grad.equal(value)
    assert seen == []
    # A hook on the gradient itself counts, as it does without checkpoints.
    model.head.bias.register_hook(lambda grad: 2 * grad)
    assert not engine(doubles(2), parameters).G.equal(G)


def test_a_loss_has_parameters_from_elsewhere_than_the_model() -> None:
    """Weight decay over a list that was made before: it is in the gradient, and `.grad` is as it was."""
    model = Checkpointed()
    twin = copy.deepcopy(model)
    twin.reentrant = False

    def decayed(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        mine = list(model.parameters())
        return lambda output, y: F.cross_entropy(output, y) + sum(p.square().sum() for p in mine)

    batches = doubles(2)
    expected = loop(twin, decayed(twin))(batches, trained(twin))
    got = loop(model, decayed(model))(batches, trained(model))
    assert_rows_close(got.G, expected.G, 1e-12)
    assert got.depends == expected.depends
    assert_untouched(model)


def test_an_error_behind_a_reentrant_checkpoint_puts_everything_back() -> None:
    model = Checkpointed()

    def failing(output: Tensor, y: Tensor) -> Tensor:
        if y.sum() > 10**6:
            raise KeyError("no such thing")
        return F.cross_entropy(output, y)

    engine, parameters = loop(model, failing), trained(model)
    batches = doubles(2)
    engine(batches, parameters)
    with pytest.raises(KeyError, match="no such thing"):
        engine([*batches, [batches[0][0]._replace(y=torch.full((7,), 10**6))]], parameters)
    assert_untouched(model)
    assert all(map(lambda mine, right: mine is right, trained(model), parameters))


@pytest.mark.parametrize("form", ["auto", "layerwise"])
def test_reentrant_checkpoints_are_not_fused_and_one_line_says_so(form: str) -> None:
    model = Checkpointed().eval()
    engine, objective, batches = Fused(form=form), Objective(model, F.cross_entropy), doubles(3)
    if form == "layerwise":
        with pytest.raises(RuntimeError, match=r"takes a model that one pass can handle, got one where torch\.utils"):
            engine(objective, batches, trained(model))
        return
    said = []
    for t in (1, 2, 3, 3):
        with log_lines() as lines:
            got = engine(objective, batches[:t], trained(model)).G
        said += lines
        assert got.equal(loop(model)(batches[:t], trained(model)).G)
    assert ["one for all: torch.utils.checkpoint runs with use_reentrant=True" in line for line in said] == [True]


def test_training_with_reentrant_checkpoints() -> None:
    model = Checkpointed().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer)
    with log_lines() as lines:
        for [batch] in doubles(3):
            train(model, optimizer, gem, [(batch.x, batch.y, batch.task)] * 3)
    assert len(lines) == 1
    assert gem.last is not None
