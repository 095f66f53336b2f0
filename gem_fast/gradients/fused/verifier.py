"""Compares a fused pass with one backward per task: before anything relies on it, and now and then from then on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from gem_fast.gradients import reentrant
from gem_fast.gradients.cpu_mlp import ExampleGradients
from gem_fast.gradients.fused.batch_cache import BatchCache
from gem_fast.gradients.fused.comparison import RowsDiffer, compare_buffers, compare_row
from gem_fast.gradients.fused.descriptors import with_descriptors
from gem_fast.gradients.fused.model import FusedModel
from gem_fast.gradients.fused.recorder import CannotFuse, CannotVerify
from gem_fast.gradients.fused.task_batch import TaskBatch
from gem_fast.gradients.interface import Batch, Constraint, Sample, TaskGradients, random_devices
from gem_fast.gradients.loop import fill_rows
from gem_fast.gradients.restore import Buffers, buffers_restored, parameters_moved
from gem_fast.gradients.rows import RowGradients, by_parameter, rows_for
from gem_fast.ops import pack_

AnyGradients = TypeVar("AnyGradients", bound=TaskGradients | Tensor)

# How often a comparison is tried: with the parameters as they are, and twice with others close to them.
_ATTEMPTS = 3


class _UsesRandomNumbers(Exception):
    """A pass has drawn some."""


class Verifier:
    """Compares passes through a model with the loop.

    `verify_new` compares a small pass of two tasks when a pass is of a kind that is new. `verified` compares some tasks
    of a pass that is about to be used: a model may come to mix examples in this batch that did not in those before. A
    ReLU whose input is zero but for rounding is no mistake of the pass: where gradients differ in float32 or less,
    passes at slightly other parameters decide. Nor is a difference by rounding alone, as of a gradient that is nothing
    else: where they differ, the loop's own rounding, measured by float64, says how much is allowed. The parameters are
    put back, and so are buffers. On a GPU a comparison waits for the result.

    Attributes:
        bytes_per_example: what a pass keeps in memory for each example, as the last comparison found.
    """

    def __init__(self, model: FusedModel) -> None:
        self.bytes_per_example = 1
        self._model = model
        self._shortcuts = True
        self._verified: set[tuple[Hashable, int, bool, bool]] = set()

    def verify_new(self, constraints: Sequence[Constraint], *, shortcuts: bool, is_mlp: bool) -> bool:
        """Verifies two tasks, and for a model that takes the task two of which one is new, until none is.

        Args:
            constraints: of one batch each.
            shortcuts: as for `FusedModel.run`.
            is_mlp: whether the pass will be one of `cpu_mlp.whole_pass`.

        Returns:
            Whether there was anything new.

        Raises:
            CannotVerify: the gradients are not finite.
            CannotFuse: the fused pass does not do the same as the loop.
        """
        self._shortcuts = shortcuts
        call_per_task = self._model.call_per_task
        was_new = False
        for k, [batch] in enumerate(constraints if call_per_task else constraints[:1]):
            kind = (batch.task if call_per_task else None, min(2, len(constraints)), shortcuts, is_mlp)
            if kind in self._verified:
                continue
            [other] = constraints[0 if k > 0 else -1]
            batches = [batch, other][: len(constraints)]
            self._up_to_rounding(partial(self._check_up_to_coincidence, batches))
            self._verified.add(kind)
            was_new = True
        return was_new

    def verified(
        self,
        run: Callable[[], AnyGradients],
        constraints: Sequence[Constraint],
        sample: Sample | None,
        rows: slice,
        due: Sequence[int],
        current: Batch | None = None,
    ) -> AnyGradients:
        """What a pass gives, once the loop gives the same for some rows of it, and leaves the same buffers.

        A pass that uses random numbers cannot be compared itself, but one with nothing dropped.

        Args:
            run: runs the pass.
            constraints: as for `Engine.__call__`, of one batch each.
            sample: as for `Engine.__call__`.
            rows: the rows of G that the pass computes.
            due: which of these rows to compare.
            current: the current mini-batch, where its gradient is the last row; it is compared, too.

        Raises:
            CannotVerify: the gradients are not finite.
            CannotFuse: the loop does not do the same. Buffers are then as they were.
        """
        devices, modules = random_devices(self._model.parameters), list(self._model.objective.model.modules())
        sampled = (constraints if sample is None else sample.of(constraints))[rows]
        t, batches = len(constraints), list(enumerate((batch for [batch] in sampled), rows.start))
        compared_rows = {rows.start + k for k in due}
        if current is not None:
            t, batches, compared_rows = t + 1, [(t, current), *batches], {*compared_rows, t}

        def compared(even_random: bool) -> AnyGradients:
            with torch.random.fork_rng(devices), buffers_restored(modules, only_on_failure=True) as before:
                start = random_states(devices)
                G = run()
                if not even_random and not all(map(torch.equal, random_states(devices), start)):
                    raise _UsesRandomNumbers
                _set_random_states(devices, start)
                with buffers_restored(modules):
                    self._compare_with_loop(G, t, batches, compared_rows, before)
            return G

        def check_with_nothing_dropped() -> None:
            with buffers_restored(modules), _NothingDropped():
                compared(even_random=True)

        attempt = 0
        try:
            return compared(even_random=False)
        except _UsesRandomNumbers:
            pass
        except RowsDiffer:
            if self._model.parameters[0].dtype == torch.float64:
                raise
            attempt = 1
        self._up_to_rounding(check_with_nothing_dropped, attempt)
        return run()

    def verify_alone(self, current: Batch, run: Callable[[], Sequence[Tensor | None]]) -> None:
        """Compares the gradients of a mini-batch that went through the model alone; raises as `verified` does.

        Args:
            current: the mini-batch.
            run: computes its gradient per parameter, None where its loss does not depend on one; changes nothing.
        """
        objective, parameters = self._model.objective, self._model.parameters
        expected, got = rows_for(1, parameters), rows_for(1, parameters)

        def check() -> None:
            with buffers_restored(objective.model.modules()):
                depends = fill_rows(objective, [[current]], parameters, expected, slice(0, 1))
            grads = run()
            pack_(got[0], grads, [parameter.numel() for parameter in parameters])
            if not bool(expected.isfinite().all()):
                raise CannotVerify("the gradients are not finite")
            compare_row(objective, parameters, current, expected, got)
            if depends != [grad is not None for grad in grads]:
                raise CannotFuse("a parameter that is used outside of its layer would be missed")

        self._up_to_rounding(check)

    def _compare_with_loop(
        self,
        G: TaskGradients | Tensor,
        t: int,
        batches: Sequence[tuple[int, Batch]],
        due: Collection[int],
        before: Buffers,
    ) -> None:
        """One row at a time, so that a form of G that has no rows does not need the memory for many.

        Args:
            G: what the pass gave.
            t: the number of rows of G.
            batches: what went through it, task by task, with the rows of G.
            due: which rows to compare.
            before: the buffers' values before the pass; those after it are in the model.
        """
        objective, parameters = self._model.objective, self._model.parameters
        after = [buffer.clone() for buffer in objective.model.buffers()]
        # A task's gradient may depend on what the tasks before it have left in the buffers.
        has_changed = not before.are_unchanged()
        before.restore()
        expected = rows_for(1, parameters)
        for k, batch in batches:
            if k in due:
                fill_rows(objective, [[batch]], parameters, expected, slice(0, 1))
                got = _row(G, k, t, parameters)
                # Where there are no rows, one that is not finite spoils the others.
                has_rows = isinstance(G, RowGradients | Tensor)
                if not bool((expected if has_rows else expected + got).isfinite().all()):
                    raise CannotVerify("the gradients are not finite")
                compare_row(objective, parameters, batch, expected, got)
            elif has_changed:
                objective.loss(batch)
        expected_buffers = [buffer.clone() for buffer in objective.model.buffers()]
        compare_buffers(objective, [batch for _, batch in batches], before, expected_buffers, after)

    def _up_to_rounding(self, check: Callable[[], None], first: int = 0) -> None:
        """Runs a comparison; where gradients differ, at other parameters, where rounding flips other ReLUs if any."""
        model, dtype = self._model.objective.model, self._model.parameters[0].dtype
        last = 0 if dtype == torch.float64 else _ATTEMPTS - 1
        for attempt in range(first, last + 1):
            try:
                with parameters_moved(list(model.parameters()), attempt) if attempt else nullcontext():
                    return check()
            except RowsDiffer:
                if attempt == last:
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
            if first.size < 2:
                raise
            with suppress(CannotFuse):
                self._check([first.select(slice(first.size - 1)), *others])
                return self._check(batches, learn_dims=False)
            raise

    def _check(self, batches: Sequence[Batch], learn_dims: bool = True) -> None:
        """Raises CannotFuse unless both ways do the same, to rounding; leaves no trace in the model."""
        objective, parameters = self._model.objective, self._model.parameters
        model, t, constraints = objective.model, len(batches), [[batch] for batch in batches]
        expected, got = rows_for(t, parameters), rows_for(t, parameters)
        devices = random_devices(parameters)
        with torch.random.fork_rng(devices), _NothingDropped(), buffers_restored(model.modules()) as before:
            depends = fill_rows(objective, constraints, parameters, expected, slice(0, t))
            expected_buffers = [buffer.clone() for buffer in model.buffers()]
            before.restore()
            with failures_as_reasons():
                same = self._fill(batches, got, learn_dims) == depends
            buffers = [buffer.clone() for buffer in model.buffers()]
            compare_buffers(objective, batches, before, expected_buffers, buffers)
        if not bool(expected.isfinite().all()):
            raise CannotVerify("the gradients are not finite")
        for k, batch in enumerate(batches):
            compare_row(objective, parameters, batch, expected[k : k + 1], got[k : k + 1])
        if not same:
            raise CannotFuse("a parameter that is used outside of its layer would be missed")

    def _fill(self, batches: Sequence[Batch], G: Tensor, learn_dims: bool) -> list[bool]:
        model = self._model
        of_tasks = (
            [TaskBatch.of(batch) for batch in batches]
            if model.call_per_task
            else [with_descriptors(BatchCache(model.objective.loss_fn)(batches, None, slice(0, len(batches))), batches)]
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
        if reentrant.is_reason_of(error):
            raise CannotFuse(reentrant.REASON) from error
        raise CannotFuse(f"the fused pass failed: {type(error).__name__}: {error}") from error


def random_states(devices: Sequence[int]) -> list[Tensor]:
    """Those of the CPU's generator and of these GPUs'; to read them waits for nothing."""
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]


def _set_random_states(devices: Sequence[int], states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


def _row(G: TaskGradients | Tensor, k: int, t: int, parameters: Sequence[Parameter]) -> Tensor:
    """(1, p): row k of G (t, p), which need not be kept as rows."""
    if isinstance(G, RowGradients | Tensor):
        return (G if isinstance(G, Tensor) else G.G)[k : k + 1]
    if isinstance(G, ExampleGradients):
        return G.rows(slice(k, k + 1))
    row = rows_for(1, parameters).zero_()
    unit = torch.zeros(t, dtype=torch.float64, device=row.device)
    unit[k] = 1.0
    G.combine_([part.view_as(p) for part, p in zip(by_parameter(row, parameters), parameters, strict=True)], unit)
    return row


class _NothingDropped(TorchDispatchMode):
    """Dropout keeps everything, so that two passes can be compared."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and importing the compiler to say so takes a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Attention as one operator drops within it, and its backward draws the same again.
        names = [argument.name for argument in func._schema.arguments[: len(args)]]
        args = tuple(0.0 if name == "dropout_p" else value for name, value in zip(names, args, strict=True))
        kwargs = {name: 0.0 if name == "dropout_p" else value for name, value in (kwargs or {}).items()}
        if func is torch.ops.aten.bernoulli_.float:
            return args[0].fill_(1)
        if func is torch.ops.aten.native_dropout.default:
            x, probability, train = args
            return x / (1 - probability if train else 1), torch.ones_like(x, dtype=torch.bool)
        return func(*args, **kwargs)


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
        return x.detach()  # x itself would hold its graph, of which it is a part, for good
