"""Real gradients to project: those that GEM meets while it learns rotated digits with the paper's settings."""

import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

import gem_fast
from gem_fast.paper.data import MNIST_5K, load_data
from gem_fast.paper.models import mlp
from gem_fast.paper.streams import rotations
from gem_fast.task_gradients import Batch, TaskRows

LR, MARGIN, RIDGE, MEMORY, BATCH = 0.1, 0.5, 1e-3, 256, 10
# `make bench DEVICE=cuda` measures on a GPU.
DEVICE = torch.device(os.environ.get("DEVICE", "cpu"))


class Problem(NamedTuple):
    """One projection: G (t, p) laid out as the engine does it, grads the list of the current gradient's tensors."""

    G: Tensor
    grads: list[Tensor]


class Recorder:
    """The default engine, which also keeps what it computed last."""

    def __init__(self, engine: gem_fast.LoopTaskGradients) -> None:
        self.engine = engine
        self.G = torch.empty(0)

    def __call__(
        self, constraints: Sequence[Sequence[Batch]], parameters: Sequence[Parameter], **options: Any
    ) -> TaskRows:
        rows = self.engine(constraints, parameters, **options)
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
    torch.manual_seed(0)
    model = mlp(stream.n_inputs, stream.n_outputs).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    recorder = Recorder(gem_fast.LoopTaskGradients(model, F.cross_entropy))
    memory = gem_fast.EpisodicMemory(per_task=MEMORY)
    gem = gem_fast.GEM(model, optimizer, memory=memory, margin=MARGIN, ridge=RIDGE, task_gradients=recorder)
    problems: dict[str, list[Problem]] = {"margin": [], "qp": []}
    for task in range(t + 1):
        # Three epochs of the last task, since few steps need the quadratic program where tasks are few.
        batches = list(stream.batches(task, BATCH, 3, order))
        for x, y in batches if task == t else batches[:steps_per_task]:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            gem.observe(x, y, task)
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            if task == t and gem.last is not None and bool(gem.last.violations.any()):
                kind = "margin" if bool((gem.last.v == MARGIN).all()) else "qp"
                problems[kind].append(Problem(recorder.copy(), grads))
    assert all(problems.values()), f"no problem of some kind among {t + 1} tasks"
    return problems
