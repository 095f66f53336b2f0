"""The loop, which every other engine must agree with."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from utils.engines import loop
from utils.models import MultiHead, conv, mlp

from gem_fast import Batch


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
