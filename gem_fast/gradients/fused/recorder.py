"""One pass through a model that notes where each parameter is used, so that its gradients can be told apart by task.

While a pass runs, the `forward` of every module that owns parameters goes through a rule (`gem_fast.gradients.fused.
rules`). A rule computes the module's output, and says for each parameter how a task's part of its gradient follows from
the gradient at that output: autograd then need not compute gradients of parameters at all, only those at the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import Parameter

from gem_fast.gradients.fused.entries import SparseEntries
from gem_fast.gradients.fused.task_batch import TaskBatch, TaskSizes


class CannotFuse(Exception):
    """The model cannot be handled in one pass; the message is the reason, a clause for the log."""


class CannotVerify(CannotFuse):
    """This step alone is the loop's, because its gradients are not finite, say: there is nothing to compare."""


TaskWriter = Callable[[Tensor, TaskSizes, Tensor], None]
"""write(grad, tasks, out): out[k] = the parameter's gradient from the examples of task k, where grad (N, ...) is the
gradient at the module's output with the examples along its first dimension."""

Restrict = Callable[[slice], TaskWriter]
"""restrict(rows) -> the `TaskWriter` of only these rows of the parameter (along its first dimension)."""

Rule = Callable[..., Any]
"""rule(recorder, module, forward, *args, **kwargs) -> what forward(*args, **kwargs) returns."""

WHOLE = slice(None)


class Contribution(NamedTuple):
    """What one use of a parameter adds to the gradients of some tasks."""

    parameter: Parameter
    grad: Tensor
    """(N, ...): the gradient at the output of that use, examples first; of an alias, the gradient of the parameter."""
    first: int
    """The first of the rows of G that are affected."""
    tasks: TaskSizes
    """Whose examples are behind `grad`: task k's go to row `first` + k."""
    write: TaskWriter
    part: slice = WHOLE
    """Which part of the parameter was used, along its first dimension."""
    restrict: Restrict | None = None
    """How to have some rows of that part only; None where it comes as a whole."""
    inputs: Tensor | None = None
    """(N, ..., inputs) of a linear layer, whose weight's gradient is grad' inputs; else None."""
    transposed: bool = False
    """Whether that weight is (inputs, outputs), and its gradient inputs' grad."""
    is_alias: bool = False

    @property
    def rows(self) -> range:
        """The rows of G that are affected."""
        return range(self.first, self.first + len(self.tasks))

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Of a linear layer A (N, ..., a) and B (N, ..., b): its weight (b, a) has the gradient B' A; else None."""
        if self.inputs is None:
            return None
        return (self.grad, self.inputs) if self.transposed else (self.inputs, self.grad)

    def write_to(self, out: Tensor) -> None:
        """out[k] = what is added to the gradient of task k, for `part` of the parameter."""
        self.write(self.grad, self.tasks, out)


class LinearCall(NamedTuple):
    """A linear layer's part in a pass."""

    weight: Tensor
    bias: Tensor | None
    x: Tensor
    """(N, inputs), as the layer got it."""
    output: Tensor
    node: Any
    """The output's place in autograd's graph, before it is changed in place."""
    entries: SparseEntries | None = None
    """The non-zero entries of the memory that x is, or was sampled from, where they are few."""
    positions: Tensor | None = None
    """As for `TaskBatch`."""


