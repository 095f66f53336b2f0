"""Shows how far a run has come: a bar on a terminal, one line per task or, with a title, per run in a log."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from gem_fast.paper.errors import print_line
from gem_fast.paper.experiments.protocol import Record
from gem_fast.paper.streams.schedule import Schedule


@contextmanager
def progress(schedule: Schedule, record: Record | None = None, title: str = "") -> Iterator[Callable[[Record], None]]:
    """Counts mini-batches on stderr, with the running accuracy: the mean over the tasks seen so far.

    `record` is that of a resumed run, `title` tells which run of several this is. Gives what is to be called after
    every mini-batch.
    """
    ends, learned = schedule.ends, 0 if record is None else record.batches
    # disable=None: no bar unless stderr is a terminal.
    with tqdm(total=ends[-1], initial=learned, unit="batch", dynamic_ncols=True, disable=None) as bar:

        def after_batch(record: Record) -> None:
            bar.update()
            if not len(record.batch) or record.batch[-1] < record.batches:
                return
            accuracy = record.accuracy[-1]
            position = f"task {record.task[-1] + 1}/{len(accuracy)}"
            running = f"accuracy {100 * accuracy[: record.task.max() + 1].mean():.1f} %"
            bar.set_description(", ".join(filter(None, [title, position, running])))
            if bar.disable and record.batches == ends[-1] and title:
                print_line(f"{title}: {running}")
            elif bar.disable and record.batches in ends and not title:
                print_line(f"{position} learned, {running}")

        yield after_batch
