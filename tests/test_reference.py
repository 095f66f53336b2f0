import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from utils.asserts import kkt_violation
from utils.models import mlp, stream

from gem_fast import GEM, EpisodicMemory, reference


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("t", [1, 4, 12])
def test_projection_meets_the_definition(t: int, margin: float) -> None:
    rng = np.random.default_rng(t)
    G = rng.standard_normal((t, 40))
    g = rng.standard_normal(40) - 2 * G.sum(0)
    projected, v = reference.project(g, G, margin)
    np.testing.assert_allclose(projected, g + G.T @ v)
    assert kkt_violation(G @ G.T, G @ g, v, margin) < 1e-9


def test_without_violation_nothing_changes() -> None:
    G = np.eye(2, 5)
    g = np.ones(5)
    projected, v = reference.project(g, G)
    np.testing.assert_array_equal(projected, g)
    np.testing.assert_array_equal(v, 0)


def test_pure_python_step_is_the_hooks_step() -> None:
    model = mlp(torch.float64)
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=12), margin=0.5, ridge=1e-3)
    learner = reference.PurePythonGEM(twin, twin_optimizer, EpisodicMemory(per_task=12), margin=0.5, ridge=1e-3)
    for x, y, task in stream(4, batches=6, dtype=torch.float64):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gem.observe(x, y, task)
        optimizer.step()
        learner.observe(x, y, task)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            # It collects the gradients in a float32 matrix, as public versions do.
            assert torch.allclose(p, q, atol=1e-5)
