"""The paper's protocol: learn the tasks one after another, and test on all tasks, past and future, along the way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gem_fast import metrics
from gem_fast.paper.errors import Diverged
from gem_fast.paper.experiments.torchrun import DataParallel
from gem_fast.paper.learners import Learner
from gem_fast.paper.streams import Stream
from gem_fast.paper.streams.joint_batches import joint_batches
from gem_fast.paper.streams.schedule import make_schedule

__all__ = ["Journal", "Record", "evaluate", "learn_stream"]

# A model with larger outputs has diverged: the squares of its gradients are no float32 any more.
LARGEST_OUTPUT = 1e15


@dataclass(frozen=True)
class Record:
    """What was measured along a stream of T tasks; accuracies are fractions between 0 and 1.

    Attributes:
        baseline: Shape (T,), float64: accuracy on each task at random initialisation.
        accuracy: Shape (rows, T), float64: accuracy on each task at each evaluation.
        batch: Shape (rows,), int64: mini-batches learned before each evaluation.
        task: Shape (rows,), int64: the task being learned at each evaluation, 0 ... T - 1.
        train_seconds: Wall-clock time inside `observe`.
        eval_seconds: Wall-clock time of all evaluations, the baseline included.
    """

    baseline: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]
    batch: npt.NDArray[np.int64]
    task: npt.NDArray[np.int64]
    train_seconds: float
    eval_seconds: float

    @property
    def R(self) -> npt.NDArray[np.float64]:
        """R, shape (T, T): accuracy on task j (column) after learning task i (row) for the last time.

        Where tasks come back, FWT also counts what a task's earlier experiences have taught.
        """
        return metrics.r_matrix(self.accuracy, self.task)

    @property
    def acc(self) -> float:
        """Average accuracy, Eq. 2."""
        return metrics.acc(self.R)

    @property
    def bwt(self) -> float:
        """Backward transfer, Eq. 3."""
        return metrics.bwt(self.R)

    @property
    def fwt(self) -> float:
        """Forward transfer, Eq. 4."""
        return metrics.fwt(self.R, self.baseline)


@dataclass
class Journal:
    """A run so far, between two mini-batches; with the learner's state, all that is needed to go on with it.

    Attributes:
        baseline: As in Record.
        batches: Mini-batches learned.
        rows: For each evaluation, the mini-batches learned before it, its task, and the accuracies, shape (T,).
        train_seconds: As in Record.
        eval_seconds: As in Record.
    """

    baseline: npt.NDArray[np.float64]
    batches: int = 0
    rows: list[tuple[int, int, npt.NDArray[np.float64]]] = field(default_factory=list)
    train_seconds: float = 0.0
    eval_seconds: float = 0.0

    def record(self) -> Record:
        """The measurements, in one array each."""
        batch, task, accuracy = zip(*self.rows, strict=True)
        return Record(
            self.baseline, np.stack(accuracy), np.array(batch), np.array(task), self.train_seconds, self.eval_seconds
        )


def learn_stream(
    learner: Learner,
    stream: Stream,
    *,
    batch_size: int,
    epochs: int,
    eval_every: int,
    generator: torch.Generator,
    rounds: int = 1,
    on_batch: Callable[[int, npt.NDArray[np.float64] | None], None] = lambda task, accuracy: None,
    on_journal: Callable[[Journal], None] = lambda journal: None,
    journal: Journal | None = None,
) -> Record:
    """Trains a learner on every task in turn, once or in several rounds.

    With joint training the learner gets as many mini-batches of the shuffled union of all tasks instead: row i of R is
    measured after the fraction (i + 1) / T of them, and only the last row is that of the trained learner.

    Args:
        learner: The learner, on the stream's device.
        stream: The tasks.
        batch_size: Examples per mini-batch.
        epochs: Passes over the examples of an experience before the next one begins.
        eval_every: Mini-batches between two evaluations within an experience, which also ends with one.
        generator: A CPU generator, source of the order of the examples.
        rounds: How often each task comes, each time with another part of its examples.
        on_batch: Called after every mini-batch with the task's number and the accuracy on each task, shape (T,),
            where this mini-batch was followed by an evaluation, else None.
        on_journal: Called after that with the run so far, which is not to be changed.
        journal: The run so far, if it is to go on; the learner and torch's global generator are then as they were
            after that mini-batch, and `generator` is as it was at the start of the stream.

    Returns:
        All measurements.

    Raises:
        Diverged: The outputs of the model stopped being finite.
        InputError: A task has fewer examples than there are rounds.
    """
    device = stream.device
    schedule = make_schedule(stream, batch_size, epochs, rounds)

    def timed_evaluation() -> tuple[npt.NDArray[np.float64], float]:
        start = _now(device)
        return evaluate(learner, stream), _now(device) - start

    if journal is None:
        baseline, seconds = timed_evaluation()
        journal = Journal(baseline, eval_seconds=seconds)
    learned = journal.batches
    joint = joint_batches(stream, schedule.n_batches // epochs, epochs, generator) if learner.trains_jointly else None
    for experience in schedule.experiences:
        task = experience.task
        batches: Iterator[tuple[Tensor, Tensor, Any]]
        if joint is None:
            batches = ((x, y, task) for x, y in schedule.batches(stream, experience, generator))
        else:
            batches = itertools.islice(joint, experience.batches)
        # Mini-batches that were learned before are drawn, too, and skipped: the order of the rest depends on the draws.
        skip = min(experience.batches, learned)
        learned -= skip
        for i, (x, y, task_of) in itertools.islice(enumerate(batches, start=1), skip, None):
            start = _now(device)
            try:
                learner.observe(x, y, task_of)
            except (RuntimeError, ValueError):
                check_outputs(
                    learner, stream
                )  # raises Diverged if the model has; otherwise the error is raised as it is
                raise
            journal.train_seconds += _now(device) - start
            journal.batches += 1
            accuracy = None
            if i % eval_every == 0 or i == experience.batches:
                accuracy, seconds = timed_evaluation()
                journal.eval_seconds += seconds
                journal.rows.append((journal.batches, task, accuracy))
            on_batch(task, accuracy)
            on_journal(journal)
    return journal.record()


def evaluate(learner: Learner, stream: Stream) -> npt.NDArray[np.float64]:
    """Accuracy on the test set of every task, in evaluation mode; the learner is left in training mode.

    Args:
        learner: The learner, on the stream's device.
        stream: The T tasks.

    Returns:
        Shape (T,), float64, fractions between 0 and 1.

    Raises:
        Diverged: The learner's outputs are not finite.
    """
    learner.train(False)
    correct, examples = counts = torch.zeros(2, stream.n_tasks, dtype=torch.float64, device=stream.device)
    tasks: Sequence[int] = range(stream.n_tasks)
    if isinstance(learner, DataParallel):
        learner.broadcast_buffers()
        tasks = learner.part(tasks)
    with torch.inference_mode():
        for task in tasks:
            for x, y in stream.test_batches(task):
                logits = learner.predict(x, task)
                # A logit that is not finite makes the sum so: this needs no transfer to the CPU of its own.
                correct[task] += (logits.argmax(1) == y).sum() + 0 * logits.sum()
                examples[task] += len(y)
    learner.train(True)
    if isinstance(learner, DataParallel):
        learner.sum_(counts)
    accuracy: npt.NDArray[np.float64] = (correct / examples).cpu().numpy()
    if not np.isfinite(accuracy).all():
        raise Diverged("training diverged: the model's outputs are not finite any more")
    return accuracy


def check_outputs(learner: Learner, stream: Stream) -> None:
    """Raises Diverged if the learner's outputs on some test examples of any task are too large to learn from."""
    learner.train(False)
    with torch.inference_mode():
        for task in range(stream.n_tasks):
            x, _ = next(iter(stream.test_batches(task)))
            if not (learner.predict(x, task).abs() < LARGEST_OUTPUT).all():
                raise Diverged("training diverged: the model's outputs or gradients are too large to compute with")
    learner.train(True)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
