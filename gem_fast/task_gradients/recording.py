"""One pass through a model that notes where each parameter is used, so that its gradients can be told apart by task.

While a pass runs, the `forward` of every module that owns parameters goes through a rule (gem_fast/task_gradients/
rules). A rule computes the module's output, and says for each parameter how a task's part of its gradient follows from
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

from gem_fast.task_gradients.chain import Link
from gem_fast.task_gradients.pieces import Piece, Segments


class CannotFuse(Exception):
    """The model cannot be handled in one pass; the message is the reason, a clause for the log."""


class CannotVerify(CannotFuse):
    """There is nothing to compare with this time, because the gradients are not finite."""


Write = Callable[[Tensor, Segments, Tensor], None]
"""write(grad, segments, out): out[k] = the parameter's gradient from the examples of segment k, where grad (N, ...) is
the gradient at the module's output with the examples along its first dimension."""

Cut = Callable[[slice], Write]
"""cut(rows) -> the `Write` of only these rows of the parameter (along its first dimension)."""

Rule = Callable[..., Any]
"""rule(recorder, module, forward, *args, **kwargs) -> what forward(*args, **kwargs) returns."""


class Use(NamedTuple):
    """One place where a parameter takes part in the outputs of some tasks."""

    parameter: Parameter
    edge: int
    """Which of the recorder's edges has the gradient that `write` takes."""
    dim: int | None
    """The dimension of that gradient which runs over the examples; None for a gradient of the parameter itself."""
    first: int
    """The first of the rows of G that are affected."""
    segments: Segments
    write: Write
    part: slice
    """Which part of the parameter, along its first dimension."""
    cut: Cut | None
    """How to have some rows of that part only; None where it comes as a whole."""

    @property
    def rows(self) -> range:
        """The rows of G that are affected."""
        return range(self.first, self.first + len(self.segments.sizes))


WHOLE = slice(None)


class Recorder:
    """What rules talk to during a pass.

    Attributes:
        piece: the present mini-batch, so that a rule can tell that its input is the memory's examples as they are.
        segments: which of its examples are whose.
        edges: where gradients are needed.
        uses: what to do with them.
        links: the linear layers that the present mini-batch went through.
        ambiguous: whether an input had two dimensions that might run over the examples.
    """

    def __init__(self, parameters: set[Parameter], dims: dict[tuple[nn.Module, int], int], learning: bool) -> None:
        """Starts a pass.

        Args:
            parameters: those whose gradients are wanted.
            dims: for each module and how often it was called before: the dimension of its input that runs over the
                examples, as found by the pass that was verified.
            learning: whether this is such a pass.
        """
        self.edges: list[Any] = []
        self.uses: list[Use] = []
        self.links: list[Link] = []
        self.piece: Piece | None = None
        self.segments = Segments([])
        self.ambiguous = False
        self._first = 0
        self._parameters = parameters
        self._dims = dims
        self._learning = learning
        self._calls: dict[nn.Module, int] = {}
        self._numbers: dict[int, int] = {}
        self._outputs: list[Tensor] = []
        self._inputs: list[tuple[nn.Module, Tensor, int]] = []

    def begin(self, first: int, piece: Piece) -> None:
        """Says what goes through the model next, and from which row of G on its tasks' gradients go."""
        self.piece = piece
        self.segments = piece.segments
        self._first = first
        self._calls.clear()
        self.links.clear()

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

    def examples_dim(self, module: nn.Module, x: Tensor) -> int:
        """The dimension of the module's input that runs over the examples: the first or the second."""
        call = self._calls.get(module, 0)
        self._calls[module] = call + 1
        total = self.segments.total
        if self._learning:
            fitting = [dim for dim in range(min(2, x.dim())) if x.shape[dim] == total]
            self.ambiguous |= len(fitting) > 1
            if fitting:
                self._dims[module, call] = fitting[0]
                return fitting[0]
        else:
            known = self._dims.get((module, call))
            if known is None:
                raise CannotFuse(f"{type(module).__name__} is called in a way that was not verified")
            if known < x.dim() and x.shape[known] == total:
                return known
        raise CannotFuse(
            f"{type(module).__name__} gets an input of shape {tuple(x.shape)}, which does not run over the {total} "
            "examples along its first or second dimension"
        )

    def use(
        self,
        parameter: Tensor | None,
        output: Tensor,
        dim: int,
        write: Write,
        *,
        module: nn.Module,
        reads: Tensor | None = None,
        part: slice = WHOLE,
        cut: Cut | None = None,
    ) -> None:
        """Notes a use of a parameter.

        Args:
            parameter: the parameter; None and those not wanted are passed over.
            output: the output that it took part in.
            dim: the dimension of `output` that runs over the examples.
            write: see `Write`.
            module: for messages.
            reads: the tensor that `write` will read, which the model must not change in place meanwhile.
            part: which part of the parameter, along its first dimension.
            cut: see `Cut`.
        """
        if not isinstance(parameter, Parameter) or not self.wants(parameter) or not output.requires_grad:
            return
        number = self._numbers.get(id(output))
        if number is None:
            # The edge stands for the output as it is now, whatever is written into it later in place.
            number = self._numbers[id(output)] = len(self.edges)
            self.edges.append(get_gradient_edge(output))
            self._outputs.append(output)  # so that its id stays its own
        if reads is not None:
            self._inputs.append((module, reads, reads._version))
        self.uses.append(Use(parameter, number, dim, self._first, self.segments, write, part, cut))

    def use_alias(self, parameter: Parameter, alias: Tensor, segment: int) -> None:
        """Notes that one segment used its own alias of the parameter, whose gradient is the task's own."""
        segments = Segments([self.segments.sizes[segment]])
        self.uses.append(
            Use(parameter, len(self.edges), None, self._first + segment, segments, _copy, WHOLE, _copied_rows)
        )
        self.edges.append(alias)

    def forget_outputs(self) -> None:
        """Lets go of what only the backward needed."""
        self._outputs.clear()
        self.edges.clear()
        self.links.clear()

    def check_unchanged(self) -> None:
        """Raises CannotFuse where a tensor that is about to be read has been changed since it was noted."""
        for module, x, version in self._inputs:
            if x._version != version:
                raise CannotFuse(f"the input of {type(module).__name__} is changed in place after it was used")


@contextmanager
def recording(recorder: Recorder, units: Sequence[tuple[nn.Module, Rule]]) -> Iterator[None]:
    """Sends the forward of each unit through its rule."""
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for module, rule in units:
            replaced.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = partial(rule, recorder, module, module.forward)
        yield
    finally:
        for module, before in replaced:
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def examples_first(x: Tensor, dim: int) -> Tensor:
    """x with the dimension that runs over the examples in front."""
    return x if dim == 0 else x.transpose(0, dim)


def of_features(write: Write, dim: int) -> Cut:
    """The cut of a parameter whose first dimension is dimension `dim` of the gradient at the output."""

    def cut(rows: slice) -> Write:
        length = rows.stop - rows.start
        return lambda grad, segments, out: write(grad.narrow(dim, rows.start, length), segments, out)

    return cut


def own_history(output: Tensor) -> Tensor:
    """The output as no view: of a view that is changed in place, autograd would forget the edge that was noted."""
    return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output


def _copy(grad: Tensor, segments: Segments, out: Tensor) -> None:
    out[0].copy_(grad)


def _copied_rows(rows: slice) -> Write:
    return lambda grad, segments, out: _copy(grad[rows], segments, out)
