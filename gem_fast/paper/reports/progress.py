"""Shows how far a run has come: a bar on a terminal, one line per task or, with a title, per run in a log."""

from __future__ import annotations

from types import TracebackType

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from gem_fast.paper.errors import print_line
from gem_fast.paper.streams.schedule import Schedule

__all__ = ["Progress"]


class Progress:
    """Counts mini-batches on stderr, with the running accuracy: the mean over the tasks seen so far."""

    def __init__(self, schedule: Schedule, learned: int = 0, title: str = "") -> None:
        """Starts the display.

        Args:
            schedule: In which order the tasks are learned.
            learned: Mini-batches that a resumed run has learned already.
            title: Which run of several this is.
        """
        self.experiences = schedule.experiences
        self.ends = set(schedule.ends)
        self.batch = learned
        self.title = title
        self.experience = schedule.experience_of(learned + 1)
        # disable=None: no bar unless stderr is a terminal.
        self.bar = tqdm(total=schedule.n_batches, initial=learned, unit="batch", dynamic_ncols=True, disable=None)

    def on_batch(self, task: int, accuracy: npt.NDArray[np.float64] | None) -> None:
        """Notes one more mini-batch learned.

        Args:
            task: Its task, 0 ... T - 1.
            accuracy: Shape (T,), the accuracy on every task if it was followed by an evaluation, else None.
        """
        self.batch += 1
        self.bar.update()
        if accuracy is None:
            return
        seen = 1 + max(experience.task for experience in self.experiences[: self.experience + 1])
        position = f"task {task + 1}/{len(accuracy)}"
        running = f"accuracy {100 * accuracy[:seen].mean():.1f} %"
        self.bar.set_description(", ".join(filter(None, [self.title, position, running])))
        if self.batch in self.ends:
            self.experience += 1
            if self.bar.disable and not self.title:
                print_line(f"{position} learned, {running}")
            elif self.bar.disable and self.experience == len(self.experiences):
                print_line(f"{self.title}: {running}")

    def __enter__(self) -> Progress:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the bar's line."""
        self.bar.close()