class Recorder:
    """What rules talk to during a pass.

    Attributes:
        batch: the present mini-batch, so that a rule can tell that its input is the memory's examples as they are.
        tasks: which of its examples are whose.
        edges: where gradients are needed.
        linear_calls: the linear layers that the present mini-batch went through.
    """

    def __init__(
        self, parameters: set[Parameter], dims: dict[tuple[nn.Module, int], int | None], learn_dims: bool
    ) -> None:
        """Starts a pass.

        Args:
            parameters: those whose gradients are wanted.
            dims: for each module and how often it was called before: the dimension of its input that runs over the
                examples, None where it is the same for all of them.
            learn_dims: whether this pass finds out the dimensions, to be verified.
        """
        self.edges: list[Any] = []
        self.linear_calls: list[LinearCall] = []
        self.batch: TaskBatch | None = None
        self.tasks = TaskSizes([])
        self._first = 0
        self._known_dim: int | None = None
        self._parameters = parameters
        self._dims = dims
        self._learn_dims = learn_dims
        self._calls: dict[nn.Module, int] = {}
        # With each use the number of its edge, and the dimension of the output there that runs over the examples.
        self._uses: list[tuple[int, int, Contribution]] = []
        self._numbers: dict[Any, int] = {}
        self._inputs: list[tuple[nn.Module, Tensor, int]] = []

    # ---- for rules ---------------------------------------------------------------------------------------------------

    def wants(self, parameter: Parameter | None) -> bool:
        """Whether the parameter's gradient is wanted."""
        return parameter is not None and parameter.requires_grad and parameter in self._parameters

    def wanted(self, module: nn.Module) -> list[tuple[nn.Module, str, Parameter]]:
        """The module's and its children's parameters whose gradients are wanted, with their owners and names."""
        return [
            (owner, name, parameter)
            for owner in module.modules()
            for name, parameter in owner._parameters.items()
            if parameter is not None and self.wants(parameter)
        ]

    def per_example(self, module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        """The module's input with a dimension that runs over the examples, and which one it is: the first or second.

        An input that is the same for all examples, positions say, is repeated for each of them (as a view): its first
        dimension is 1, or it has no dimension for examples at all.
        """
        dim = self._find_dim(module, x)
        if dim is not None:
            return x, dim
        if x.dim() > 1 and len(x) % self.tasks.total == 0:  # examples and positions in one dimension, it seems
            raise self._without_examples(module, x, "its first or second dimension")
        return x.expand(self.tasks.total, *(x.shape[1:] if x.dim() > 1 and len(x) == 1 else x.shape)), 0

    def examples_dim(self, module: nn.Module, x: Tensor) -> int:
        """The dimension of the module's input that runs over the examples; raises CannotFuse where none does."""
        dim = self._find_dim(module, x)
        if dim is None:
            raise self._without_examples(module, x, "its first or second dimension")
        return dim

    def use(
        self,
        parameter: Tensor | None,
        output: Tensor,
        dim: int,
        write: TaskWriter,
        *,
        module: nn.Module,
        reads: Tensor | None = None,
        part: slice = WHOLE,
        restrict: Restrict | None = None,
        inputs: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        """Notes a use of a parameter.

        Args:
            parameter: the parameter; None and those not wanted are passed over.
            output: the output that it took part in.
            dim: the dimension of `output` that runs over the examples.
            write: see `TaskWriter`.
            module: for messages.
            reads: the tensor that `write` will read, which the model must not change in place meanwhile.
            part: which part of the parameter, along its first dimension.
            restrict: see `Restrict`.
            inputs: see `Contribution`.
            transposed: see `Contribution`.
        """
        if not isinstance(parameter, Parameter) or not self.wants(parameter) or not output.requires_grad:
            return
        # The edge stands for the output as it is now, whatever is written into it later in place; it keeps no data.
        edge = get_gradient_edge(output)
        number = self._numbers.setdefault(edge, len(self.edges))
        if number == len(self.edges):
            self.edges.append(edge)
        if reads is not None:
            self._inputs.append((module, reads, reads._version))
        use = Contribution(parameter, _UNKNOWN, self._first, self.tasks, write, part, restrict, inputs, transposed)
        self._uses.append((number, dim, use))

    def use_alias(self, parameter: Parameter, alias: Tensor, task: int) -> None:
        """Notes that task number `task` of the mini-batch used its own alias of the parameter."""
        tasks = TaskSizes([self.tasks.sizes[task]])
        use = Contribution(parameter, _UNKNOWN, self._first + task, tasks, _copy, restrict=_copy_rows, is_alias=True)
        self._uses.append((len(self.edges), 0, use))
        self.edges.append(alias)

    @contextmanager
    def examples_along(self, dim: int, total: int) -> Iterator[None]:
        """A block in which `total` examples of one task are along a dimension that is known."""
        before, self.tasks, self._known_dim = self.tasks, TaskSizes([total]), dim
        try:
            yield
        finally:
            self.tasks, self._known_dim = before, None

    # ---- for the engine ----------------------------------------------------------------------------------------------

    def begin(self, first: int, batch: TaskBatch) -> None:
        """Says what goes through the model next, and from which row of G on its tasks' gradients go."""
        self.batch = batch
        self.tasks = batch.tasks
        self._first = first
        self._calls.clear()
        self.linear_calls.clear()

    def contributions(self, grads: Sequence[Tensor | None]) -> list[Contribution]:
        """All uses that a loss depends on, from the gradients at `edges` (None: no loss depends on it).

        Raises:
            CannotFuse: a tensor that is still to be read was changed in place since it was noted.
        """
        self.check_unchanged()
        found = [
            use._replace(grad=grad.transpose(0, dim) if dim else grad)
            for number, dim, use in self._uses
            if (grad := grads[number]) is not None
        ]
        # What only the backward needed goes.
        self._numbers.clear()
        self.edges.clear()
        return found

    def check_unchanged(self) -> None:
        """Raises CannotFuse where a tensor that is about to be read has been changed since it was noted."""
        for module, x, version in self._inputs:
            if x._version != version:
                raise CannotFuse(f"the input of {type(module).__name__} is changed in place after it was used")

    def _find_dim(self, module: nn.Module, x: Tensor) -> int | None:
        if self._known_dim is not None:
            return self._known_dim
        call = self._calls.get(module, 0)
        self._calls[module] = call + 1
        total = self.tasks.total
        if self._learn_dims:
            self._dims[module, call] = next((dim for dim in range(min(2, x.dim())) if x.shape[dim] == total), None)
        if (module, call) not in self._dims:
            raise CannotFuse(f"{type(module).__name__} is called in a way that was not verified")
        dim = self._dims[module, call]
        if dim is not None and (dim >= x.dim() or x.shape[dim] != total):
            raise self._without_examples(module, x, f"dimension {dim}")
        return dim

    def _without_examples(self, module: nn.Module, x: Tensor, where: str) -> CannotFuse:
        return CannotFuse(
            f"{type(module).__name__} gets an input of shape {tuple(x.shape)}, which does not run over the "
            f"{self.tasks.total} examples along {where}"
        )


@contextmanager
def recording(recorder: Recorder, rules: Sequence[tuple[nn.Module, Rule]]) -> Iterator[None]:
    """Sends the forward of each of these modules through its rule."""
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for module, rule in rules:
            replaced.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = partial(rule, recorder, module, module.forward)
        yield
    finally:
        for module, before in replaced:
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def features_of(write: TaskWriter, dim: int) -> Restrict:
    """Restricts a parameter whose first dimension is dimension `dim` of the gradient at the output."""

    def restrict(rows: slice) -> TaskWriter:
        length = rows.stop - rows.start
        return lambda grad, tasks, out: write(grad.narrow(dim, rows.start, length), tasks, out)

    return restrict


def with_own_history(output: Tensor) -> Tensor:
    """The output as no view: of a view that is changed in place, autograd would forget the edge that was noted."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def _copy(grad: Tensor, tasks: TaskSizes, out: Tensor) -> None:
    out[0].copy_(grad)


def _copy_rows(rows: slice) -> TaskWriter:
    return lambda grad, tasks, out: _copy(grad[rows], tasks, out)


# In the place of a gradient until the backward has been.
_UNKNOWN = torch.empty(0)
