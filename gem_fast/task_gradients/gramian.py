"""The projection without G: for models of which t rows do not fit into memory.

P = sum over blocks of columns of G_b G_b'        each block lives only while it is read
q = sum over blocks of G_b g_b
g~_b = g_b + G_b' v                               formed as one gradient of losses weighted by v, layer by layer

A block is some rows of one parameter, for all tasks: it follows from the inputs and the output gradients of the layers,
which one pass over all tasks' examples leaves behind (gem_fast/task_gradients/fused.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.ops import Status, gram, nnqp
from gem_fast.projection import Projection
from gem_fast.task_gradients.assembly import write_block
from gem_fast.task_gradients.fused import FusedTaskGradients
from gem_fast.task_gradients.pieces import Segments
from gem_fast.task_gradients.protocol import Batch, Sample
from gem_fast.task_gradients.recording import WHOLE, CannotFuse, Recorder, Use, examples_first

# What a block may take. It must be large enough that most layers are one block for a few tasks.
_BLOCK_BYTES = 2**24


class GramianProjection:
    """Projects like `project_` on the rows of `FusedTaskGradients`, and never has a row of G as a whole.

    What it takes beside the model: for all examples of all past tasks at once, the inputs of all layers and the
    gradients at their outputs, and blocks of G of 16 MiB. The first pass is verified, see `FusedTaskGradients`, for
    which it takes four rows of G. Whole are the gradients, for all tasks, of modules without a rule of their own (batch
    normalisation, recurrent layers, custom modules), and those of grouped and transposed convolutions, one at a time.

    Args:
        model: as for `FusedTaskGradients`.
        loss_fn: likewise.
        pass_task: likewise.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], *, pass_task: bool = False
    ) -> None:
        self._engine = FusedTaskGradients(model, loss_fn, pass_task=pass_task, chains=False)

    def __call__(
        self,
        constraints: Sequence[Sequence[Batch]],
        parameters: Sequence[Parameter],
        grads: Sequence[Tensor],
        margin: float = 0.5,
        ridge: float = 0.0,
        *,
        sample: Sample | None = None,
    ) -> tuple[Projection, list[bool]]:
        """Projects `grads` in place.

        Args:
            constraints: t lists of one batch each.
            parameters: whose gradients they are.
            grads: one tensor per parameter, of its shape.
            margin: as for `project_`.
            ridge: as for `project_`.
            sample: which examples count; by default all.

        Returns:
            What `project_` returns, and per parameter whether any constraint depends on it.

        Raises:
            RuntimeError: the model cannot be handled in one pass, or a row of G or a gradient has a NaN or an infinity
                (on the CPU; elsewhere status is `Status.NON_FINITE`). The gradients are then as they were.
            ValueError: the loss is not a scalar.
        """
        try:
            recorder, edges = self._engine.record(constraints, parameters, sample=sample)
        except CannotFuse as reason:
            raise RuntimeError(
                f'gradients="gramian" takes a model that one pass can handle, got one where {reason}; take "rows"'
            ) from reason
        uses = _uses_of(recorder, edges, parameters)
        with torch.no_grad():
            projection = _solved(uses, edges, parameters, grads, len(constraints), margin, ridge)
            on_cpu = projection.v.device.type == "cpu"
            if not on_cpu or bool(projection.v.any()):
                _combine_(uses, edges, parameters, grads, projection.v)
        return projection, [bool(mine) for mine in uses]


def _uses_of(recorder: Recorder, edges: Sequence[Tensor | None], parameters: Sequence[Parameter]) -> list[list[Use]]:
    """The uses of each parameter that a loss depends on."""
    uses: dict[Parameter, list[Use]] = {parameter: [] for parameter in parameters}
    for use in recorder.uses:
        if edges[use.edge] is not None:
            uses[use.parameter].append(use)
    return list(uses.values())


