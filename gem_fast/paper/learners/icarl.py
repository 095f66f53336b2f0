"""iCaRL (Rebuffi et al. 2017): exemplars chosen by herding, classification by the nearest mean of exemplars."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gem_fast.paper.errors import InputError
from gem_fast.paper.learners.base import SgdLearner
from gem_fast.paper.learners.visit import Visit
from gem_fast.paper.setting import Setting
from gem_fast.state import check_count, check_keys, check_plain_tensor

__all__ = ["Icarl", "herd"]

Class = tuple[int, int]  # a task and a label of it

# The distance of a class that no example was seen of: finite, so that sums of logits still tell divergence.
FAR = 1e10


class Icarl(SgdLearner):
    """SGD on the loss plus strength times distillation from the network as it was at the end of the last task.

    When a task ends, its classes get exemplars by herding, as many for each as keep all classes seen within the budget,
    and those of older classes are cut to that number, the last chosen first. An example is classified by the nearest
    of the means of exemplars of its task's classes; classes of the current task are represented by what would be their
    exemplars if it ended now, those of a task not seen yet are all equally likely. Where tasks share the outputs, each
    has classes of its own nevertheless.

    As in the published runs, and not as in Rebuffi et al.: the features are the network's outputs for all classes, not
    the normalised activations before them; a step's loss is the cross-entropy among the task's classes; and
    distillation takes one exemplar of each past class per step, drawn at random, and compares outputs among the classes
    of its task (Kullback-Leibler divergence, mean over the classes of a task, sum over tasks). Unlike the published
    code, which never cuts the exemplars of old classes and keeps 3.6 times the budget after 20 tasks, this one keeps to
    the budget; it herds on all outputs, in evaluation mode, and passes all exemplars of a step through the network at
    once.
    """

    def __init__(self, setting: Setting, device: torch.device, lr: float, memory: int, strength: float) -> None:
        """Makes a new model; the seed of the draws comes from torch's global generator.

        Args:
            setting: The tasks.
            device: Where to train.
            lr: Learning rate of SGD.
            memory: Exemplars of all classes together.
            strength: Weight of distillation.

        Raises:
            InputError: There would be less than one exemplar of each class.
        """
        n_classes = sum(map(len, setting.outputs))
        if memory < n_classes:
            raise InputError(f"--memory must be at least one exemplar of each class, {n_classes} here, got {memory}")
        super().__init__(setting, device, lr)
        self.memory = memory
        self.strength = strength
        self.visit = Visit(setting.n_tasks)
        self.exemplars = Exemplars(setting)
        self.draws = _Draws(int(torch.randint(2**62, ())))
        self._foreign = setting.foreign_outputs().to(device)
        self._of_past: _Past | None = None  # follows from the exemplars and the current task
        self._means: dict[Class, Tensor] | None = None  # follows from the exemplars and the model, until the next step

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Takes one step on the mini-batch (x, y); if it is the first of a task, the one before gets its exemplars."""
        self._means = None
        if self.visit.ends_with(task):
            self.exemplars.of = {c: (kept, self._evaluate(kept)) for c, kept in self.chosen().items()}
            self._of_past = self._past(task)
        self.visit.observe(x, y, task)
        self.optimizer.zero_grad()
        loss = self.loss(x, y, task)
        if self._of_past is not None:
            loss = loss + self.strength * self._distillation(self._of_past)
        loss.backward()
        self.optimizer.step()

    def predict(self, x: Tensor, task: int) -> Tensor:
        """Negative distances of the features to the means of exemplars of the task's classes."""
        if self._means is None:
            self._means = {c: self._evaluate(kept).mean(0) for c, kept in self.chosen().items()}
        classes = [(task, label) for label in range(len(self.setting.outputs[task]))]
        if not any(c in self._means for c in classes):
            return x.new_zeros(len(x), len(classes))
        missing = torch.full((self.setting.n_outputs,), FAR, device=x.device, dtype=x.dtype)
        means = torch.stack([self._means.get(c, missing) for c in classes])
        distances: Tensor = (self.all_outputs(x)[:, None] - means).norm(dim=2)
        return -distances

    def chosen(self) -> dict[Class, Tensor]:
        """The exemplars of each class seen, best first, as they would be if the current task ended now."""
        chosen = {c: kept for c, (kept, _) in self.exemplars.of.items()}
        if self.visit.task is None:
            return chosen
        x, y = self.visit.examples()
        current: dict[Class, Tensor] = {}
        for label in y.unique():
            c = (self.visit.task, int(label))
            seen = torch.cat([x[y == label], chosen[c]]) if c in chosen else x[y == label]
            current[c] = seen.unique(dim=0)  # further epochs, and a task that comes back, show the same again
        each = self.memory // len(chosen | current)
        chosen = {c: kept[:each] for c, kept in chosen.items()}
        return chosen | {c: seen[herd(self._evaluate(seen), each)] for c, seen in current.items()}

    def _evaluate(self, x: Tensor) -> Tensor:
        """The features of exemplars, without a trace."""
        with torch.no_grad(), self.evaluation_mode():
            return torch.cat([self.all_outputs(part) for part in x.split(1000)])

    def _distillation(self, past: _Past) -> Tensor:
        rows = (past.first + self.draws.below(past.sizes)).to(past.x.device)
        outputs, targets = self.all_outputs(past.x[rows]), past.outputs[rows]
        new, old = (
            logits.masked_fill(past.foreign, -torch.inf).log_softmax(1).masked_fill(past.foreign, 0.0)
            for logits in (outputs, targets)
        )
        divergence = F.kl_div(new, old, reduction="none", log_target=True).sum(1)
        return divergence @ past.share

    def _past(self, task: int) -> _Past | None:
        """The exemplars of all tasks but one, ready for the steps of that one."""
        of = {c: kept for c, kept in self.exemplars.of.items() if c[0] != task}
        if not of:
            return None
        x, outputs = (torch.cat(part) for part in zip(*of.values(), strict=True))
        sizes = torch.tensor([len(kept) for kept, _ in of.values()])
        tasks = torch.tensor([of_task for of_task, _ in of])
        share = 1 / tasks.bincount()[tasks].to(outputs)
        return _Past(x, outputs, sizes.cumsum(0) - sizes, sizes, self._foreign[tasks], share)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Gives the parts their states."""
        super().set_extra_state(state)
        self._means = None
        self._of_past = None if self.visit.task is None else self._past(self.visit.task)

    def parts(self) -> dict[str, Any]:
        """The optimizer, the current task's examples, the exemplars, and the generator that draws from them."""
        return {**super().parts(), "visit": self.visit, "exemplars": self.exemplars, "draws": self.draws}


