"""Compares a fused pass with one backward per task before anything relies on it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from gem_fast.gradients.fused.batch_cache import BatchCache
from gem_fast.gradients.fused.model import FusedModel
from gem_fast.gradients.fused.recorder import CannotFuse, CannotVerify
from gem_fast.gradients.fused.task_batch import TaskBatch, TaskSizes
from gem_fast.gradients.interface import Batch, Constraint, random_devices
from gem_fast.gradients.loop import fill_rows
from gem_fast.gradients.rows import rows_for


class RowsDiffer(CannotFuse):
    """The gradients are others: by a mistake in principle, or because a ReLU's input was zero but for rounding."""


class Verifier:
    """Compares passes through a model with the loop, on two tasks, whenever a pass is of a kind that is new.

    Attributes:
        bytes_per_example: what a pass keeps in memory for each example, as the last comparison found.
    """

    def __init__(self, model: FusedModel) -> None:
        self.bytes_per_example = 1
        self._model = model
        self._shortcuts = True
        self._verified: set[tuple[Hashable, int, bool, bool]] = set()

    def verify_new(self, constraints: Sequence[Constraint], *, shortcuts: bool, is_mlp: bool) -> None:
        """Verifies two tasks, and for a model that takes the task two of which one is new, until none is.

        Args:
            constraints: of one batch each.
            shortcuts: as for `FusedModel.run`.
            is_mlp: whether the pass will be one of `cpu_mlp.whole_pass`.

        Raises:
            CannotVerify: the gradients are not finite.
            CannotFuse: the fused pass does not do the same as the loop.
        """
        self._shortcuts = shortcuts
        pass_task = self._model.objective.pass_task
        for k, [batch] in enumerate(constraints if pass_task else constraints[:1]):
            kind = (batch.task if pass_task else None, min(2, len(constraints)), shortcuts, is_mlp)
            if kind in self._verified:
                continue
            [other] = constraints[0 if k > 0 else -1]
            self._check_up_to_rounding([batch, other][: len(constraints)])
            self._verified.add(kind)

    def _check_up_to_rounding(self, batches: Sequence[Batch]) -> None:
        """Verifies one batch per task, or one half of each: a ReLU that rounding flips is in one half only."""
        try:
            return self._check_up_to_coincidence(batches)
        except RowsDiffer:
            if self._model.parameters[0].dtype == torch.float64 or min(len(batch.x) for batch in batches) < 2:
                raise
            for half in (0, 1):
                with suppress(RowsDiffer):
                    return self._check_up_to_coincidence([_half(batch, half) for batch in batches])
            raise

    def _check_up_to_coincidence(self, batches: Sequence[Batch]) -> None:
        """Verifies; where that fails, once more with the dimensions that run over the examples found out otherwise.

        A dimension may happen to be as long as there are examples: with one example less it is not.
        """
        try:
            self._check(batches)
        except CannotVerify:
            raise
        except CannotFuse:
            first, *others = batches
            if len(first.x) < 2:
                raise
            with suppress(CannotFuse):
                self._check([first._replace(x=first.x[:-1], y=first.y[:-1]), *others])
                return self._check(batches, learn_dims=False)
            raise

    def _check(self, batches: Sequence[Batch], learn_dims: bool = True) -> None:
        """Raises CannotFuse unless both ways do the same, to rounding; leaves no trace in the model."""
        model, parameters = self._model.objective.model, self._model.parameters
        t, constraints = len(batches), [[batch] for batch in batches]
        expected, got = rows_for(t, parameters), rows_for(t, parameters)
        with torch.random.fork_rng(random_devices(parameters)), _NothingDropped():
            with buffers_restored(list(model.buffers())):
                depends = fill_rows(self._model.objective, constraints, parameters, expected, slice(0, t))
                buffers = [buffer.clone() for buffer in model.buffers()]
            with buffers_restored(list(model.buffers())), failures_as_reasons():
                same = self._fill(batches, got, learn_dims) == depends
                _compare_buffers(model, buffers)
        if not bool(expected.isfinite().all()):
            raise CannotVerify("the gradients are not finite")
        _compare(model, parameters, expected, got)
        if not same:
            raise CannotFuse("a parameter that is used outside of its layer would be missed")

    def _fill(self, batches: Sequence[Batch], G: Tensor, learn_dims: bool) -> list[bool]:
        model = self._model
        of_tasks = (
            [batch_of_task(batch) for batch in batches]
            if model.objective.pass_task
            else [BatchCache(model.objective.loss_fn)(batches, None, slice(0, len(batches)))]
        )
        with _KeptBytes(model.parameters) as kept:
            done = model.run(of_tasks, shortcuts=self._shortcuts, verifying=True, learn_dims=learn_dims)
            done.write(G, model.parameters)
        # Beside what is kept for the backward there are the gradients at the layers' outputs.
        own = sum(layer.out_features * layer.weight.element_size() for layer in model.mlp_layers)
        self.bytes_per_example = max(1, 2 * max(own, kept.total // sum(batch.tasks.total for batch in of_tasks)))
        return done.depends(model.parameters)


@contextmanager
def failures_as_reasons() -> Iterator[None]:
    """Turns whatever a model does that no rule foresaw into a reason to leave it to the loop."""
    try:
        yield
    except CannotFuse:
        raise
    except Exception as error:
        raise CannotFuse(f"the fused pass failed: {type(error).__name__}: {error}") from error


def batch_of_task(batch: Batch) -> TaskBatch:
    """One task's examples alone, for a model that takes the task."""
    return TaskBatch(batch.x, batch.y, batch.task, TaskSizes([len(batch.x)]))


def _half(batch: Batch, which: int) -> Batch:
    middle = len(batch.x) // 2
    some = slice(middle, None) if which else slice(middle)
    return batch._replace(x=batch.x[some], y=batch.y[some])


def _compare_buffers(model: nn.Module, expected: Sequence[Tensor]) -> None:
    for (name, got), right in zip(model.named_buffers(), expected, strict=True):
        # Whatever is not finite must be so in both.
        if not torch.allclose(got.double(), right.double(), rtol=1e-3, atol=1e-6, equal_nan=True):
            raise CannotFuse(f"the buffer {name} is not left as by one pass per task")


def _compare(model: nn.Module, parameters: Sequence[Parameter], expected: Tensor, got: Tensor) -> None:
    # Rounding flips a ReLU now and then: of many, it changes less than this; of few, the caller tries again.
    tolerance = 3 * torch.finfo(expected.dtype).eps ** 0.5
    floor = 0.01 * expected.double().norm(dim=1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, right, mine in zip(parameters, expected.split(sizes, 1), got.split(sizes, 1), strict=True):
        error = (mine.double() - right.double()).norm(dim=1)
        # Not "greater than": a NaN must not pass.
        if not bool((error <= tolerance * torch.maximum(right.double().norm(dim=1), floor)).all()):
            raise RowsDiffer(
                f"the gradients of {names.get(parameter, 'a parameter')} differ from those of one backward per task: "
                "the model mixes the examples of a mini-batch, or uses a parameter in a way that no rule knows"
            )


@contextmanager
def buffers_restored(buffers: Sequence[Tensor], *, only_on_failure: bool = False) -> Iterator[None]:
    """Puts buffers, running statistics say, back as they were before the block, or before a block that failed."""
    before = [(buffer, buffer.clone()) for buffer in buffers]
    has_failed = True
    try:
        yield
        has_failed = False
    finally:
        if has_failed or not only_on_failure:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)


class _NothingDropped(TorchDispatchMode):
    """Dropout keeps everything, so that two passes can be compared."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and importing the compiler to say so takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bernoulli_.float:
            return args[0].fill_(1)
        if func is torch.ops.aten.native_dropout.default:
            x, probability, train = args
            return x / (1 - probability if train else 1), torch.ones_like(x, dtype=torch.bool)
        return func(*args, **(kwargs or {}))


class _KeptBytes:
    """Counts what autograd keeps for the backward of what runs within the block.

    Attributes:
        total: bytes, parameters left out.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.total = 0
        self._seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda x: x)

    def __enter__(self) -> _KeptBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _count(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return x
