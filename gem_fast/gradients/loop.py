"""One forward and one backward per past task: the reference that every other engine must agree with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gem_fast.gradients.interface import Batch, Constraint, Engine, Objective, Sample, random_devices
from gem_fast.gradients.rows import RowGradients
from gem_fast.ops import pack_
from gem_fast.state import check_keys


class RowEngine(Engine):
    """An engine that keeps G as rows; see `Loop` for its option."""

    def __init__(self, refresh_every: int) -> None:
        self._rows = RowGradients(refresh_every)
        self.repeats = refresh_every == 1

    def state_dict(self) -> dict[str, Any]:
        """The rows that the next step does not compute anew."""
        return {"rows": self._rows.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Engine.load_state_dict`."""
        check_keys("engine", state, ("rows",))
        self._rows.load_state_dict(state["rows"])


class Loop(RowEngine):
    """Computes the rows of G one after the other, with torch.autograd.

    A model in training mode sees each task's memory on its own, in order: batch normalisation normalises and updates
    its running statistics as if each memory were a mini-batch.

    Args:
        refresh_every: r, the number of steps in which each row of G is computed anew once, in turns; 1 is exact.

    Raises:
        ValueError: refresh_every is smaller than 1.
    """

    def __init__(self, *, refresh_every: int = 1) -> None:
        super().__init__(refresh_every)

    def __call__(
        self,
        objective: Objective,
        constraints: Sequence[Constraint],
        parameters: Sequence[Parameter],
        sample: Sample | None = None,
    ) -> RowGradients:
        """As `Engine.__call__`; raises ValueError where the loss is not a scalar."""
        rows = self._rows
        rows.begin_step([batches[0].task for batches in constraints], parameters)
        rows.computed(fill_rows(objective, constraints, parameters, rows.G, rows.stale, sample))
        return rows


def fill_rows(
    objective: Objective,
    constraints: Sequence[Constraint],
    parameters: Sequence[Parameter],
    G: Tensor,
    rows: slice,
    sample: Sample | None = None,
) -> list[bool]:
    """Writes some rows of G (t, p), one backward each; returns, per parameter, whether any of them depends on it."""
    sizes = [parameter.numel() for parameter in parameters]
    depends = [False] * len(parameters)
    if sample is not None:
        constraints = sample.of(constraints)
    with torch.random.fork_rng(random_devices(parameters)), torch.enable_grad():
        for row, batches in zip(G[rows], constraints[rows], strict=True):
            grads = torch.autograd.grad(_mean_loss(objective, batches), parameters, allow_unused=True)
            pack_(row, grads, sizes)
            depends = [either or grad is not None for either, grad in zip(depends, grads, strict=True)]
    return depends


def _mean_loss(objective: Objective, batches: Sequence[Batch]) -> Tensor:
    if len(batches) == 1:
        return objective.loss(batches[0])
    examples = sum(len(batch.x) for batch in batches)
    return torch.stack([objective.loss(batch) * (len(batch.x) / examples) for batch in batches]).sum()