def herd(features: Tensor, n: int) -> Tensor:
    """Chooses examples whose mean is close to the mean of all, as are those of the first 1, 2, ... (Algorithm 4).

    Args:
        features: Shape (examples, d).
        n: Examples to choose; all are taken if there are not more.

    Returns:
        Shape (n or fewer,), int64: the rows chosen, in the order in which they were.
    """
    mean, total = features.mean(0), torch.zeros_like(features[0])
    free = torch.zeros_like(features[:, 0])
    chosen = []
    for k in range(1, min(n, len(features)) + 1):
        best = ((k * mean - total - features).norm(dim=1) + free).argmin()
        free[best] = torch.inf
        total = total + features[best]
        chosen.append(best)
    return torch.stack(chosen)


class Exemplars:
    """The exemplars of each class and the outputs that distillation compares with.

    Attributes:
        of: For each class the exemplars, shape (m, ...), best first, and the outputs for all classes, (m, outputs).
    """

    def __init__(self, setting: Setting) -> None:
        """Begins without any."""
        self.of: dict[Class, tuple[Tensor, Tensor]] = {}
        self._setting = setting

    def state_dict(self) -> dict[str, Any]:
        """Copies of all exemplars and outputs."""
        return {"classes": [(*c, x.clone(), outputs.clone()) for c, (x, outputs) in self.of.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the state that `state_dict` returned; raises ValueError for another, and is then as it was."""
        check_keys("exemplars", state, ("classes",))
        if not isinstance(state["classes"], list):
            raise ValueError(f"classes must be a list, got {type(state['classes']).__name__}")
        of = {}
        for entry in state["classes"]:
            if not isinstance(entry, tuple) or len(entry) != 4:
                raise ValueError("a class must be a task, a label, exemplars and outputs, got another value")
            task, label, x, outputs = entry
            check_count("the task of a class", task, 0, self._setting.n_tasks - 1)
            check_count("the label of a class", label, 0, len(self._setting.outputs[task]) - 1)
            for name, value in (("exemplars", x), ("outputs", outputs)):
                check_plain_tensor(name, value)
            if x.dim() == 0 or not len(x) or outputs.shape != (len(x), self._setting.n_outputs):
                raise ValueError("a class must have exemplars and as many rows of outputs, got other shapes")
            of[task, label] = (x.clone(), outputs.clone())
        self.of = of


class _Past(NamedTuple):
    """The exemplars that distillation draws from, those of one class after the other."""

    x: Tensor
    """Shape (n, ...): the exemplars."""
    outputs: Tensor
    """Shape (n, outputs): what they are compared with."""
    first: Tensor
    """Shape (classes,), int64, on the CPU: where a class begins."""
    sizes: Tensor
    """Shape (classes,), int64, on the CPU: the exemplars of a class."""
    foreign: Tensor
    """Shape (classes, outputs), bool: the outputs that are not of the class's task."""
    share: Tensor
    """Shape (classes,): 1 over the number of classes of its task."""


class _Draws:
    """Random numbers of its own, whose state goes into a file."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def below(self, sizes: Tensor) -> Tensor:
        """For each size, int64, a number from 0 to below it."""
        return (torch.rand(len(sizes), generator=self._generator, dtype=torch.float64) * sizes).long()

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_keys("draws", state, ("generator",))
        generator = torch.Generator()
        try:
            generator.set_state(state["generator"])
        except (TypeError, RuntimeError) as error:
            raise ValueError("generator must be the state of a torch.Generator on the CPU, got another") from error
        self._generator = generator
