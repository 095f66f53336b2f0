"""In which order a stream's tasks are learned, and in how many mini-batches."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gem_fast.paper.errors import InputError
from gem_fast.paper.streams import Stream

__all__ = ["Experience", "Schedule", "make_schedule"]


@dataclass(frozen=True)
class Experience:
    """What a learner gets of one task at a time: all of its examples, or in several rounds a part of them.

    Attributes:
        task: Number of the task, 0 ... T - 1.
        examples: The numbers of its training examples.
        batches: The number of mini-batches, all epochs together.
    """

    task: int
    examples: range
    batches: int


@dataclass(frozen=True)
class Schedule:
    """The experiences of a run, in the order of time.

    Attributes:
        experiences: Each task has at least one.
        batch_size: Examples per mini-batch.
        epochs: Passes over the examples of an experience before the next one begins.
    """

    experiences: tuple[Experience, ...]
    batch_size: int
    epochs: int

    @property
    def ends(self) -> list[int]:
        """For each experience the mini-batches learned when it ends."""
        return list(itertools.accumulate(experience.batches for experience in self.experiences))

    @property
    def n_batches(self) -> int:
        """The mini-batches of the whole run."""
        return self.ends[-1]

    def experience_of(self, batch: int) -> int:
        """The number of the experience, from 0, that mini-batch number `batch`, from 1, belongs to."""
        return bisect.bisect_left(self.ends, batch)

    def batches(
        self, stream: Stream, experience: Experience, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The mini-batches of an experience, as Stream.batches."""
        return stream.batches(experience.task, self.batch_size, self.epochs, generator, experience.examples)


def make_schedule(stream: Stream, batch_size: int, epochs: int, rounds: int = 1) -> Schedule:
    """Makes a schedule of the tasks in the order of their numbers, once or in several rounds.

    Args:
        stream: The tasks.
        batch_size: Examples per mini-batch; the last one of an epoch may be shorter.
        epochs: Passes over the examples of an experience.
        rounds: How often each task comes; round r has the r-th part of its examples, so that none comes in two rounds.

    Returns:
        The schedule, of rounds x T experiences.

    Raises:
        InputError: A task has fewer examples than there are rounds.
    """
    experiences = []
    for part in range(rounds):
        for task in range(stream.n_tasks):
            n = len(stream.tasks[task].labels)
            if n < rounds:
                raise InputError(
                    f"--rounds must be at most {n}, the training examples of task {task + 1}, got {rounds}"
                )
            examples = range(n * part // rounds, n * (part + 1) // rounds)
            experiences.append(Experience(task, examples, epochs * -(-len(examples) // batch_size)))
    return Schedule(tuple(experiences), batch_size, epochs)
