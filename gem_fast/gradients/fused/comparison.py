"""Whether two ways to a gradient give the same one, to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.containers import Nest, map_tensors
from gem_fast.gradients.fused.recorder import CannotFuse
from gem_fast.gradients.interface import Batch, Objective
from gem_fast.gradients.loop import fill_rows
from gem_fast.gradients.restore import Buffers, buffers_restored, in_float64, parameters_moved
from gem_fast.gradients.rows import rows_for

# Two passes in one dtype may be as many times as far from each other as the loop is from float64.
_ROUNDING = 10.0
# But entries of a buffer by no more than this part of the largest one: float64 may take another path through the model.
_MOST_OF_BUFFER = 0.05
# Columns of a row that are in float64 at a time.
_BLOCK = 2**20
# Where that is measured: at the parameters as they are, and at others close by.
_PLACES = 3


class RowsDiffer(CannotFuse):
    """The gradients are others: by a mistake in principle, or because a ReLU's input was zero but for rounding."""


def compare_row(
    objective: Objective, parameters: Sequence[Parameter], batch: Batch, expected: Tensor, got: Tensor
) -> None:
    """Raises RowsDiffer where two gradients differ by more than the loop's own rounding, measured by float64.

    Args:
        objective: the model and its loss.
        parameters: whose gradients make up a row.
        batch: the examples.
        expected: (1, p) their gradient by the loop.
        got: (1, p) the other one.
    """
    try:
        compare(objective.model, parameters, expected, got)
    except RowsDiffer:
        errors, allowed = _errors(parameters, expected, got)
        # What is not finite is no rounding, and float64 is what rounding is measured with.
        if expected.dtype == torch.float64 or bool((errors <= allowed).all()) or not bool(errors.isfinite().all()):
            raise
        with suppress(Exception):  # not every model can be called in float64
            if bool((errors <= allowed + _ROUNDING * _rounding(objective, parameters, batch)).all()):
                return
        raise


def _rounding(objective: Objective, parameters: Sequence[Parameter], batch: Batch) -> Tensor:
    """(parameters,): how far the loop's row for a batch is from that in float64, here and close by."""
    model = objective.model
    exact = _batch_in_float64(batch)

    def row(of: Batch) -> Tensor:
        result = rows_for(1, parameters)
        with buffers_restored(model.modules()):
            fill_rows(objective, [[of]], parameters, result, slice(0, 1))
        return result

    found = []
    here: Tensor | None = None
    for place in range(_PLACES):
        with parameters_moved(list(model.parameters()), place) if place else nullcontext():
            rounded = row(batch)
            if here is None:
                here = rounded
            elif _may_be_tf32(rounded):
                found.append(_errors(parameters, here, rounded)[0])
            with in_float64([*model.parameters(), *model.buffers()]):
                found.append(_errors(parameters, row(exact), rounded)[0])
    return torch.stack(found).amax(0)


def compare_buffers(
    objective: Objective, batches: Sequence[Batch], before: Buffers, expected: Sequence[Tensor], got: Sequence[Tensor]
) -> None:
    """Raises CannotFuse where buffers differ by more than the loop's own rounding, measured by float64.

    Args:
        objective: the model and its loss.
        batches: what went through the model.
        before: the buffers' values before that; the caller has the model get them back.
        expected: those after one pass per batch.
        got: those that are compared.
    """
    rounding = [0.0] * len(expected)
    if _first_differing(expected, got, rounding) is None:
        return
    model = objective.model
    parameters = list(model.parameters())

    def measured(batches: Sequence[Batch]) -> list[float]:
        for batch in batches:
            objective.loss(batch)
        found = [_rounding_of(other, right) for other, right in zip(model.buffers(), expected, strict=True)]
        return list(map(max, rounding, found))

    before.restore()
    with suppress(Exception), torch.no_grad(), in_float64([*parameters, *model.buffers()]):
        rounding = measured(list(map(_batch_in_float64, batches)))
    if any(map(_may_be_tf32, parameters)):
        before.restore()
        with torch.no_grad(), parameters_moved(parameters, seed=1):
            rounding = measured(batches)
    differing = _first_differing(expected, got, rounding)
    if differing is not None:
        name = [name for name, _ in model.named_buffers()][differing]
        raise CannotFuse(f"the buffer {name} is not left as by one pass per task")


