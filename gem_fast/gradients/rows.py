"""G as a matrix, kept from one step to the next."""

from collections.abc import Hashable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gem_fast import ops
from gem_fast.state import check_count, check_keys, check_plain_task, check_plain_tensor

# Rows of G start on cache lines, which makes the Gramian's loads aligned.
_ALIGNMENT_BYTES = 64


class RowGradients:
    """`TaskGradients` as the matrix G, of which each step computes all rows anew, or with `refresh_every` some.

    With `refresh_every` > 1 all rows are stale in the first step after the past tasks or the parameters changed; from
    then on one block of them per step, in turns, so that none is older than `refresh_every` steps.

    Args:
        refresh_every: r, the number of steps in which each row is computed once; 1 computes all rows in every step.

    Attributes:
        depends: per parameter, whether any row depends on it.
        stale: the rows that are to be computed now.

    Raises:
        ValueError: refresh_every is smaller than 1.
    """

    def __init__(self, refresh_every: int = 1) -> None:
        if refresh_every < 1:
            raise ValueError(f"refresh_every must be at least 1 step, got {refresh_every}")
        self.refresh_every = refresh_every
        self.depends: list[bool] = []
        self.stale = slice(0, 0)
        self._buffer: Tensor | None = None
        self._past: list[Hashable] = []
        self._parameters: list[Parameter] | None = None
        self._step = 0
        self._view: tuple[Tensor, int, Tensor] | None = None  # G, and what it is a part of

    @property
    def with_current(self) -> Tensor:
        """(t + 1, p): G, and a row for the current mini-batch's gradient, where `begin_step` was told of one."""
        assert self._buffer is not None
        return self._buffer[: len(self._past) + 1]

    @property
    def G(self) -> Tensor:
        """(t, p): rows of the parameters' gradients, flattened one after the other; the same object while it can be."""
        assert self._buffer is not None
        t = len(self._past)
        if self._view is None or self._view[0] is not self._buffer or self._view[1] != t:
            self._view = self._buffer, t, self._buffer[:t]
        return self._view[2]

    def begin_step(
        self,
        past: list[Hashable],
        parameters: Sequence[Parameter],
        *,
        anew: bool = False,
        with_current: bool = False,
    ) -> None:
        """Says which tasks and parameters the rows are of in this step, and finds out which of them are stale.

        With `anew` all of them are. With `with_current` there is one more row, for the current mini-batch.
        """
        t, buffer = len(past), rows_for(len(past) + with_current, parameters, reuse=self._buffer)
        if buffer is not self._buffer:
            self._buffer = buffer
        elif not anew and self.refresh_every > 1 and past == self._past and self._has_rows_of(parameters):
            turn = self._step % self.refresh_every
            self._step += 1
            self.stale = slice(turn * t // self.refresh_every, (turn + 1) * t // self.refresh_every)
            return
        self._past, self._parameters, self._step = past, list(parameters), 0
        self.depends = [False] * len(parameters)
        self.stale = slice(0, t)

    def computed(self, depends: Sequence[bool]) -> None:
        """Takes down which parameters the rows just computed depend on."""
        self.depends = [either or now for either, now in zip(self.depends, depends, strict=True)]

    def gram(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `TaskGradients.gram`."""
        return ops.gram(self.G, grads)

    def combine_(self, grads: Sequence[Tensor], v: Tensor) -> None:
        """As `TaskGradients.combine_`."""
        ops.combine_(grads, self.G, v)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same bits: the rows, where they are not all stale in its step."""
        kept = self._buffer is not None and self.refresh_every > 1
        return {
            "refresh_every": self.refresh_every,
            "G": self.G.clone() if kept else None,
            "past": list(self._past) if kept else [],
            "depends": list(self.depends) if kept else [],
            "step": self._step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the state that `state_dict` returned.

        Raises:
            ValueError: the state is not one of such rows; they are then as they were.
        """
        check_keys("rows of the state", state, ("refresh_every", "G", "past", "depends", "step"))
        if type(state["refresh_every"]) is not int or state["refresh_every"] != self.refresh_every:
            raise ValueError(
                f"state must be of an engine with refresh_every = {self.refresh_every}, "
                f"got {state['refresh_every']!r:.50}"
            )
        check_count("step", state["step"], 0, 2**62)
        G, past, depends = state["G"], state["past"], state["depends"]
        for name, value in (("past", past), ("depends", depends)):
            if not isinstance(value, list):
                raise ValueError(f"{name} of the state must be a list, got {type(value).__name__}")
        for task in past:
            check_plain_task("past", task)
        if not all(isinstance(x, bool) for x in depends):
            raise ValueError(f"depends of the state must be a list of booleans, got {depends!r:.50}")
        if G is not None:
            check_plain_tensor("G", G)
            if G.dim() != 2 or len(G) != len(past):
                raise ValueError(f"G must have shape (t, p) with t = {len(past)}, got {tuple(G.shape)}")
        # Which parameters these are the rows of shows in the next step.
        self._buffer, self._parameters = None if G is None else G.clone(), None
        self._past, self.depends, self._step = list(past), list(depends), state["step"]

    def _has_rows_of(self, parameters: Sequence[Parameter]) -> bool:
        if self._parameters is not None:
            return len(parameters) == len(self._parameters) and all(map(is_, parameters, self._parameters))
        if len(parameters) != len(self.depends):
            return False
        # A state was loaded: its rows go on in a buffer whose rows are aligned.
        loaded, self._parameters = self.G, list(parameters)
        self._buffer = rows_for(len(loaded), parameters).copy_(loaded)
        return True


def rows_for(t: int, parameters: Sequence[Tensor], *, reuse: Tensor | None = None) -> Tensor:
    """A matrix for t rows of these parameters: `reuse` where it has as many or more, else a new uninitialised one.

    The rows of a new one are slices of a slightly wider buffer.
    """
    like, p = parameters[0], number_of(parameters)
    if (
        reuse is not None
        and reuse.shape[0] >= t
        and (reuse.shape[1], reuse.dtype, reuse.device) == (p, like.dtype, like.device)
    ):
        return reuse
    per_line = _ALIGNMENT_BYTES // like.element_size()
    return torch.empty((t, -(-p // per_line) * per_line), dtype=like.dtype, device=like.device)[:, :p]


def number_of(parameters: Sequence[Tensor]) -> int:
    """p, the number of parameters."""
    return sum(map(Tensor.numel, parameters))


def by_parameter(G: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """For each parameter the part (t, ...) of G (t, p) that is its own; of a scalar (t, 1)."""
    parts = G.split([parameter.numel() for parameter in parameters], 1)
    return [part.unflatten(1, p.shape or (1,)) for part, p in zip(parts, parameters, strict=True)]
