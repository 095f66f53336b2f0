"""G from one step to the next: the matrix itself, and which of its rows a step computes anew."""

from collections.abc import Hashable, Sequence
from operator import is_
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from gem_fast.state import check_count, check_keys, check_plain_task, check_plain_tensor
from gem_fast.task_gradients.rows import enough_rows, new_rows


class GradientRows:
    """Keeps G, and with `every` > 1 has only a part of its rows computed in each step, in turns.

    All rows are due in the first step after the past tasks or the parameters changed; from then on one block of them
    per step, so that none is older than `every` steps.

    Args:
        every: r; 1 computes all rows in every step.

    Attributes:
        reached: per parameter, whether any row depends on it.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.reached: list[bool] = []
        self._G: Tensor | None = None
        self._past: list[Hashable] = []
        self._parameters: list[Parameter] | None = None
        self._step = 0

    def due(self, past: list[Hashable], parameters: Sequence[Parameter]) -> tuple[Tensor, slice]:
        """G (t, p) for these tasks and parameters, and the rows of it that are to be computed now."""
        t, G = len(past), enough_rows(self._G, len(past), parameters)
        if G is not self._G:
            self._G = G
        elif self.every > 1 and past == self._past and self._same(parameters):
            phase = self._step % self.every
            self._step += 1
            assert self._G is not None  # perhaps another one: `_same` takes up a loaded state
            return self._G[:t], slice(phase * t // self.every, (phase + 1) * t // self.every)
        self._past, self._parameters, self._step = past, list(parameters), 0
        self.reached = [False] * len(parameters)
        return G[:t], slice(0, t)

    def computed(self, reached: list[bool]) -> None:
        """Takes down which parameters the rows just computed depend on."""
        self.reached = [was or is_now for was, is_now in zip(self.reached, reached, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same bits: the rows, where they are not all due next."""
        kept = self._G if self.every > 1 else None
        return {
            "every": self.every,
            "G": None if kept is None else kept[: len(self._past)].clone(),
            "past": list(self._past) if kept is not None else [],
            "reached": list(self.reached) if kept is not None else [],
            "step": self._step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the state that `state_dict` returned.

        Raises:
            ValueError: the state is not one of such rows; they are then as they were.
        """
        check_keys("rows of the state", state, ("every", "G", "past", "reached", "step"))
        if type(state["every"]) is not int or state["every"] != self.every:
            raise ValueError(f"state must be of a hook with refresh_every = {self.every}, got {state['every']!r:.50}")
        check_count("step", state["step"], 0, 2**62)
        G, past, reached = state["G"], state["past"], state["reached"]
        for name, value in (("past", past), ("reached", reached)):
            if not isinstance(value, list):
                raise ValueError(f"{name} of the state must be a list, got {type(value).__name__}")
        for task in past:
            check_plain_task("past", task)
        if not all(isinstance(x, bool) for x in reached):
            raise ValueError(f"reached of the state must be a list of booleans, got {reached!r:.50}")
        if G is not None:
            check_plain_tensor("G", G)
            if G.dim() != 2 or len(G) != len(past):
                raise ValueError(f"G must have shape (t, p) with t = {len(past)}, got {tuple(G.shape)}")
        # Which parameters these are the rows of shows in the next step.
        self._G, self._parameters = None if G is None else G.clone(), None
        self._past, self.reached, self._step = list(past), list(reached), state["step"]

    def _same(self, parameters: Sequence[Parameter]) -> bool:
        if self._parameters is not None:
            return len(parameters) == len(self._parameters) and all(map(is_, parameters, self._parameters))
        if len(parameters) != len(self.reached):
            return False
        assert self._G is not None
        self._G, self._parameters = new_rows(len(self._G), parameters).copy_(self._G), list(parameters)
        return True
