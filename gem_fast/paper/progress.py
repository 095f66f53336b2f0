"""Shows how far a run has come: a bar on a terminal, one line per task or, with a title, per run in a log."""

from __future__ import annotations

import sys
from types import TracebackType

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

__all__ = ["Progress"]


class Progress:
    """Counts mini-batches on stderr, with the running accuracy: the mean over the tasks seen so far."""

    def __init__(self, n_tasks: int, batches_per_task: int, learned: int = 0, title: str = "") -> None:
        """Starts the display.

        Args:
            n_tasks: Tasks in the stream.
            batches_per_task: Mini-batches of each task.
            learned: Mini-batches that a resumed run has learned already.
            title: Which run of several this is.
        """
        self.n_tasks = n_tasks
        self.batches_per_task = batches_per_task
        self.batch = learned
        self.title = title
        # disable=None: no bar unless stderr is a terminal.
        total = n_tasks * batches_per_task
        self.bar = tqdm(total=total, initial=learned, unit="batch", dynamic_ncols=True, disable=None)

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
        running = f"accuracy {100 * accuracy[: task + 1].mean():.1f} %"
        where = f"{self.title}, " if self.title else ""
        self.bar.set_description(f"{where}task {task + 1}/{self.n_tasks}, {running}")
        if self.bar.disable and self.title and self.batch == self.n_tasks * self.batches_per_task:
            print(f"{self.title}: {running}", file=sys.stderr, flush=True)
        elif self.bar.disable and not self.title and self.batch % self.batches_per_task == 0:
            print(f"task {task + 1}/{self.n_tasks} learned, {running}", file=sys.stderr, flush=True)

    def skip(self, learned: int) -> None:
        """Notes mini-batches that a resumed run has learned already."""
        self.batch += learned
        self.bar.update(learned)

    def __enter__(self) -> Progress:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the bar's line."""
        self.bar.close()
