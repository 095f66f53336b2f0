"""One forward and one backward per past task: the reference that every other engine must agree with."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gem_fast.gradients import reentrant
from gem_fast.gradients.copies import gradients, gradients_at_copies
from gem_fast.gradients.interface import Constraint, Engine, Objective, Sample, is_captured, random_devices
from gem_fast.gradients.restore import buffers_restored
from gem_fast.gradients.rows import RowGradients
from gem_fast.ops import pack_
from gem_fast.state import check_keys

_log = logging.getLogger("gem_fast")


class RowEngine(Engine):
    """An engine that keeps G as rows; see `Loop` for its option."""

    def __init__(self, refresh_every: int) -> None:
        self._rows = RowGradients(refresh_every)
        self.repeats = refresh_every == 1

    @property
    def rows(self) -> RowGradients:
        """The rows, as the last call left them."""
        return self._rows

    def forget_rows(self) -> None:
        """Computes all rows anew in the next call."""
        self._rows = RowGradients(self._rows.refresh_every)

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

    Where torch.utils.checkpoint runs with use_reentrant=True, torch.autograd.grad is not possible: the backward then
    goes to copies of the parameters. `.grad` stays as it is, and hooks that see a gradient accumulated do not run.

    Args:
        refresh_every: r, the number of steps in which each row of G is computed anew once, in turns; 1 is exact.

    Raises:
        ValueError: refresh_every is smaller than 1.
    """

    def __init__(self, *, refresh_every: int = 1) -> None:
        super().__init__(refresh_every)
        self._has_said_why = False

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
        if reentrant.is_used_by(objective.model) and not self._has_said_why:
            self._has_said_why = True
            _log.warning("the backward of each past task goes to copies of the parameters: %s", reentrant.REASON)
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
    if sample is not None:
        constraints = sample.of(constraints)
    model, wanted = objective.model, (G[rows], constraints[rows])
    with torch.enable_grad():
        if not reentrant.is_used_by(model):
            try:
                with (
                    torch.random.fork_rng(random_devices(parameters)),
                    buffers_restored(model.modules(), only_on_failure=True),
                ):
                    return _fill(objective, *wanted, parameters, by_backward=False)
            except RuntimeError as error:
                if not reentrant.is_reason_of(error):
                    raise
                reentrant.found_in(model)
        with torch.random.fork_rng(random_devices(parameters)):
            return _fill(objective, *wanted, parameters, by_backward=True)


def _fill(
    objective: Objective,
    G: Tensor,
    constraints: Sequence[Constraint],
    parameters: Sequence[Parameter],
    *,
    by_backward: bool,
) -> list[bool]:
    sizes = [parameter.numel() for parameter in parameters]
    depends = [False] * len(parameters)
    # Where somebody keeps the mini-batch's loss, autograd's nodes of the parameters belong to the stream of its
    # forward, to which a captured backward must not come.
    at_copies = by_backward or is_captured(parameters)
    for row, batches in zip(G, constraints, strict=True):
        loss_of = partial(_mean_loss, objective, batches)
        grads: Sequence[Tensor | None]
        if at_copies:
            grads = gradients_at_copies(objective, loss_of, parameters, by_backward=by_backward)
        else:
            grads = gradients(loss_of(), parameters)
        pack_(row, grads, sizes)
        depends = [either or grad is not None for either, grad in zip(depends, grads, strict=True)]
    return depends


def _mean_loss(objective: Objective, batches: Constraint) -> Tensor:
    if len(batches) == 1:
        return objective.loss(batches[0])
    examples = sum(batch.size for batch in batches)
    return torch.stack([objective.loss(batch) * (batch.size / examples) for batch in batches]).sum()
