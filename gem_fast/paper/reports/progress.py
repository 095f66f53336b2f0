"""Shows how far a run has come: a bar on a terminal, one line per task or, with a title, per run in a log."""

from __future__ import annotations

from tqdm import tqdm

from gem_fast.paper.errors import print_line
from gem_fast.paper.experiments.protocol import Record
from gem_fast.paper.streams.schedule import Schedule


class Progress:
    """Counts mini-batches on stderr, with the running accuracy: the mean over the tasks seen so far."""

    def __init__(self, schedule: Schedule, record: Record | None = None, title: str = "") -> None:
        """Starts the display; `record` is that of a resumed run, `title` tells which run of several this is."""
        self.schedule = schedule
        self.title = title
        learned = 0 if record is None else record.batches
        # disable=None: no bar unless stderr is a terminal.
        self.bar = tqdm(total=schedule.ends[-1], initial=learned, unit="batch", dynamic_ncols=True, disable=None)

    def after_batch(self, record: Record) -> None:
        """Notes one more mini-batch learned."""
        self.bar.update()
        if (accuracy := record.newest) is None:
            return
        position = f"task {record.task[-1] + 1}/{len(accuracy)}"
        running = f"accuracy {100 * accuracy[: record.task.max() + 1].mean():.1f} %"
        self.bar.set_description(", ".join(filter(None, [self.title, position, running])))
        if self.bar.disable and record.batches in self.schedule.ends:
            if not self.title:
                print_line(f"{position} learned, {running}")
            elif record.batches == self.schedule.ends[-1]:
                print_line(f"{self.title}: {running}")

    def __enter__(self) -> Progress:
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the bar's line."""
        self.bar.close()
