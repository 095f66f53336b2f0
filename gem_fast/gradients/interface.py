"""What GEM needs of the past tasks' gradients (an operator), and what it asks of an engine that computes them."""

import abc
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.batches import Pad, select, size_of
from gem_fast.containers import Nest, Objects
from gem_fast.state import check_keys
from gem_fast.wrappers import descriptor_parameter, task_parameter


class TaskGradients(Protocol):
    """G (t, p) at the present parameters, as an operator: the projection needs its products alone.

    Row k of G is the gradient g_k of past task k's memory loss (paper, Eq. 5). Forms: `RowGradients` holds the matrix,
    `LayerwiseGradients` what it follows from.
    """

    @property
    def depends(self) -> list[bool]:
        """Per parameter, whether any past task's loss depends on it."""

    def gram(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """P = G G^T (t, t) and q = G g (t,), float64 (Eq. 11).

        Args:
            grads: g as a list of tensors, one per parameter, of the parameters' shapes and dtype.

        Raises:
            RuntimeError: G or g has a NaN or an infinity (on the CPU; elsewhere P and q carry it on).
        """

    def combine_(self, grads: Sequence[Tensor], v: Tensor) -> None:
        """g <- g + G^T v (Eq. 8), written into `grads`; v is (t,) float64."""

    # Optional, for `project_`:
    #   project_(grads, margin, ridge) -> (v, q, status, residual)      the whole of it, as the operator of a matrix
    #   in_float64() -> TaskGradients       the same G, whose gram and combine_ take products and sums in float64
    #   cancellation(P) -> Tensor           by what factor the rounding of P and q is larger than that of inner products
    #                                       of rows: () float64, at least 1
    #   squared_length(grads) -> Tensor     |g|^2, () float64, where `grads` is only a part of g


class Batch(NamedTuple):
    """Examples of one task from the memory."""

    task: Hashable
    """What a multi-head model is called with."""
    x: Nest
    """(n, ...): the model's input, a tensor or a nest of tensors (`gem_fast.batches`)."""
    y: Nest = None
    """(n, ...): the loss's target, likewise; None where it needs none."""
    pad: Pad = None
    """What the examples may be padded with, to be in one batch with longer ones; None: not at all."""
    descriptor: Nest = None
    """What the model is told about the task: a tensor or a nest of tensors; None: nothing but its id."""

    @property
    def size(self) -> int:
        """n, the number of examples."""
        return size_of(self.x)

    def select(self, index: slice | Tensor) -> "Batch":
        """Some of the examples: of a slice views, of an int64 tensor of positions copies."""
        return self._replace(x=select(self.x, index), y=select(self.y, index))


Constraint = Sequence[Batch]
"""The batches whose examples' mean loss must not rise: one batch of one past task in GEM."""


class Sample(NamedTuple):
    """A choice of examples, some of each constraint, where not all of them are to count."""

    positions: Tensor
    """(n,) int64: positions in the concatenation of all constraints' examples, constraint by constraint."""
    sizes: list[int]
    """The number of examples of each constraint; n in total."""

    def of(self, constraints: Sequence[Constraint]) -> list[list[Batch]]:
        """The constraints, of one batch each, with only the examples that count, as copies."""
        sampled, start = [], 0
        for [batch], positions in zip(constraints, self.positions.split(self.sizes), strict=True):
            sampled.append([batch.select(positions - start)])
            start += batch.size
        return sampled


@dataclass(frozen=True)
class Objective:
    """The loss of the model on a batch.

    Attributes:
        model: called as model(x); as model(**x) where x is a mapping, and as model(*x) where it is a tuple.
        loss_fn: loss_fn(output, target) -> scalar, the mean over the examples.
        pass_task: whether the model takes the task, as a keyword argument; or the name of the parameter that takes it,
            where it is another one than `task` or `task_labels`.
        forward: forward(model, x) -> output in the place of these calls; forward(model, x, task=task) with `pass_task`.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    pass_task: bool | str = False
    forward: Callable[..., Any] | None = None

    @cached_property
    def task_name(self) -> str:
        """The name under which the model takes the task."""
        if self.forward is not None:
            return "task"
        return self.pass_task if isinstance(self.pass_task, str) else task_parameter(self.model) or "task"

    @cached_property
    def descriptor_name(self) -> str | None:
        """The name under which the model takes a task's descriptor: `descriptor`, else that of the task; None: none."""
        parameter = descriptor_parameter(self.model, self.forward)
        if parameter is not None:
            return parameter.name
        return self.task_name if self.pass_task else None

    @cached_property
    def needs_descriptor(self) -> bool:
        """Whether the model cannot be called without a descriptor."""
        parameter = descriptor_parameter(self.model, self.forward)
        return parameter is not None and parameter.default is parameter.empty

    def takes_id(self, batches: Iterable[Batch]) -> bool:
        """Whether the model is called with the ids of these batches' tasks, which are one for each call."""
        if not self.pass_task:
            return False
        return self.descriptor_name != self.task_name or any(batch.descriptor is None for batch in batches)

    def output(self, x: Nest, task: Hashable, descriptor: Nest = None) -> Any:
        """What the model makes of x; objects are collated first."""
        if isinstance(x, Objects):
            x = x.collated()
        given: dict[str, Any] = {}
        if self.pass_task:
            given[self.task_name] = task
        if descriptor is not None:
            assert self.descriptor_name is not None
            given[self.descriptor_name] = descriptor
        if self.forward is not None:
            return self.forward(self.model, x, **given)
        if isinstance(x, Mapping):
            return self.model(**x, **given)
        return self.model(*x, **given) if isinstance(x, tuple) else self.model(x, **given)

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss over the batch's examples, a scalar.

        Raises:
            ValueError: the loss is not a scalar.
        """
        return self.scalar_loss(self.output(batch.x, batch.task, batch.descriptor), batch.y)

    def scalar_loss(self, output: Any, y: Nest) -> Tensor:
        """loss_fn(output, y); raises ValueError where that is no scalar."""
        loss = self.loss_fn(output, y)
        if loss.dim() != 0:
            raise ValueError(f"loss_fn must return a scalar, the mean over the examples, got shape {tuple(loss.shape)}")
        return loss


class JointPass(NamedTuple):
    """The gradients of the current mini-batch and of the past tasks, computed together."""

    G: TaskGradients
    grads: list[Tensor | None]
    """g, per parameter; None where the loss does not depend on it. Whoever asked for them may keep them."""
    loss: Tensor
    """() the mean loss over the current mini-batch, without a history."""
    projection: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    """v, q, status and residual (`gem_fast.Projection`), where g is already projected; None where it is not."""


class Engine(abc.ABC):
    """Computes the past tasks' gradients in each step. `Fused` and `Loop` are two; a subclass of yours is a third.

    Attributes:
        repeats: whether it does the same work in each step as long as its arguments are of one kind, so that a CUDA
            graph of one step may stand for the others.
    """

    repeats: bool = True

    @abc.abstractmethod
    def __call__(
        self,
        objective: Objective,
        constraints: Sequence[Constraint],
        parameters: Sequence[Parameter],
        sample: Sample | None = None,
    ) -> TaskGradients:
        """G for these constraints; leaves no trace: `.grad` and random number generators are as they were.

        Args:
            objective: the model and its loss.
            constraints: t of them; row k of G is the gradient of the mean loss over constraint k's examples.
            parameters: whose gradients make up a row, in this order; all of one dtype and device.
            sample: which examples count; by default all. Each constraint is then one batch.

        Returns:
            G, valid until the engine is called again.
        """

    def with_current(
        self,
        objective: Objective,
        current: Batch,
        constraints: Sequence[Constraint],
        parameters: Sequence[Parameter],
        sample: Sample | None = None,
        margins: tuple[float, float] | None = None,
    ) -> JointPass | None:
        """The current mini-batch's gradient together with G, for `GEM.step`; an engine need not have this.

        Args:
            objective: as for `__call__`.
            current: the mini-batch of the current task.
            constraints: as for `__call__`.
            parameters: as for `__call__`; g has one gradient for each.
            sample: as for `__call__`.
            margins: the projection's margin and ridge, where nobody is to see g before it is projected: the engine may
                then do that, too. None: it is not to.

        Returns:
            What a backward from its loss and then a call of the engine would give, but for rounding: buffers and random
            number generators are left as by these. None: these are to do it.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the memory to go on with the same bits; here nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` returned; else raises ValueError and changes nothing."""
        check_keys("engine", state, ())


def random_devices(parameters: Sequence[Parameter]) -> list[int]:
    """The GPUs whose random numbers a pass may use up; none while a graph is captured, which brings its own."""
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    return [] if is_captured(parameters) else devices


def is_captured(parameters: Sequence[Parameter]) -> bool:
    """Whether what runs is captured as a CUDA graph, during which nothing can be read from the GPU."""
    return any(p.device.type == "cuda" for p in parameters) and torch.cuda.is_current_stream_capturing()
