"""G without its rows: what they follow from, layer by layer, for models of which t rows do not fit into memory.

    P = sum over layers of G_l G_l'        q = sum over layers of G_l g_l        g~_l = g_l + G_l' v

where G_l (t, p_l) are the columns of one layer's parameter. They follow from the inputs A and the output gradients B of
that layer, which one pass over all tasks' examples leaves behind, in two ways, whichever takes fewer multiplications:

- blocks of columns: G_l is formed some rows of the parameter at a time, read, and gone;
- inner products of examples, for a linear layer's weight: with the examples (and positions) of task k as the rows of
  A_k and B_k, the gradient of task k is B_k' A_k, and (G_l G_l')_kj is the sum of all of (A_k A_j') * (B_k B_j').
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from gem_fast import ops
from gem_fast.gradients.fused.recorder import WHOLE, Contribution
from gem_fast.gradients.fused.task_batch import TaskSizes

# What a block of columns, or of inner products, may take: enough that most layers are one block for a few tasks.
_BLOCK_BYTES = 2**24


class LayerwiseGradients:
    """`TaskGradients` as a sum over parts, each with the columns of one parameter.

    Args:
        parts: for each parameter its columns; None where no past task's loss depends on it.
        t: the number of past tasks.
    """

    def __init__(self, parts: Sequence[ColumnBlocks | InnerProducts | None], t: int) -> None:
        self.depends = [part is not None for part in parts]
        self._parts = list(parts)
        self._t = t

    def gram(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `TaskGradients.gram`."""
        P = torch.zeros(self._t, self._t, dtype=torch.float64, device=grads[0].device)
        q = torch.zeros_like(P[0])
        unused = []
        for grad, part in zip(grads, self._parts, strict=True):
            if part is None:
                unused.append(grad)
                continue
            P_part, q_part = part.gram([grad])
            P += P_part
            q += q_part
        if P.device.type == "cpu":
            check_finite(P, q, unused)
        return P, q

    def combine_(self, grads: Sequence[Tensor], v: Tensor) -> None:
        """As `TaskGradients.combine_`."""
        if v.device.type == "cpu" and not bool(v.any()):
            return
        for grad, part in zip(grads, self._parts, strict=True):
            if part is not None:
                part.combine_([grad], v)

    def cancellation(self, P: Tensor) -> Tensor:
        """() float64: how much larger the rounding of P is than if it came from rows, because examples cancel out."""
        terms = torch.zeros_like(P.diagonal())
        for part in self._parts:
            if isinstance(part, InnerProducts):
                terms += part.squared_terms()
        factors = terms / P.diagonal().clamp_min(1e-300)
        return 1 + (factors.max() if self._t else factors.sum())

    def in_float64(self) -> LayerwiseGradients:
        """The same gradients, with products and sums in float64."""
        return LayerwiseGradients([None if part is None else part.in_float64() for part in self._parts], self._t)

    @torch.no_grad()
    def columns(self, parameters: Sequence[Parameter]) -> Iterator[Tensor]:
        """G (t, p) as blocks of columns (t, n), one after the other: what other processes are sent of it."""
        for parameter, part in zip(parameters, self._parts, strict=True):
            if part is None:
                yield parameter.new_zeros(1, 1).expand(self._t, parameter.numel())
            else:
                yield from part.columns()


