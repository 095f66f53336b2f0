"""Looks once at what the model and its loss make of the first memory, and says what cannot be right."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from gem_fast.gradients import Constraint, Objective, Sample
from gem_fast.gradients.interface import random_devices
from gem_fast.gradients.loop import fill_rows
from gem_fast.gradients.restore import buffers_restored
from gem_fast.gradients.rows import rows_for

_log = logging.getLogger("gem_fast")

# How far the parameters are drawn from zero: a multiple of their present size, and the most that it may be. With large
# parameters a loss can be zero at one draw after another, because the examples happen to be fitted; with small ones it
# cannot.
_SIZES = ((1.0, math.inf), (0.1, math.inf), (10.0, math.inf), (1.0, 0.1), (1.0, 0.01))


class FirstMemoryCheck:
    """Refuses a loss whose gradient is zero whatever the parameters are, as cross entropy over one class is.

    It looks at the first step that has a constraint. There q_0 = g_0 . g tells whether g_0, the gradient on the first
    memory, may be zero. If it is, the same gradient is computed at other parameters, drawn at random, of all of the
    model, frozen ones too. Zero at each of them: the loss is refused. Otherwise it is zero just now, as that of a hinge
    loss that is satisfied, which is said in the log "gem_fast".

    Two more forwards tell whether the model keeps state from one to the next, which is said in the log, too.

    Attributes:
        is_done: whether a loss has passed.
    """

    def __init__(self) -> None:
        self.is_done = False

    def check(
        self,
        objective: Objective,
        constraints: Sequence[Constraint],
        parameters: Sequence[Parameter],
        sample: Sample | None,
        q: Tensor,
    ) -> None:
        """Raises ValueError for a loss without a gradient; does nothing once a loss has passed.

        Args:
            objective: the model and its loss.
            constraints: t of them; the first is looked at.
            parameters: those that are trained.
            sample: which examples count.
            q: (t,) G g. One entry is read once, which waits for a GPU; not while a graph is captured.
        """
        if self.is_done or (q.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        first = constraints[0]
        if not first or any(type(p.data) is not Tensor for p in parameters):  # on several processes, with parts of both
            return
        if sample is not None:
            n = sample.sizes[0]
            [first] = Sample(sample.positions[:n], [n]).of([first])
        if float(q[0]) == 0.0 and not _has_gradient(objective, first, parameters):
            if _is_constant(objective, first, parameters):
                raise ValueError(
                    f"loss_fn must be the loss that the model is trained with, got {_name(objective.loss_fn)}, whose "
                    f"gradient on {_whose(first)} is zero whatever the parameters are"
                )
            _log.warning(
                "the loss on %s has a gradient of exactly zero at present, which is no constraint until that changes",
                _whose(first),
            )
        if not _is_repeatable(objective, first, parameters):
            _log.warning(
                "the model gives another loss when the same examples go through it again, so it keeps state outside of "
                "buffers (or draws random numbers that are not torch's), which each pass over the memory changes: "
                "gem_fast.GEM's docstring shows how to reset it"
            )
        self.is_done = True


def _has_gradient(objective: Objective, constraint: Constraint, parameters: Sequence[Parameter]) -> bool:
    row = rows_for(1, parameters)
    with buffers_restored(objective.model.modules()):
        fill_rows(objective, [constraint], parameters, row, slice(0, 1))
    return bool(row.any())


def _is_repeatable(objective: Objective, constraint: Constraint, parameters: Sequence[Parameter]) -> bool:
    with _no_trace(objective, parameters):
        before = _loss(objective, constraint).detach()
    with _no_trace(objective, parameters):
        after = _loss(objective, constraint).detach()
    tolerance = torch.finfo(after.dtype).eps ** 0.5
    return torch.allclose(before, after, rtol=tolerance, atol=tolerance, equal_nan=True)


def _loss(objective: Objective, constraint: Constraint) -> Tensor:
    return torch.stack([objective.loss(batch) for batch in constraint]).sum()


@contextmanager
def _no_trace(objective: Objective, parameters: Sequence[Parameter]) -> Iterator[None]:
    buffers = buffers_restored(objective.model.modules())
    with buffers, torch.random.fork_rng(random_devices(parameters)), torch.enable_grad():
        yield


def _is_constant(objective: Objective, constraint: Constraint, parameters: Sequence[Parameter]) -> bool:
    """Whether the gradient is zero at other parameters, too; puts their own values back, untouched."""
    everything = dict.fromkeys([*objective.model.parameters(), *parameters])
    drawn = [p for p in everything if p.is_floating_point()]
    own, frozen = [p.data for p in drawn], [p for p in drawn if not p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    try:
        for p in frozen:
            p.requires_grad_(True)
        for multiple, most in _SIZES:
            for p, value in zip(drawn, own, strict=True):
                size = float(value.square().mean().sqrt()) or 0.1
                p.data = torch.randn(value.shape, generator=generator).to(value).mul_(min(multiple * size, most))
            if _has_gradient(objective, constraint, drawn):
                return False
    except Exception:  # a model that fails at other parameters is not refused
        return False
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for p, value in zip(drawn, own, strict=True):
            p.data = value
    return True


def _name(loss_fn: object) -> str:
    return getattr(loss_fn, "__name__", type(loss_fn).__name__)


def _whose(constraint: Constraint) -> str:
    task = constraint[0].task
    return "the past tasks' memory" if task is None or len(constraint) > 1 else f"the memory of task {task!r}"
