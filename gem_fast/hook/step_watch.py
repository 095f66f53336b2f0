"""Notices training loops in which observed batches and projected steps do not go together."""

import logging
from collections.abc import Hashable

from torch.nn import Parameter
from torch.optim import Optimizer

_log = logging.getLogger("gem_fast")

# Once may be weights that were loaded between two batches.
_CHANGES_BEFORE_IT_IS_SAID = 2


class StepWatch:
    """Says once each, in the log "gem_fast", that a finished task is taken for the current one, or steps are missed.

    - Two steps in a row without an `observe`: the task observed last still counts as the current one.
    - Two changes of the parameters between batches that were observed, without a step of the optimizer that the hook is
      attached to: another optimizer makes them. Accumulated gradients, a memory filled at a task's end and steps that
      GradScaler skips change no parameter. (The fused kernels of torch leave no mark that could be seen.)
    """

    def __init__(self) -> None:
        self._steps = 0
        self._current_is_observed = False
        self._changes = 0
        self._parameter: Parameter | None = None
        self._version = 0
        self._said_steps = False
        self._said_changes = False

    def observed(self, optimizer: Optimizer | None) -> None:
        """A batch was observed; optimizer: the one that the hook is attached to, None where it is so no longer."""
        self._steps = 0
        self._current_is_observed = True
        if optimizer is None:
            self._parameter = None
        elif self._parameter is None:
            self._parameter = _moving_parameter(optimizer)
        elif self._parameter._version != self._version:
            self._changed(optimizer)
        if self._parameter is not None:
            self._version = self._parameter._version

    def stepped(self, current: Hashable) -> None:
        """The optimizer is about to step, with `current` as the current task."""
        self._parameter, self._changes = None, 0
        self._steps += 1
        if self._steps == 2 and self._current_is_observed and current is not None and not self._said_steps:
            self._said_steps = True
            _log.warning(
                "two optimizer steps ran without gem.observe in between, so task %r still counts as the current one "
                "and is not protected: call gem.observe before each step, or set gem.current_task when a task begins "
                "(None protects all stored tasks)",
                current,
            )

    def current_is_set(self) -> None:
        """The user said which task is the current one."""
        self._current_is_observed = False

    def loaded(self) -> None:
        """The hook took up a state, whose current task may be one that was observed."""
        self._steps, self._current_is_observed = 0, True
        self._parameter, self._changes = None, 0

    def _changed(self, optimizer: Optimizer) -> None:
        self._changes += 1
        if self._changes < _CHANGES_BEFORE_IT_IS_SAID or self._said_changes:
            return
        self._said_changes = True
        _log.warning(
            "batches are observed and the parameters change, but no step of the %s that GEM is attached to follows, so "
            "no gradient is projected: attach GEM to the optimizer whose step changes the parameters, such as the one "
            "inside of it",
            type(optimizer).__name__,
        )


def _moving_parameter(optimizer: Optimizer) -> Parameter | None:
    """A parameter that the next step changes, as far as gradients tell."""
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return next((p for p in trained if p.grad is not None), trained[0] if trained else None)
