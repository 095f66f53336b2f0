"""The paper's protocol: learn the tasks one after another, and test on all tasks, past and future, along the way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from gem_fast import metrics
from gem_fast.paper.errors import Diverged
from gem_fast.paper.experiments.torchrun import Learner, Processes, processes
from gem_fast.paper.streams import Stream
from gem_fast.paper.streams.schedule import Schedule, joint_batches

# A model with larger outputs has diverged: the squares of its gradients are no float32 any more.
LARGEST_OUTPUT = 1e15

FloatArray = npt.NDArray[np.float64]


@dataclass
class Record:
    """What was measured along a stream of T tasks, to its end or so far; accuracies are fractions between 0 and 1."""

    baseline: FloatArray  # (T,): accuracy on each task at random initialisation
    accuracy: FloatArray  # (rows, T): accuracy on each task at each evaluation
    batch: npt.NDArray[np.int64]  # (rows,): mini-batches learned before each evaluation
    task: npt.NDArray[np.int64]  # (rows,): the task being learned at each evaluation, 0 ... T - 1
    train_seconds: float = 0.0  # wall-clock time inside `observe`
    eval_seconds: float = 0.0  # wall-clock time of all evaluations, the baseline included
    batches: int = 0  # mini-batches learned

    @property
    def R(self) -> FloatArray:
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

    @property
    def zero_shot(self) -> float:
        """Mean accuracy on the tasks not yet seen, along the stream; 0.0 with a single task. Not for joint training."""
        unseen = metrics.zero_shot(self.accuracy, self.task)
        return float(unseen.mean()) if unseen.size else 0.0

    def add(self, task: int, accuracy: FloatArray) -> None:
        """Adds an evaluation after the last mini-batch, one of the given task."""
        self.accuracy = np.vstack([self.accuracy, accuracy])
        self.batch = np.append(self.batch, self.batches)
        self.task = np.append(self.task, task)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which JSON and checkpoints can hold."""
        return {
            "baseline": self.baseline.tolist(),
            "seconds": {"train": self.train_seconds, "eval": self.eval_seconds},
            "curves": {name: getattr(self, name).tolist() for name in ("batch", "task", "accuracy")},
        }

    @classmethod
    def of(cls, values: Any, batches: int = 0) -> Record:
        """The record that `to_dict` made the values of; the mini-batches learned are not among them."""
        curves, seconds = values["curves"], values["seconds"]
        batch, task = (np.array(curves[name], dtype=np.int64) for name in ("batch", "task"))
        baseline = np.array(values["baseline"], dtype=np.float64)
        accuracy = np.array(curves["accuracy"], dtype=np.float64).reshape(len(batch), len(baseline))
        return cls(baseline, accuracy, batch, task, seconds["train"], seconds["eval"], batches)


def learn_stream(
    learner: Learner,
    stream: Stream,
    schedule: Schedule,
    *,
    eval_every: int,
    generator: torch.Generator,
    watch: Sequence[Callable[[Record], None]] = (),
    record: Record | None = None,
) -> Record:
    """Trains a learner, on the stream's device, on every task in turn, in the order and mini-batches of the schedule.

    With joint training the learner gets as many mini-batches of the shuffled union of all tasks instead: row i of R is
    measured after the fraction (i + 1) / T of them, and only the last row is that of the trained learner.

    Within an experience there is an evaluation every `eval_every` mini-batches, and one at its end. The generator, on
    the CPU, is the source of the order of the examples. Each of `watch` is called after every mini-batch with the run
    so far, which is not to be changed. If a run is to go on from its `record`, the learner and torch's global generator
    are as they were after its last mini-batch, and `generator` is as it was at the start of the stream.

    Returns all measurements; raises Diverged where the outputs of the model stop being finite.
    """
    device = stream.device
    if record is None:
        start = _now(device)
        baseline = evaluate(learner, stream)
        none = np.zeros(0, dtype=np.int64)
        record = Record(baseline, np.zeros((0, len(baseline))), none, none, eval_seconds=_now(device) - start)
    learned = record.batches
    joint = joint_batches(stream, schedule, generator) if learner.trains_jointly else None
    for experience in schedule.experiences:
        how = schedule.batch_size, schedule.epochs, generator, experience.examples
        own = ((x, y, experience.task) for x, y in stream.batches(experience.task, *how))
        batches: Any = own if joint is None else itertools.islice(joint, experience.batches)
        # Mini-batches that were learned before are drawn, too, and skipped: the order of the rest depends on the draws.
        skip = min(experience.batches, learned)
        learned -= skip
        for i, (x, y, task) in itertools.islice(enumerate(batches, start=1), skip, None):
            start = _now(device)
            try:
                learner.observe(x, y, task)
            except (RuntimeError, ValueError):
                evaluate(learner, stream, alone=True)  # says so if the model has diverged
                raise
            record.train_seconds += _now(device) - start
            record.batches += 1
            if i % eval_every == 0 or i == experience.batches:
                start = _now(device)
                record.add(experience.task, evaluate(learner, stream))
                record.eval_seconds += _now(device) - start
            for tell in watch:
                tell(record)
    return record


def evaluate(learner: Learner, stream: Stream, alone: bool = False) -> FloatArray:
    """Accuracy on the test set of every task, shape (T,), fractions; the learner is left in training mode.

    Raises Diverged where the learner's outputs are not finite or too large. Several processes evaluate the same model,
    each on its part of the tasks, unless this one works `alone`.
    """
    learner.train(False)
    correct, examples, bad = counts = torch.zeros(3, stream.n_tasks, dtype=torch.float64, device=stream.device)
    size, rank = Processes() if alone else processes()
    if size > 1:
        for buffer in learner.buffers():
            dist.broadcast(buffer, 0)
    with torch.inference_mode():
        for task in range(rank, stream.n_tasks, size):
            for x, y in stream.test_batches(task):
                logits = learner.predict(x, task)
                correct[task] += (logits.argmax(1) == y).sum()
                examples[task] += len(y)
                bad[task] += (~(logits.abs() < LARGEST_OUTPUT)).sum()
    learner.train(True)
    if size > 1:
        dist.all_reduce(counts)
    if bad.any():
        raise Diverged("training diverged: the model's outputs are not finite any more, or too large to compute with")
    accuracy: FloatArray = (correct / examples).cpu().numpy()
    return accuracy


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
