"""G on several processes: each rank has the rows of its own examples, and a part of the columns of the rows of all.

    g_k = sum over ranks r of w_kr g_kr / sum over ranks r of w_kr

where g_kr is the mean gradient of the examples that rank r has of task k, and w_kr in proportion to their number. P and
q are sums over columns, added up over the ranks once: all ranks then solve the same problem, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from gem_fast import ops
from gem_fast.distributed import Ranks
from gem_fast.gradients.interface import TaskGradients
from gem_fast.gradients.layerwise import LayerwiseGradients, check_finite
from gem_fast.gradients.rows import RowGradients, by_parameter, rows_for

# What a message takes at most, in bytes: enough for the full bandwidth of a network.
_MESSAGE_BYTES = 2**26
# The columns that a rank gets of a message start on cache lines: so many elements.
_ALIGNMENT = 32

# torch 2.13 has new names for the same.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Columns(Protocol):
    """The columns of G, not yet divided by the sum of the weights, that one rank has."""

    def gram(self, grads: Sequence[Tensor], in_float64: bool) -> tuple[Tensor, Tensor, Tensor]:
        """P (t, t), q (t,) and |g|^2 () of these columns, float64; where a number is not finite, so are they.

        Args:
            grads: all of g.
            in_float64: whether products are taken in float64, whatever the dtype.
        """

    def combine_(self, grads: Sequence[Tensor], v: Tensor) -> None:
        """g <- g + G^T v (Eq. 8), all of `grads`."""


class ShardedGradients:
    """`TaskGradients` whose columns are shared out among the ranks.

    Args:
        columns: those of this rank.
        weights: w_kr of this rank, per row.
        depends: per parameter, whether a row of this rank depends on it.
        ranks: the processes.
    """

    def __init__(self, columns: Columns, weights: Tensor, depends: Sequence[bool], ranks: Ranks) -> None:
        self._columns = columns
        self._in_float64 = False
        self._weights = weights
        self._used = torch.tensor(depends, dtype=torch.float64, device=weights.device)
        self._ranks = ranks

    @torch.no_grad()
    def gram(self, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `TaskGradients.gram`: one sum over the ranks, and an error, where there is one, on all of them."""
        P, q, squared = self._columns.gram(grads, self._in_float64)
        t = len(q)
        rows, columns = torch.triu_indices(t, t, device=P.device)
        n = len(rows)
        message = torch.cat([P[rows, columns], q, squared[None], self._weights, self._used])
        self._ranks.sum_columns_(message, slice(0, n + t + 1))
        upper, q, squared, self._total, self._users = message.split([n, t, 1, t, len(self._used)])
        self._squared_length: Tensor = squared[0]
        P[rows, columns] = P[columns, rows] = upper
        P, q = P / (self._total[:, None] * self._total), q / self._total
        if P.device.type == "cpu":
            check_finite(P, q, ())
        return P, q

    @torch.no_grad()
    def combine_(self, grads: Sequence[Tensor], v: Tensor) -> None:
        """As `TaskGradients.combine_`; to be called after `gram`."""
        if v.device.type == "cpu" and not bool(v.any()):
            return
        self._columns.combine_(grads, v / self._total)

    def squared_length(self, grads: Sequence[Tensor]) -> Tensor:
        """|g|^2, () float64, as the last `gram` found it."""
        return self._squared_length

    def in_float64(self) -> ShardedGradients:
        """The same gradients, with products and sums in float64."""
        twin = copy.copy(self)
        twin._in_float64 = True
        return twin

    @cached_property
    def depends(self) -> list[bool]:
        """As `TaskGradients.depends`, for the rows of all ranks; to be asked for after `gram`."""
        return [count > 0 for count in self._users.tolist()]