def _may_be_tf32(x: Tensor) -> bool:
    """Whether operators may take 11 bits of each number, and some do so while others do not.

    cuDNN chooses by the number of examples, say, so that the loop's rounding is not that of a pass with more of them.
    What it may come to is what moving each parameter by as much does. torch's switches are not asked: it refuses to
    tell where a program has set some by their old names and others by their new ones.
    """
    return x.is_cuda and x.dtype == torch.float32


def _rounding_of(exact: Tensor, rounded: Tensor) -> float:
    """How much more than usual the entries of a buffer may differ."""
    if not rounded.numel():
        return 0.0
    most = _MOST_OF_BUFFER * float(rounded.abs().max())
    return min(_ROUNDING * float((exact - rounded).abs().max()), most)


def _first_differing(expected: Sequence[Tensor], got: Sequence[Tensor], rounding: Sequence[float]) -> int | None:
    """Which buffer differs by more than rounding; whatever is not finite must be so in both. None: none does."""
    for i, (right, mine, more) in enumerate(zip(expected, got, rounding, strict=True)):
        if not torch.allclose(mine.double(), right.double(), rtol=1e-3, atol=1e-6 + more, equal_nan=True):
            return i
    return None


def compare(model: nn.Module, parameters: Sequence[Parameter], expected: Tensor, got: Tensor) -> None:
    """Raises RowsDiffer where rows (1, p) differ by more than a flipped ReLU of many."""
    errors, allowed = _errors(parameters, expected, got)
    # Not "greater than": a NaN must not pass.
    is_close = errors <= allowed
    if bool(is_close.all()):
        return
    names = {parameter: name for name, parameter in model.named_parameters()}
    differs = next(parameter for parameter, each in zip(parameters, is_close, strict=True) if not each)
    raise RowsDiffer(
        f"the gradients of {names.get(differs, 'a parameter')} differ from those of one backward per task: "
        "the model mixes the examples of a mini-batch, or uses a parameter in a way that no rule knows"
    )


def _errors(parameters: Sequence[Parameter], expected: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows (1, p), per parameter: the length of the difference, and what it may be; both (parameters,) float64."""
    # Rounding flips a ReLU now and then: of many, it changes less than this; of few, the caller tries again.
    tolerance = 3 * torch.finfo(expected.dtype).eps ** 0.5
    sizes = [parameter.numel() for parameter in parameters]
    right, found = expected.split(sizes, 1), got.split(sizes, 1)
    lengths = torch.stack(list(map(_length, right)))
    errors = torch.stack(list(map(_length, right, found)))
    return errors, tolerance * torch.maximum(lengths, 0.01 * lengths.norm())


def _length(x: Tensor, minus: Tensor | None = None) -> Tensor:
    """() float64: the length of x (1, n), or of x - minus, which are never in float64 as a whole."""
    total: Tensor | None = None
    for start in range(0, x.shape[1], _BLOCK):
        block = x[:, start : start + _BLOCK]
        if minus is not None:
            block = block.double() - minus[:, start : start + _BLOCK]
        length = torch.linalg.vector_norm(block, dtype=torch.float64)
        total = length if total is None else torch.hypot(total, length)
    return x.new_zeros((), dtype=torch.float64) if total is None else total


def _batch_in_float64(batch: Batch) -> Batch:
    return batch._replace(x=_doubled(batch.x), y=_doubled(batch.y), descriptor=_doubled(batch.descriptor))


def _doubled(value: Nest) -> Nest:
    """Floating-point tensors in float64."""
    return map_tensors(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)
