"""When a fused pass is compared with the loop again, and on which tasks."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import Any

from gem_fast.state import check_count, check_keys, check_plain_task


class Schedule:
    """Compares a task in the first pass that it is in, together with one other task; and one task in pass 1, 2, 4, 8...

    Which other task follows from the number of the pass alone: no generator of the user's is touched, and a resumed run
    compares what the uninterrupted one does.

    Attributes:
        unchecked: the number of passes since the last comparison.
    """

    def __init__(self) -> None:
        self.unchecked = 0
        self._passes = 0
        self._known: dict[Hashable, None] = {}

    def due(self, tasks: Sequence[Hashable], *, is_new: bool) -> list[int]:
        """The positions of the tasks to compare in the coming pass.

        Args:
            tasks: those whose gradients the pass computes.
            is_new: whether the pass is the first of its kind: one task is then compared in any case.
        """
        number = self._passes + 1
        due = [k for k, task in enumerate(tasks) if task not in self._known]
        if not (due or is_new or number & (number - 1) == 0):
            return []
        others = [k for k, task in enumerate(tasks) if task in self._known]
        return [*due, random.Random(number).choice(others)] if others else due

    def passed(self, tasks: Sequence[Hashable], due: Sequence[int]) -> None:
        """Counts a pass, which stood the comparisons that were due."""
        self._passes += 1
        self.unchecked = 0 if due else self.unchecked + 1
        for k in due:
            self._known[tasks[k]] = None

    def state_dict(self) -> dict[str, Any]:
        """How many passes there were, and which tasks were compared."""
        return {"passes": self._passes, "tasks": list(self._known)}

    @classmethod
    def from_state(cls, state: Any) -> Schedule:
        """The schedule whose `state_dict` returned this; else raises ValueError."""
        check_keys("schedule of the state", state, ("passes", "tasks"))
        check_count("passes", state["passes"], 0, 2**62)
        if not isinstance(state["tasks"], list):
            raise ValueError(f"tasks of the state must be a list, got {type(state['tasks']).__name__}")
        for task in state["tasks"]:
            check_plain_task("tasks", task)
        schedule = cls()
        schedule._passes, schedule._known = state["passes"], dict.fromkeys(state["tasks"])
        return schedule
