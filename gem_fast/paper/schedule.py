"""In which order a stream's tasks are visited, and how many mini-batches each visit has."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gem_fast.paper.errors import InputError
from gem_fast.paper.streams import Stream

__all__ = ["Schedule", "Visit", "make_schedule"]


@dataclass(frozen=True)
class Visit:
    """A task's turn to be learned.

    Attributes:
        task: Number of the task, 0 ... T - 1.
        examples: The places of the training examples that it brings.
        batches: The number of mini-batches, all epochs together.
    """

    task: int
    examples: range
    batches: int


@dataclass(frozen=True)
class Schedule:
    """The visits of a run, in the order of time.

    Attributes:
        visits: The visits; each task has at least one.
        batch_size: Examples per mini-batch.
        epochs: Passes over a visit's examples before the next visit begins.
    """

    visits: tuple[Visit, ...]
    batch_size: int
    epochs: int

    @property
    def ends(self) -> list[int]:
        """For each visit the mini-batches learned when it ends."""
        return list(itertools.accumulate(visit.batches for visit in self.visits))

    @property
    def n_batches(self) -> int:
        """The mini-batches of the whole run."""
        return self.ends[-1]

    def visit_of(self, batch: int) -> int:
        """The place among the visits of the one that mini-batch number `batch`, counted from 1, belongs to."""
        return bisect.bisect_left(self.ends, batch)

    def batches(self, stream: Stream, visit: Visit, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The mini-batches of a visit, as Stream.batches."""
        return stream.batches(visit.task, self.batch_size, self.epochs, generator, visit.examples)


def make_schedule(stream: Stream, batch_size: int, epochs: int, rounds: int = 1) -> Schedule:
    """Visits the tasks in the order of their numbers, once or in several rounds.

    Args:
        stream: The tasks.
        batch_size: Examples per mini-batch; the last one of an epoch may be shorter.
        epochs: Passes over a visit's examples.
        rounds: How often each task comes: a visit in round r brings the r-th part of the task's examples, so that none
            is seen in two of them.

    Returns:
        rounds x T visits.

    Raises:
        InputError: A task has fewer examples than there are rounds.
    """
    visits = []
    for part in range(rounds):
        for task in range(stream.n_tasks):
            n = len(stream.tasks[task].labels)
            if n < rounds:
                raise InputError(
                    f"--rounds must be at most {n}, the training examples of task {task + 1}, got {rounds}"
                )
            examples = range(n * part // rounds, n * (part + 1) // rounds)
            visits.append(Visit(task, examples, epochs * -(-len(examples) // batch_size)))
    return Schedule(tuple(visits), batch_size, epochs)
