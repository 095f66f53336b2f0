"""In which order a stream's tasks are learned, and in how many mini-batches."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gem_fast.paper.errors import InputError
from gem_fast.paper.streams import Stream


@dataclass(frozen=True)
class Experience:
    """What a learner gets of a task before the next one: all of its examples, or one part of them in each round."""

    task: int  # its number, 0 ... T - 1
    examples: range  # the numbers of its training examples
    batches: int  # the number of mini-batches, all epochs together


@dataclass(frozen=True)
class Schedule:
    """The experiences of a run, in the order of time."""

    experiences: tuple[Experience, ...]  # each task has at least one
    batch_size: int  # examples per mini-batch
    epochs: int  # passes over the examples of an experience before the next one begins

    @property
    def ends(self) -> list[int]:
        """For each experience the mini-batches learned when it ends; the last are those of the whole run."""
        return list(itertools.accumulate(experience.batches for experience in self.experiences))


def make_schedule(stream: Stream, batch_size: int, epochs: int, rounds: int = 1) -> Schedule:
    """Makes a schedule of the tasks in the order of their numbers, once or in several rounds: rounds x T experiences.

    Round r has the r-th part of a task's examples, so that none comes in two rounds; raises InputError where a task has
    fewer examples than there are rounds.
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


def joint_batches(
    stream: Stream, schedule: Schedule, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The schedule's number of mini-batches, but of all tasks' training examples, shuffled together in every epoch.

    Yields x, shape (batch, ...), y, shape (batch,), and each example's task, shape (batch,), int64, on the CPU; the
    sizes of an epoch's mini-batches differ by 1 at most.
    """
    counts = torch.tensor([len(task.labels) for task in stream.tasks])
    task_of = torch.arange(len(counts)).repeat_interleave(counts)
    for _ in range(schedule.epochs):
        # The tasks in a random order, and each task's own examples in a random order: a shuffled union.
        shuffled = task_of[torch.randperm(len(task_of), generator=generator)]
        examples = [stream.batches(task, 1, 1, generator) for task in range(len(counts))]
        for tasks in shuffled.tensor_split(schedule.ends[-1] // schedule.epochs):
            x, y = zip(*(next(examples[task]) for task in tasks.tolist()), strict=True)
            yield torch.cat(x), torch.cat(y), tasks
