"""Real gradients to project: those that GEM meets while it learns rotated digits with the paper's settings."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from training import BATCH, DEVICE, LR, MARGIN, gem, new_model

import gem_fast
from gem_fast.paper.data import MNIST_5K, load_data
from gem_fast.paper.streams import rotations


class Problem(NamedTuple):
    """One projection: G (t, p) laid out as the engine does it, grads the list of the current gradient's tensors."""

    G: Tensor
    grads: list[Tensor]


class Recorder(gem_fast.Engine):
    """The loop, which also keeps what it computed last."""

    def __init__(self) -> None:
        self.loop = gem_fast.Loop()
        self.G = torch.empty(0)

    def __call__(
        self,
        objective: gem_fast.Objective,
        constraints: Sequence[gem_fast.Constraint],
        parameters: Sequence[Parameter],
        sample: gem_fast.Sample | None = None,
    ) -> gem_fast.RowGradients:
        rows = self.loop(objective, constraints, parameters, sample)
        self.G = rows.G
        return rows

    def copy(self) -> Tensor:
        t, p = self.G.shape
        return torch.empty(t, self.G.stride(0), device=DEVICE)[:, :p].copy_(self.G)


@cache
def gradient_problems(t: int, steps_per_task: int = 60) -> dict[str, list[Problem]]:
    """Problems with t past tasks and p = 89,610 in which a constraint is violated, from the last of t + 1 tasks.

    Returns:
        Problems by what they ask for: "margin" where v = margin for every task is the answer, "qp" where the quadratic
        program decides. At least one of each.
    """
    order = torch.Generator().manual_seed(0)
    stream = rotations(load_data(MNIST_5K), t + 1, 1000, order).to(DEVICE)
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    recorder = Recorder()
    hook = gem(engine=recorder)(model, optimizer)
    problems: dict[str, list[Problem]] = {"margin": [], "qp": []}
    for task in range(t + 1):
        # Three epochs of the last task, since few steps need the quadratic program where tasks are few.
        batches = list(stream.batches(task, BATCH, 3, order))
        for x, y in batches if task == t else batches[:steps_per_task]:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            hook.observe(x, y, task)
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            if task == t and hook.last is not None and bool(hook.last.violations.any()):
                kind = "margin" if bool((hook.last.v == MARGIN).all()) else "qp"
                problems[kind].append(Problem(recorder.copy(), grads))
    assert all(problems.values()), f"no problem of some kind among {t + 1} tasks"
    return problems