class ColumnBlocks:
    """The columns of one parameter, formed some of its rows at a time.

    Args:
        parameter: the parameter.
        contributions: its uses in the pass.
        t: the number of past tasks.
        in_float64: whether products of the columns are taken in float64, whatever their dtype.
    """

    def __init__(
        self, parameter: Parameter, contributions: Sequence[Contribution], t: int, in_float64: bool = False
    ) -> None:
        self.depends = [True]
        self._in_float64 = in_float64
        self._parameter = parameter
        self._contributions = contributions
        self._t = t

    @torch.no_grad()
    def gram(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `TaskGradients.gram`."""
        [grad] = grads
        P = torch.zeros(self._t, self._t, dtype=torch.float64, device=grad.device)
        q = torch.zeros_like(P[0])
        for rows, block in self._blocks(self._contributions, self._t):
            P_block, q_block = ops.gram(block.flatten(1), [_at_least_1d(grad)[rows]], self._in_float64)
            P += P_block
            q += q_block
        return P, q

    @torch.no_grad()
    def combine_(self, grads: Sequence[Tensor], v: Tensor) -> None:
        """As `TaskGradients.combine_`: with its gradients at the layers' outputs weighted by v, all tasks are one."""
        [grad] = grads
        if self._in_float64:
            # Large multipliers: what `gram` has read is added, row by row.
            for rows, block in self._blocks(self._contributions, self._t):
                ops.combine_([_at_least_1d(grad)[rows]], block.flatten(1), v)
            return
        as_one_task = [_weighted(contribution, v) for contribution in self._contributions]
        for rows, block in self._blocks(as_one_task, 1):
            # A GPU does not know before whether v is zero: a NaN times zero must not get into the gradient.
            _at_least_1d(grad)[rows] += torch.where(v.any(), block[0], 0)

    def in_float64(self) -> ColumnBlocks:
        """The same columns, with products and sums in float64."""
        return ColumnBlocks(self._parameter, self._contributions, self._t, in_float64=True)

    def columns(self) -> Iterator[Tensor]:
        """The columns (t, n), some of them at a time."""
        for _, block in self._blocks(self._contributions, self._t):
            yield block.flatten(1)

    def _blocks(self, contributions: Sequence[Contribution], t: int) -> Iterator[tuple[slice, Tensor]]:
        """Blocks (t, rows, ...) of some of the parameter's rows at a time."""
        shape = self._parameter.shape or torch.Size([1])
        if not self._parameter.numel():
            return
        row_bytes = t * self._parameter.element_size() * self._parameter.numel() // shape[0]
        step = max(1, _BLOCK_BYTES // row_bytes)
        if any(contribution.restrict is None for contribution in contributions):
            step = shape[0]
        for start in range(0, shape[0], step):
            rows = slice(start, min(start + step, shape[0]))
            block = self._parameter.new_empty(t, rows.stop - rows.start, *shape[1:])
            whole = rows == slice(0, shape[0])
            mine = contributions if whole else [part for c in contributions for part in _restricted(c, rows)]
            write_columns(mine, block)
            yield rows, block


class InnerProducts:
    """The columns of a linear layer's weight, as inner products of its inputs and of its output gradients.

    Args:
        A: (N, ..., inputs): the layer's inputs, examples first.
        B: (N, ..., outputs): the gradients at its outputs. The other way round where the weight is transposed.
        uses: for each use of the weight its first task, and how many of its examples are each task's; the uses follow
            each other in A and B.
        t: the number of past tasks.
    """

    def __init__(self, A: Tensor, B: Tensor, uses: Sequence[tuple[int, TaskSizes]], t: int) -> None:
        self.depends = [True]
        positions = A[0].numel() // A.shape[-1]
        # Sums of many products need more digits than half precision has.
        dtype = torch.float64 if A.dtype == torch.float64 else torch.float32
        self._A, self._B = (x.reshape(-1, x.shape[-1]).to(dtype) for x in (A, B))
        task = [tasks.repeat(torch.arange(first, first + len(tasks), device=A.device)) for first, tasks in uses]
        # (rows, t): 1 where a row of A and B is the task's.
        of_rows = torch.cat(task).unsqueeze(1).expand(-1, positions).reshape(-1, 1)
        self._is_of_task = (of_rows == torch.arange(t, device=A.device)).double()

    @torch.no_grad()
    def gram(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `TaskGradients.gram`, in blocks of rows of A and B."""
        A, B, is_of_task = self._A, self._B, self._is_of_task
        [grad] = grads
        P = is_of_task.new_zeros(is_of_task.shape[1], is_of_task.shape[1])
        step = max(1, _BLOCK_BYTES // (8 * len(A)))
        for start in range(0, len(A), step):
            rows = slice(start, start + step)
            products = (A[rows] @ A.mT).mul_(B[rows] @ B.mT)
            P += is_of_task[rows].mT @ (products.double() @ is_of_task)
        if P.device.type == "cpu" and not bool(P.isfinite().all()):
            row = int((A.isfinite().all(1) & B.isfinite().all(1)).int().argmin())
            raise _not_finite(int(is_of_task[row].argmax()))
        q = is_of_task.new_zeros(len(A))
        for outputs in self._blocks():
            q += (A @ grad[outputs].to(A.dtype).mT).mul_(B[:, outputs]).sum(1, dtype=torch.float64)
        return P, q @ is_of_task

    @torch.no_grad()
    def combine_(self, grads: Sequence[Tensor], v: Tensor) -> None:
        """As `TaskGradients.combine_`."""
        [grad] = grads
        weights = (self._is_of_task @ v).to(self._B.dtype)
        A, B = self._A, self._B
        if v.device.type != "cpu":
            # A GPU does not know before whether v is zero: a NaN times zero must not get into the gradient.
            A, B = (torch.where(v.any(), x, 0) for x in (A, B))
        elif not bool(weights.all()):  # the examples of tasks whose multipliers are zero are left out
            active = weights.nonzero().flatten()
            A, B, weights = A[active], B[active], weights[active]
        B = B * weights[:, None]
        for outputs in self._blocks():  # gradients are large
            grad[outputs] += B[:, outputs].mT @ A

    def _blocks(self) -> Iterator[slice]:
        """Some of the weight's rows at a time."""
        step = max(1, _BLOCK_BYTES // (self._A.shape[1] * self._A.element_size()))
        for start in range(0, self._B.shape[1], step):
            yield slice(start, start + step)

    @torch.no_grad()
    def squared_terms(self) -> Tensor:
        """(t,) float64: of each task, the sum of the squared lengths of its examples' gradients."""
        lengths = self._A.square().sum(1, dtype=torch.float64) * self._B.square().sum(1, dtype=torch.float64)
        return lengths @ self._is_of_task

    def in_float64(self) -> InnerProducts:
        """The same columns, with products and sums in float64."""
        twin = copy.copy(self)
        twin._A, twin._B = self._A.double(), self._B.double()
        return twin

    def columns(self) -> Iterator[Tensor]:
        """The columns (t, n), some of them at a time."""
        tasks = [rows.nonzero().flatten() for rows in self._is_of_task.mT]
        outputs, inputs = self._B.shape[1], self._A.shape[1]
        step = max(1, _BLOCK_BYTES // (len(tasks) * inputs * self._A.element_size()))
        for start in range(0, outputs, step):
            B = self._B[:, start : start + step]
            yield torch.stack([(B[mine].mT @ self._A[mine]).flatten() for mine in tasks])


def layerwise(contributions: Sequence[Contribution], parameters: Sequence[Parameter], t: int) -> LayerwiseGradients:
    """G from what a pass over all tasks left behind."""
    uses = group(contributions, parameters)
    return LayerwiseGradients([_columns_of(p, mine, t) if mine else None for p, mine in uses.items()], t)


def products_are_cheaper(n: int, t: int, shape: torch.Size) -> bool:
    """Whether inner products of n rows cost less than a weight's gradients of t tasks do.

    Counted are multiplications. To form the gradients takes n outputs inputs of them, as many as q takes by way of the
    products; the rest is P, and q by way of the gradients.
    """
    outputs, inputs = shape
    return n * n * (inputs + outputs + 2) <= (t * (t + 1) // 2 + t) * outputs * inputs


def group(
    contributions: Sequence[Contribution], parameters: Sequence[Parameter]
) -> dict[Parameter, list[Contribution]]:
    """The contributions to each of these parameters, perhaps none."""
    found: dict[Parameter, list[Contribution]] = {parameter: [] for parameter in parameters}
    for contribution in contributions:
        found[contribution.parameter].append(contribution)
    return found


def write_columns(contributions: Sequence[Contribution], out: Tensor) -> None:
    """Writes a parameter's columns of G: straight from its uses where each row has one, else their sum.

    Args:
        contributions: the uses of the parameter in these rows.
        out: (t, ...) and then the parameter's shape.
    """
    used = [row for contribution in contributions for row in contribution.rows]
    once = len(set(used)) == len(used) and all(contribution.part == WHOLE for contribution in contributions)
    if not once or len(used) < len(out):
        out.zero_()
    for contribution in contributions:
        target = out[contribution.rows.start : contribution.rows.stop][:, contribution.part]
        if once:
            contribution.write_to(target)
        else:
            addend = torch.empty_like(target)
            contribution.write_to(addend)
            target += addend


def _columns_of(parameter: Parameter, contributions: Sequence[Contribution], t: int) -> ColumnBlocks | InnerProducts:
    """Inner products where linear layers alone use the parameter, as a whole, and that is cheaper; else blocks."""
    factors = [c.factors for c in contributions if c.factors is not None and c.part == WHOLE]
    inputs = [(x.reshape(len(x), -1, x.shape[-1]), b.reshape(len(b), -1, b.shape[-1])) for x, b in factors]
    n = sum(x.shape[0] * x.shape[1] for x, _ in inputs)
    fits = len(factors) == len(contributions) and len({x.shape[1] for x, _ in inputs}) == 1
    if not fits or not products_are_cheaper(n, t, parameter.shape):
        return ColumnBlocks(parameter, contributions, t)
    A, B = (torch.cat(xs) if len(xs) > 1 else xs[0] for xs in zip(*inputs, strict=True))
    return InnerProducts(A, B, [(c.first, c.tasks) for c in contributions], t)


def _weighted(contribution: Contribution, v: Tensor) -> Contribution:
    grad, tasks = contribution.grad, contribution.tasks
    weights = v[contribution.rows.start : contribution.rows.stop].to(grad.dtype)
    if not contribution.is_alias:
        weights = tasks.repeat(weights).view(-1, *[1] * (grad.dim() - 1))
    return contribution._replace(grad=grad * weights, first=0, tasks=TaskSizes([tasks.total]))


def _restricted(contribution: Contribution, rows: slice) -> Iterator[Contribution]:
    """What is left of a contribution within some of the parameter's rows; nothing, maybe."""
    begin, end, _ = contribution.part.indices(len(contribution.parameter))
    first, last = max(begin, rows.start), min(end, rows.stop)
    if first >= last:
        return
    assert contribution.restrict is not None
    whole = (first, last) == (rows.start, rows.stop)
    within = WHOLE if whole else slice(first - rows.start, last - rows.start)
    yield contribution._replace(write=contribution.restrict(slice(first - begin, last - begin)), part=within)


def check_finite(P: Tensor, q: Tensor, unused: Sequence[Tensor]) -> None:
    """Raises where a row of G or g is not finite; a part that is a matrix has said so itself."""
    rows = (~P.diagonal().isfinite()).nonzero().flatten()
    if len(rows):
        raise _not_finite(int(rows[0]))
    if not all(bool(x.isfinite().all()) for x in (q, *unused)):
        raise RuntimeError("grads must be finite, got a NaN or an infinity")


def _not_finite(row: int) -> RuntimeError:
    return RuntimeError(f"G must be finite, got a NaN or an infinity in row {row}")


def _at_least_1d(grad: Tensor) -> Tensor:
    return grad if grad.dim() else grad.view(1)