def _solved(
    uses: Sequence[list[Use]],
    edges: Sequence[Tensor | None],
    parameters: Sequence[Parameter],
    grads: Sequence[Tensor],
    t: int,
    margin: float,
    ridge: float,
) -> Projection:
    """P, q and v* (Eq. 11)."""
    P = torch.zeros(t, t, dtype=torch.float64, device=parameters[0].device)
    q = torch.zeros(t, dtype=torch.float64, device=parameters[0].device)
    for parameter, grad, mine in zip(parameters, grads, uses, strict=True):
        for rows, block in _blocks(parameter, mine, edges, t):
            P_b, q_b = gram(block.flatten(1), [_rows_first(grad)[rows]])
            P += P_b
            q += q_b
    v, status, residual = nnqp(P, q, lower=margin, ridge=ridge)
    # With no violated constraint, or input that is not finite, the gradient stays as it is.
    violated = (q < 0).any() & (status != Status.NON_FINITE)
    return Projection(torch.where(violated, v, 0), q, status, torch.where((q < 0).any(), residual, 0))


def _combine_(
    uses: Sequence[list[Use]],
    edges: Sequence[Tensor | None],
    parameters: Sequence[Parameter],
    grads: Sequence[Tensor],
    v: Tensor,
) -> None:
    """g <- g + G^T v (Eq. 8): with its gradients at the layers' outputs weighted by v, all tasks are one."""
    # Parameters of one layer share what is weighted.
    numbers = {(use.edge, use.first): use for mine in uses for use in mine}
    weighted = [_weighted(use, edges, v) for use in numbers.values()]
    number_of = {key: number for number, key in enumerate(numbers)}
    for parameter, grad, mine in zip(parameters, grads, uses, strict=True):
        as_one = [
            use._replace(
                edge=number_of[use.edge, use.first],
                dim=None if use.dim is None else 0,
                first=0,
                segments=Segments([use.segments.total]),
            )
            for use in mine
        ]
        for rows, block in _blocks(parameter, as_one, weighted, 1):
            # A GPU does not know before whether v is zero: a NaN times zero must not get into the gradient.
            _rows_first(grad)[rows] += torch.where(v.any(), block[0], 0)


def _weighted(use: Use, edges: Sequence[Tensor | None], v: Tensor) -> Tensor:
    grad = edges[use.edge]
    assert grad is not None
    weights = v[use.first : use.first + len(use.segments.sizes)].to(grad.dtype)
    if use.dim is None:
        return grad * weights
    counts = torch.tensor(use.segments.sizes, device=v.device)
    per_example = weights.repeat_interleave(counts, output_size=use.segments.total)
    grad = examples_first(grad, use.dim)
    return grad * per_example.view(-1, *[1] * (grad.dim() - 1))


def _blocks(
    parameter: Parameter, uses: list[Use], edges: Sequence[Tensor | None], t: int
) -> Iterator[tuple[slice, Tensor]]:
    """The parameter's columns of G, a block (t, rows, ...) of some of its rows at a time."""
    shape = parameter.shape or torch.Size([1])
    if not parameter.numel():
        return
    row_bytes = t * parameter.element_size() * parameter.numel() // shape[0]
    step = max(1, _BLOCK_BYTES // row_bytes)
    if step >= shape[0] or any(use.cut is None for use in uses):
        step = shape[0]
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        block = parameter.new_empty(t, rows.stop - rows.start, *shape[1:])
        mine = uses if step == shape[0] else [cut for use in uses for cut in _cut(use, rows)]
        write_block(block, slice(0, t), mine, edges)
        yield rows, block


def _cut(use: Use, rows: slice) -> Iterator[Use]:
    """What is left of a use within some of the parameter's rows; nothing, maybe."""
    begin, end, _ = use.part.indices(len(use.parameter))
    first, last = max(begin, rows.start), min(end, rows.stop)
    if first >= last:
        return
    assert use.cut is not None
    whole = (first, last) == (rows.start, rows.stop)
    within = WHOLE if whole else slice(first - rows.start, last - rows.start)
    yield use._replace(write=use.cut(slice(first - begin, last - begin)), part=within)


def _rows_first(grad: Tensor) -> Tensor:
    return grad if grad.dim() else grad.view(1)
