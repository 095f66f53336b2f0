"""Elastic weight consolidation (Kirkpatrick et al. 2017): parameters that mattered for past tasks are held in place."""

import torch
from torch import Tensor
from torch.nn import Parameter

from gem_fast.paper.config import Rate, Real, Whole, by_stream
from gem_fast.paper.learners.base import CurrentTaskBuffer, Part, SgdConfig, SgdLearner
from gem_fast.paper.learners.stream_info import StreamInfo


class Ewc(SgdLearner):
    """SGD on the loss plus strength * sum_k sum_i F_ki (theta_i - theta_ki)^2, one term per past task k.

    The anchor theta_k are the parameters at the end of task k, and F_k is the diagonal of the Fisher information there,
    from the task's first examples. A task that comes back ends with another term.

    Two things are as in the published runs, whose hyper-parameters the presets are, and not as in Kirkpatrick et al.:
    there is no factor 1/2, and F_k is the square of the *mean* gradient over the examples. That is smaller than the
    mean of the squares, n times for n examples with independent gradients; with `per_example` F_k is the mean of the
    squares.
    """

    class Config(SgdConfig):
        """The options of ewc."""

        lr: Rate = by_stream(rotations=0.01, permutations=0.1, cifar100=1.0, split=0.1)
        memory_per_task: Whole = by_stream(rotations=1000, permutations=10, cifar100=10, split=10)
        """examples of a task, its first ones, that the Fisher information is computed from"""
        strength: Real = by_stream(rotations=1000.0, permutations=3.0, cifar100=1.0, split=3.0)
        """weight of the penalty"""
        consolidated: bool = True
        """whether all past tasks have one penalty together, of the same gradient; time and memory then do not grow"""
        per_example: bool = False
        """whether F is the mean of single examples' squared gradients; published: the square of their mean gradient"""

    def __init__(self, stream_info: StreamInfo, device: torch.device, config: Config) -> None:
        super().__init__(stream_info, device, config)
        self.strength = config.strength
        self.per_example = config.per_example
        self.current_task = CurrentTaskBuffer(capacity=config.memory_per_task)
        self.penalty = Penalty(list(self.model.parameters()), config.consolidated)

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Takes one step on the mini-batch (x, y); if it is the first of a task, the one before gets its term."""
        if self.current_task.ends_with(task):
            self.penalty.add(self.fisher())
        self.current_task.observe(x, y, task)
        self.optimizer.zero_grad()
        self.loss(x, y, task).backward()
        self.penalty.add_gradient(self.strength)
        self.optimizer.step()

    def fisher(self) -> list[Tensor]:
        """The Fisher information's diagonal on the current task's examples, one tensor per parameter."""
        assert self.current_task.task is not None
        x, y = self.current_task.examples()
        size = 1 if self.per_example else len(y)
        parameters = list(self.model.parameters())
        fisher = [torch.zeros_like(p) for p in parameters]
        self.train(not self.per_example)
        for x_part, y_part in zip(x.split(size), y.split(size), strict=True):
            grads = torch.autograd.grad(self.loss(x_part, y_part, self.current_task.task), parameters)
            for total, grad in zip(fisher, grads, strict=True):
                total.addcmul_(grad, grad, value=size / len(y))
        self.train(True)
        return fisher


class Penalty(Part):
    """The terms F (theta - anchor)^2, each as one tensor per parameter for F and one for the anchor."""

    STATE = ("terms",)

    def __init__(self, parameters: list[Parameter], consolidated: bool) -> None:
        """Begins without a term of the parameters theta.

        If they are consolidated, each is merged into the one before: with F = sum_k F_k and theta = sum_k F_k theta_k /
        F all terms are F_i (theta_i - theta)^2 and a constant.
        """
        self.terms: list[tuple[list[Tensor], list[Tensor]]] = []
        self._parameters = parameters
        self._consolidated = consolidated

    def add(self, fisher: list[Tensor]) -> None:
        """Adds a term that is anchored where the parameters are now; takes over `fisher`."""
        if not (self._consolidated and self.terms):
            self.terms.append((fisher, [p.detach().clone() for p in self._parameters]))
            return
        for p, new, total, anchor in zip(self._parameters, fisher, *self.terms[0], strict=True):
            # The weighted mean of the anchors, updated step by step: sums of F_k theta_k would cancel. Where every F_k
            # is 0 there is no penalty, whatever the anchor.
            total += new
            anchor.lerp_(p.detach(), new / total.clamp(min=torch.finfo(total.dtype).tiny))

    @torch.no_grad()
    def add_gradient(self, strength: float) -> None:
        """Adds the gradient of strength times all terms to the parameters' own."""
        for fisher, anchors in self.terms:
            for p, weight, anchor in zip(self._parameters, fisher, anchors, strict=True):
                assert p.grad is not None
                p.grad.addcmul_(weight, p - anchor, value=2 * strength)
