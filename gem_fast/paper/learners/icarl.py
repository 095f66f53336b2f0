"""iCaRL (Rebuffi et al. 2017): exemplars selected by herding, classification by the nearest mean of exemplars."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gem_fast.memory.herding import herding_order
from gem_fast.paper.config import Rate, Real, Whole, by_stream
from gem_fast.paper.errors import InputError
from gem_fast.paper.learners.base import CurrentTaskBuffer, Part, SgdConfig, SgdLearner
from gem_fast.paper.learners.stream_info import StreamInfo
from gem_fast.paper.streams.classes import TEST_BATCH

Class = tuple[int, int]  # a task and a label of it

# How far away a class without an example is: finite, because logits that are not finite mean divergence.
FAR_AWAY = 1e10


class Icarl(SgdLearner):
    """SGD on the loss plus strength times distillation from the network as it was at the end of the last task.

    When a task ends, its classes get exemplars by herding, as many for each as keep all classes seen within the budget,
    and older classes lose those that were selected last. An example is classified, among the classes of its task, as
    the one whose exemplars have the nearest mean. While a task is learned, its classes have the exemplars that they
    would get if it ended now; the classes of a task not seen yet are all equally likely. Where tasks share the outputs,
    each has classes of its own nevertheless.

    As in the published runs, and not as in Rebuffi et al.: the features are the network's outputs for all classes, not
    the normalised activations before them; a step's loss is the cross-entropy among the task's classes; and
    distillation takes one exemplar of each past class per step, drawn at random, and compares outputs among the classes
    of its task (Kullback-Leibler divergence, mean over the classes of a task, sum over tasks). Unlike the published
    code, which never evicts exemplars of old classes and keeps 3.6 times the budget after 20 tasks, this one keeps to
    the budget; it herds on all outputs, in evaluation mode, and passes all exemplars of a step through the network at
    once.
    """

    class Config(SgdConfig):
        """The options of icarl."""

        lr: Rate = by_stream(rotations=0.1, permutations=0.1, cifar100=1.0, split=0.1)
        memory: Whole = by_stream(rotations=5120, permutations=5120, cifar100=1280, split=1280)
        """exemplars of all classes together"""
        strength: Real = 1.0
        """weight of distillation"""

    def __init__(self, stream_info: StreamInfo, device: torch.device, config: Config) -> None:
        """Makes a new model; the seed of the draws comes from torch's global generator.

        Raises InputError if there would be less than one exemplar of each class.
        """
        memory = config.memory
        n_classes = sum(map(len, stream_info.outputs))
        if memory < n_classes:
            raise InputError(f"--memory must be at least one exemplar of each class, {n_classes} here, got {memory}")
        super().__init__(stream_info, device, config)
        self.memory = memory
        self.strength = config.strength
        self.current_task = CurrentTaskBuffer()
        self.exemplars = Exemplars()
        self.generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self._other_outputs = stream_info.other_outputs_mask().to(device)
        # Caches: the first one depends on the exemplars and the current task, the second one on the model as well.
        self._past: _PastExemplars | None = None
        self._means: dict[Class, Tensor] | None = None

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Takes one step on the mini-batch (x, y); if it is the first of a task, the one before gets its exemplars."""
        self._means = None
        if self.current_task.ends_with(task):
            self.exemplars.by_class = {c: (kept, self._evaluate(kept)) for c, kept in self.current_exemplars().items()}
            self._past = self._past_exemplars(task)
        self.current_task.observe(x, y, task)
        self.optimizer.zero_grad()
        loss = self.loss(x, y, task)
        if self._past is not None:
            loss = loss + self.strength * self._distillation(self._past)
        loss.backward()
        self.optimizer.step()

    def predict(self, x: Tensor, task: int) -> Tensor:
        """Negative distances of the features to the means of exemplars of the task's classes."""
        if self._means is None:
            self._means = {c: self._evaluate(kept).mean(0) for c, kept in self.current_exemplars().items()}
        classes = [(task, label) for label in range(len(self.stream_info.outputs[task]))]
        outputs = self.all_outputs(x)
        if not any(c in self._means for c in classes):
            return outputs.new_zeros(len(outputs), len(classes))
        missing = outputs.new_full((self.stream_info.n_outputs,), FAR_AWAY)
        means = torch.stack([self._means.get(c, missing) for c in classes])
        distances: Tensor = (outputs[:, None] - means).norm(dim=2)
        return -distances

    def current_exemplars(self) -> dict[Class, Tensor]:
        """The exemplars of each class seen, first selected first, as they would be if the current task ended now."""
        exemplars = {c: kept for c, (kept, _) in self.exemplars.by_class.items()}
        if self.current_task.task is None:
            return exemplars
        x, y = self.current_task.examples()
        candidates: dict[Class, Tensor] = {}
        for label in y.unique():
            c = (self.current_task.task, int(label))
            seen = torch.cat([x[y == label], exemplars[c]]) if c in exemplars else x[y == label]
            candidates[c] = seen.unique(dim=0)  # further epochs, and a task that comes back, show the same again
        n = self.memory // len(exemplars | candidates)
        exemplars = {c: kept[:n].clone() for c, kept in exemplars.items()}  # a view's state would hold all of it
        order = {c: herding_order(self._evaluate(seen).double(), n) for c, seen in candidates.items()}
        return exemplars | {c: seen[order[c]] for c, seen in candidates.items()}

    def _evaluate(self, x: Tensor) -> Tensor:
        """The features of examples, in evaluation mode and without gradients."""
        mode = self.training
        self.train(False)
        with torch.no_grad():
            features = torch.cat([self.all_outputs(part) for part in x.split(TEST_BATCH)])
        self.train(mode)
        return features

    def _distillation(self, past: _PastExemplars) -> Tensor:
        draws = torch.rand(len(past.sizes), generator=self.generator, dtype=torch.float64)
        rows = (past.sizes.cumsum(0) - past.sizes + (draws * past.sizes).long()).to(past.x.device)
        outputs, targets = self.all_outputs(past.x[rows]), past.outputs[rows]
        new, old = (
            logits.masked_fill(past.other_outputs, -torch.inf).log_softmax(1).masked_fill(past.other_outputs, 0.0)
            for logits in (outputs, targets)
        )
        divergence = F.kl_div(new, old, reduction="none", log_target=True).sum(1)
        return divergence @ past.weights

    def _past_exemplars(self, task: int) -> _PastExemplars | None:
        """The exemplars of all tasks but one, prepared for the steps of that one."""
        past = {c: kept for c, kept in self.exemplars.by_class.items() if c[0] != task}
        if not past:
            return None
        x, outputs = (torch.cat(part) for part in zip(*past.values(), strict=True))
        sizes = torch.tensor([len(kept) for kept, _ in past.values()])
        tasks = torch.tensor([past_task for past_task, _ in past])
        weights = 1 / tasks.bincount()[tasks].to(outputs)
        return _PastExemplars(x, outputs, sizes, self._other_outputs[tasks], weights)

    def get_extra_state(self) -> dict[str, Any]:
        """The states of the parts and of the generator."""
        return super().get_extra_state() | {"generator": self.generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores them."""
        super().set_extra_state(state)
        self.generator.set_state(state["generator"])
        self._means = None
        self._past = None if self.current_task.task is None else self._past_exemplars(self.current_task.task)


class Exemplars(Part):
    """The exemplars of each class and the outputs that distillation compares with."""

    STATE = ("by_class",)

    def __init__(self) -> None:
        # For each class the exemplars, shape (m, ...), first selected first, and their outputs for all classes.
        self.by_class: dict[Class, tuple[Tensor, Tensor]] = {}


class _PastExemplars(NamedTuple):
    """The exemplars that distillation draws from, class by class."""

    x: Tensor  # (n, ...)
    outputs: Tensor  # (n, outputs), that the network's are compared with
    sizes: Tensor  # (classes,), int64, on the CPU: the exemplars of a class
    other_outputs: Tensor  # (classes, outputs), bool: those that are not of the class's task
    weights: Tensor  # (classes,): 1 over the number of classes of its task
