"""Elastic weight consolidation: Fisher information and penalty against slow references, both forms of the penalty."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from utils.learning import KINDS, batches, learn, make, weights

from gem_fast.paper.learners.ewc import Penalty


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("memory", [1, 15, 1000])
def test_fisher_is_that_of_a_slow_reference(kind: str, per_example: bool, memory: int) -> None:
    learner = make("ewc", kind, per_example=per_example, memory_per_task=memory)
    mini_batches = batches(kind, per_task=4, tasks=(1,))
    learn(learner, mini_batches)
    x, y = (torch.cat(part)[:memory] for part in list(zip(*mini_batches, strict=True))[:2])
    assert len(y) == min(40, memory)
    expected = [torch.zeros_like(p) for p in learner.model.parameters()]
    if per_example:
        for i in range(len(y)):
            for total, grad in zip(expected, gradient(learner, x[i : i + 1], y[i : i + 1]), strict=True):
                total += grad**2 / len(y)
    else:
        expected = [grad**2 for grad in gradient(learner, x, y)]
    for ours, theirs in zip(learner.fisher(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def gradient(learner: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    learner.model.zero_grad()
    F.cross_entropy(learner.logits(x, 1), y).backward()
    return [p.grad.clone() for p in learner.model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("consolidated", [False, True])
def test_a_step_is_that_of_the_penalised_loss(kind: str, consolidated: bool) -> None:
    learner = make("ewc", kind, strength=30.0, consolidated=consolidated)
    terms = []
    for x, y, task in batches(kind, per_task=5):
        if learner.current_task.ends_with(task):
            terms.append((learner.fisher(), weights(learner.model)))
        parameters = list(learner.model.parameters())
        loss = learner.loss(x, y, task)
        for fisher, anchor in terms:
            for p, f, a in zip(parameters, fisher, anchor, strict=True):
                loss = loss + 30.0 * (f * (p - a) ** 2).sum()
        grads = torch.autograd.grad(loss, parameters)
        learner.observe(x, y, task)
        for p, grad in zip(parameters, grads, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)
    assert len(terms) == 2
    assert len(learner.penalty.terms) == (1 if consolidated else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_train_the_same_network(kind: str) -> None:
    one, two = (
        learn(make("ewc", kind, strength=30.0, consolidated=form), batches(kind, per_task=10)) for form in (False, True)
    )
    plain = learn(make("single", kind), batches(kind, per_task=10))
    for a, b in zip(weights(one.model), weights(two.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(weights(one.model)[0], weights(plain.model)[0], rtol=1e-3, atol=1e-4)


@given(terms=st.integers(1, 30), scale=st.floats(1e-8, 1e3), shift=st.floats(0, 1e-3), seed=st.integers(0, 99))
def test_consolidation_loses_no_digits(terms: int, scale: float, shift: float, seed: int) -> None:
    """Parameters that hardly move, weights of any size and exact zeros: where sums of F_k theta_k would cancel."""
    g = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(50, generator=g))
    exact = torch.zeros(50, dtype=torch.float64)
    size = torch.zeros(50, dtype=torch.float64)
    penalty, weight_of = Penalty([p], consolidated=True), []
    for _ in range(terms):
        weight = scale * torch.rand(50, generator=g) * (torch.rand(50, generator=g) > 0.3)
        weight_of.append((weight.double(), p.detach().double().clone()))
        penalty.add([weight.clone()])
        with torch.no_grad():
            p += shift * torch.randn(50, generator=g)
    for weight, anchor in weight_of:
        exact += 2 * 3.0 * weight * (p.detach().double() - anchor)
        size += 2 * 3.0 * weight
    p.grad = torch.zeros(50)
    penalty.add_gradient(3.0)
    [([total], _)] = penalty.terms
    assert torch.allclose(total.double(), size / 6, rtol=1e-5)
    # An anchor is a float32 number near theta: that bounds what can be known of the difference.
    bound = size * (p.detach().abs().double() + shift) * 4 * terms * torch.finfo(torch.float32).eps
    assert ((p.grad.double() - exact).abs() <= bound + 1e-30).all()


def test_nothing_is_held_before_the_second_task() -> None:
    ewc, single = (learn(make(name, "shared"), batches("shared", tasks=(0,))) for name in ("ewc", "single"))
    for a, b in zip(weights(ewc.model), weights(single.model), strict=True):
        assert a.equal(b)