class ColumnShare:
    """`Columns` of replicated parameters: one part of G for each rank, added up over the rows of all ranks.

    G goes to the other ranks in blocks of columns, of which every rank gets an equal part; a block is a message. The
    share is kept from step to step, for the rows that are not computed anew in each.

    Args:
        ranks: the processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._blocks: list[Tensor] = []  # (t, width) each
        self._shape = (0, 0)

    def holds(self, t: int, p: int) -> bool:
        """Whether the share is one of a G of t rows and p columns."""
        return self._shape == (t, p)

    def reset(self) -> None:
        """Forgets all rows."""
        self._shape = (0, 0)

    @torch.no_grad()
    def exchange(
        self, local: Iterable[Tensor], parameters: Sequence[Tensor], mine: Sequence[int], weights: Tensor, stale: slice
    ) -> None:
        """Adds up rows of G over all ranks; to be called by all of them.

        Args:
            local: (rows, n) each: the rows that this rank has, perhaps none, as blocks of columns, p in total.
            parameters: whose gradients make up a row.
            mine: which rows of G those of this rank are.
            weights: (t,): what the rows are multiplied by before they are added up.
            stale: the rows of G that are exchanged; `mine` are among them.
        """
        t, p, like = len(weights), sum(parameter.numel() for parameter in parameters), parameters[0]
        parts = self._ranks.group.size()
        if not self.holds(t, p):
            fits = max(1, _MESSAGE_BYTES // (t * like.element_size() * parts))
            width = _rounded_up(min(-(-p // parts), fits))
            self._blocks = [like.new_empty(t, width) for _ in range(0, p, width * parts)]
            self._shape = (t, p)
        width = self._blocks[0].shape[1]
        rows = torch.tensor(mine, dtype=torch.int64, device=like.device) - stale.start
        scale = weights[stale].to(like.dtype)[:, None]
        starts = range(0, p, width * parts)
        widths = [min(p - start, width * parts) for start in starts]
        for block, columns in zip(self._blocks, _regrouped(local, widths), strict=True):
            columns = columns.to(like.dtype)
            message = like.new_zeros(parts, len(scale), width)
            full, rest = divmod(columns.shape[1], width)
            end = full * width
            message[:full].index_copy_(1, rows, columns[:, :end].unflatten(1, (full, width)).transpose(0, 1))
            if rest:
                message[full, :, :rest].index_copy_(0, rows, columns[:, end:])
            block[stale] = self._add_up(message.mul_(scale))

    def gram(self, grads: Sequence[Tensor], in_float64: bool) -> tuple[Tensor, Tensor, Tensor]:
        """As `Columns.gram`."""
        self._flat = self._flattened(grads)
        parts = zip(self._blocks, self._parts(), strict=True)
        products = [finite_or_nan_gram(block, [mine], in_float64) for block, (_, mine) in parts]
        P, q, squared = (torch.stack(each).sum(0) for each in zip(*products, strict=True))
        return P, q, squared

    def combine_(self, grads: Sequence[Tensor], v: Tensor) -> None:
        """As `Columns.combine_`; `grads` are those given to `gram`."""
        for block, (all_, mine) in zip(self._blocks, self._parts(), strict=True):
            mine = mine.clone()
            ops.combine_([mine], block, v)
            _all_gather(all_, mine, group=self._ranks.group)
        for grad, new in zip(grads, self._flat.split([grad.numel() for grad in grads] + [self._padding]), strict=False):
            grad.copy_(new.view_as(grad))

    def _flattened(self, grads: Sequence[Tensor]) -> Tensor:
        total = sum(block.shape[1] for block in self._blocks) * self._ranks.group.size()
        self._padding = total - self._shape[1]
        padding = grads[0].new_zeros(self._padding)
        return torch.cat([*(grad.flatten() for grad in grads), padding])

    def _parts(self) -> list[tuple[Tensor, Tensor]]:
        """Of the flattened gradient the columns of each block, all of them and those of this rank."""
        group = self._ranks.group
        blocks = self._flat.split([block.shape[1] * group.size() for block in self._blocks])
        return [(block, block.view(group.size(), -1)[group.rank()]) for block in blocks]

    def _add_up(self, message: Tensor) -> Tensor:
        """(ranks, rows, width) to (rows, width): the part of this rank, added up over all of them."""
        group = self._ranks.group
        if dist.get_backend(group) == dist.Backend.GLOO:
            # Gloo's reduce_scatter takes twice as long as this.
            received = torch.empty_like(message)
            dist.all_to_all_single(received, message, group=group)
            return received.sum(0)
        mine = torch.empty_like(message[0])
        _reduce_scatter(mine, message, group=group)
        return mine


class LocalShards:
    """`Columns` of sharded parameters: the rows are of the shards already, added up by the model's own backward."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def gram(self, grads: Sequence[Tensor], in_float64: bool) -> tuple[Tensor, Tensor, Tensor]:
        """As `Columns.gram`."""
        return finite_or_nan_gram(self._rows, local_tensors(grads), in_float64)

    def combine_(self, grads: Sequence[Tensor], v: Tensor) -> None:
        """As `Columns.combine_`."""
        if self._rows.shape[1]:
            ops.combine_(local_tensors(grads), self._rows, v)


def local_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's shards of DTensors."""
    return [x.to_local() for x in tensors]  # type: ignore[attr-defined]


def columns_of(G: TaskGradients, t: int, parameters: Sequence[Parameter]) -> Iterator[Tensor]:
    """G (t, p) as blocks of columns (t, n), one after the other."""
    if isinstance(G, RowGradients):
        yield G.G
    elif isinstance(G, LayerwiseGradients):
        yield from G.columns(parameters)
    else:
        yield _rows_of(G, t, parameters)


def _rows_of(G: TaskGradients, t: int, parameters: Sequence[Parameter]) -> Tensor:
    """G as a matrix (t, p), formed row by row."""
    rows = rows_for(t, parameters).zero_()
    for row, v in zip(rows, torch.eye(t, dtype=torch.float64, device=rows.device), strict=True):
        parts = zip(by_parameter(row[None], parameters), parameters, strict=True)
        G.combine_([part[0].view_as(p) for part, p in parts], v)
    return rows


def finite_or_nan_gram(G: Tensor, grads: Sequence[Tensor], in_float64: bool) -> tuple[Tensor, Tensor, Tensor]:
    """P, q and |g|^2; a number that is not finite is no error here: the other ranks wait for what this one has."""
    squared = torch.stack([grad.double().square().sum() for grad in grads]).sum()
    P = torch.zeros(len(G), len(G), dtype=torch.float64, device=G.device)
    if not G.shape[1]:
        return P, P[0].clone(), squared
    try:
        return *ops.gram(G, grads, in_float64), squared
    except RuntimeError:
        rows = ~G.isfinite().all(1)
        if not bool(rows.any()) and bool(squared.isfinite()):
            raise
        P[rows] = P[:, rows] = torch.nan
        return P, torch.full_like(P[0], torch.nan), squared


def _regrouped(blocks: Iterable[Tensor], widths: Sequence[int]) -> Iterator[Tensor]:
    """Blocks of columns as others, of these widths."""
    waiting = iter(blocks)
    joined = next(waiting)
    for width in widths:
        while joined.shape[1] < width:
            joined = torch.cat([joined, next(waiting)], 1)
        yield joined[:, :width]
        joined = joined[:, width:]


def _rounded_up(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT
