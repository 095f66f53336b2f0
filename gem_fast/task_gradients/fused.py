"""One forward and one backward for all past tasks: an answer to the paper's third open point (its Section 6)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.task_gradients.assembly import write_rows
from gem_fast.task_gradients.chain import find_chain, goes_through
from gem_fast.task_gradients.chain_pass import ChainPass
from gem_fast.task_gradients.examples import ExampleCache
from gem_fast.task_gradients.loop import LoopTaskGradients
from gem_fast.task_gradients.losses import End, has_known_gradient
from gem_fast.task_gradients.pieces import Piece, Segments
from gem_fast.task_gradients.plan import Plan
from gem_fast.task_gradients.protocol import Batch, Sample, TaskRows, chosen
from gem_fast.task_gradients.recording import CannotFuse, CannotVerify, Recorder, recording
from gem_fast.task_gradients.rows import new_rows, random_devices
from gem_fast.task_gradients.verification import (
    KeptBytes,
    RowsDiffer,
    check_every_use_is_known,
    failures_as_reasons,
    verify,
)

_log = logging.getLogger("gem_fast")

# What the activations of one pass may take where tasks_per_pass is None.
MEMORY_BYTES = 2**30


class FusedTaskGradients:
    """Computes all rows of G in one forward and one backward over the concatenated memories.

    Autograd computes the gradients at the outputs of the layers only; from each, and from the layer's input, a rule per
    type of layer forms the weight's gradient of every task, straight into G's rows (gem_fast/task_gradients/rules).
    Modules without a rule, and those that look at a mini-batch as a whole (batch normalisation), run once per task.

    The first pass through a model, and each one that takes a new way through its modules, is compared with
    `LoopTaskGradients` on two tasks. A model that cannot be handled, or whose rows differ, is left to the loop; a line
    in the log "gem_fast" names the reason. So is a convolutional net on a CPU, where the loop is as fast or faster,
    unless `tasks_per_pass` is given.

    Args:
        model: called as model(x), or model(x, task) with `pass_task`: then once per task, with one backward for all.
        loss_fn: loss_fn(output, target) -> scalar, the mean over the examples.
        pass_task: whether the model takes the task as its second argument.
        tasks_per_pass: how many tasks' activations are in memory at a time; None: as many as fit into `memory_bytes`.
        memory_bytes: what activations may take then.
        chains: whether chains of linear layers go a way of their own on a CPU, see gem_fast/task_gradients/chain.py.

    Raises:
        ValueError: tasks_per_pass or memory_bytes is smaller than 1.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        *,
        pass_task: bool = False,
        tasks_per_pass: int | None = None,
        memory_bytes: int = MEMORY_BYTES,
        chains: bool = True,
    ) -> None:
        if tasks_per_pass is not None and tasks_per_pass < 1:
            raise ValueError(f"tasks_per_pass must be at least 1 task, got {tasks_per_pass}")
        if memory_bytes < 1:
            raise ValueError(f"memory_bytes must be at least 1 byte, got {memory_bytes}")
        # A compiled model is run as it was: compiled code has no layers to look into.
        self._model = getattr(model, "_orig_mod", model)
        self._loss_fn = loss_fn
        self._pass_task = pass_task
        self._tasks_per_pass = tasks_per_pass
        self._memory_bytes = memory_bytes
        self._chains = chains
        self._reference = LoopTaskGradients(self._model, loss_fn, pass_task=pass_task)
        self._loop = LoopTaskGradients(model, loss_fn, pass_task=pass_task)
        self._examples = ExampleCache(loss_fn)
        self._plan: Plan | None = None

    def __call__(
        self,
        constraints: Sequence[Sequence[Batch]],
        parameters: Sequence[Parameter],
        *,
        out: Tensor | None = None,
        rows: slice | None = None,
        sample: Sample | None = None,
    ) -> TaskRows:
        """Row k is the gradient of the mean loss over the examples of constraint k's batches (Eq. 5).

        Raises:
            ValueError: the loss is not a scalar.
        """
        G = new_rows(len(constraints), parameters) if out is None else out
        reason = None
        rows = slice(0, len(constraints)) if rows is None else rows
        if rows.stop - rows.start > 1 and _are_tasks(constraints):
            plan = self._current_plan(parameters)
            try:
                with _no_trace(plan):
                    if self._is_ready(plan, constraints):
                        with _undone_on_failure(plan), failures_as_reasons():
                            return TaskRows(G, self._rows(plan, constraints, G, rows, sample))
            except CannotVerify:
                pass
            except CannotFuse as error:
                reason = error
        result = self._loop(constraints, parameters, out=G, rows=rows, sample=sample)
        if reason is not None:  # and the loop has not failed the same way
            plan.given_up = True
            _log.warning("one backward per past task instead of one for all: %s", reason)
        return result

    def record(
        self, constraints: Sequence[Sequence[Batch]], parameters: Sequence[Parameter], *, sample: Sample | None = None
    ) -> tuple[Recorder, list[Tensor | None]]:
        """One forward and one backward for all constraints, from which any part of G can be formed.

        Returns:
            Where each parameter is used, and the gradients at the outputs of the layers.

        Raises:
            CannotFuse: the model cannot be handled in one pass.
            ValueError: the loss is not a scalar.
        """
        if any(len(batches) != 1 for batches in constraints):
            raise CannotFuse("a constraint has several batches")
        plan = self._current_plan(parameters)
        plan.find_units()
        with _no_trace(plan):
            # Gradients that are not finite are the caller's to report.
            with suppress(CannotVerify):
                self._verify_new(plan, constraints)
            # Sparse entries are prepared task by task, while parts of G may take several tasks together.
            pieces = [
                replace(piece, entries=None) for piece in self._pieces(constraints, slice(0, len(constraints)), sample)
            ]
            with _undone_on_failure(plan), failures_as_reasons():
                recorder, ends = self._forward(plan, pieces, 0, learning=False)
                grads = self._backward(recorder, ends, learning=False)
                recorder.check_unchanged()
                return recorder, grads

    def chain(
        self, constraints: Sequence[Sequence[Batch]], parameters: Sequence[Parameter], *, sample: Sample | None = None
    ) -> ChainPass | None:
        """One forward for all constraints through a chain of linear layers, from which any part of G can be formed.

        Returns:
            None where the model is more than that, or cannot be handled, or not all constraints are to go at a time.

        Raises:
            ValueError: the loss is not a scalar.
        """
        if not _are_tasks(constraints) or self._pass_task:
            return None
        plan = self._current_plan(parameters)
        try:
            with _no_trace(plan):
                if not self._is_ready(plan, constraints) or not plan.is_chain:
                    return None
                pieces = self._pieces(constraints, slice(0, len(constraints)), sample)
                if self._at_a_time(plan, pieces[0].segments.sizes) < len(constraints):
                    return None
                with _undone_on_failure(plan), failures_as_reasons():
                    found = self._chain_or_record(plan, pieces, 0, learning=False)
        except CannotFuse:
            return None  # whoever computes rows instead meets the reason again, and says it
        return found if isinstance(found, ChainPass) else None

    def _current_plan(self, parameters: Sequence[Parameter]) -> Plan:
        modules = list(self._model.modules())
        if self._plan is None or not self._plan.serves(modules, parameters):
            self._plan = Plan(modules, parameters)
        return self._plan

    def _is_chain(self, plan: Plan, x: Tensor) -> bool:
        return self._chains and not self._pass_task and goes_through(plan.layers, self._model, x)

    def _is_ready(self, plan: Plan, constraints: Sequence[Sequence[Batch]]) -> bool:
        """Whether the model goes in one pass, once all that is new to the plan is found out."""
        if not plan.given_up and not plan.units:
            plan.find_units()
            plan.given_up = self._tasks_per_pass is None and plan.is_faster_task_by_task()
        if plan.given_up:
            return False
        self._verify_new(plan, constraints)
        return True

    def _pieces(self, constraints: Sequence[Sequence[Batch]], rows: slice, sample: Sample | None) -> list[Piece]:
        if self._pass_task:
            return [_piece(batch) for [batch] in chosen(constraints, sample)[rows]]
        return [self._examples([batch for [batch] in constraints], sample, rows)]

    def _at_a_time(self, plan: Plan, sizes: list[int]) -> int:
        return self._tasks_per_pass or plan.tasks_per_pass(sizes, self._memory_bytes)

    def _rows(
        self, plan: Plan, constraints: Sequence[Sequence[Batch]], G: Tensor, rows: slice, sample: Sample | None
    ) -> list[bool]:
        pieces = self._pieces(constraints, rows, sample)
        sizes = [size for piece in pieces for size in piece.segments.sizes]
        step = self._at_a_time(plan, sizes)
        reached = [False] * len(plan.parameters)
        for first in range(0, len(sizes), step):
            some = slice(first, min(first + step, len(sizes)))
            mine = pieces[some] if self._pass_task else [piece.of_tasks(some) for piece in pieces]
            now = self._pass(plan, mine, rows.start + first, G, learning=False)
            reached = [was or is_now for was, is_now in zip(reached, now, strict=True)]
        return reached

    def _pass(self, plan: Plan, pieces: Sequence[Piece], first: int, G: Tensor, learning: bool) -> list[bool]:
        """Writes the pieces' rows of G, from `first` on."""
        rows = slice(first, first + sum(len(piece.segments.sizes) for piece in pieces))
        found = self._chain_or_record(plan, pieces, first, learning)
        plan.is_chain = isinstance(found, ChainPass)
        if isinstance(found, ChainPass):
            return found.write(plan.blocks(G[rows], plan.parameters))
        recorder, ends = found
        grads = self._backward(recorder, ends, learning)
        with torch.no_grad():
            return write_rows(recorder, grads, plan.parameters, G, rows)

    def _chain_or_record(
        self, plan: Plan, pieces: Sequence[Piece], first: int, learning: bool
    ) -> ChainPass | tuple[Recorder, list[End]]:
        """One forward per piece: through a chain, or what else was recorded."""
        if self._is_chain(plan, pieces[0].memory) and has_known_gradient(pieces[0]):
            [piece] = pieces
            return ChainPass.through(plan.layers, piece)
        recorder, ends = self._forward(plan, pieces, first, learning)
        found = find_chain(recorder.links, ends[0].output) if self._chains and len(ends) == 1 else None
        if found is None:
            return recorder, ends
        recorder.check_unchanged()
        return ChainPass.recorded(found, ends[0].gradient(), pieces[0].segments.sizes)

    def _forward(self, plan: Plan, pieces: Sequence[Piece], first: int, learning: bool) -> tuple[Recorder, list[End]]:
        """One forward per piece."""
        recorder = Recorder(plan.wanted, plan.dims, learning)
        ends = []
        row = first
        with recording(recorder, plan.units):
            for piece in pieces:
                recorder.begin(row, piece)
                version = piece.x._version
                output = self._model(piece.x, piece.task) if self._pass_task else self._model(piece.x)
                if not isinstance(output, Tensor):
                    raise CannotFuse(f"the model returns {type(output).__name__}, not a tensor")
                if piece.x._version != version:
                    raise CannotFuse("the model changes its input in place")
                ends.append(End.of(self._loss_fn, output, piece))
                row += len(piece.segments.sizes)
        plan.ambiguous = recorder.ambiguous
        return recorder, ends

    def _backward(self, recorder: Recorder, ends: Sequence[End], learning: bool) -> list[Tensor | None]:
        """One backward for all pieces, down to the outputs of the layers."""
        starts = [end.start for end in ends]
        known = [end.known for end in ends]
        grads = torch.autograd.grad(starts, recorder.edges, known, allow_unused=True, retain_graph=learning)
        if learning:
            check_every_use_is_known(recorder, grads, starts)
        recorder.forget_outputs()
        return list(grads)

    def _verify_new(self, plan: Plan, constraints: Sequence[Sequence[Batch]]) -> None:
        """Verifies two tasks, and for a model that takes the task two of which one is new, until none is."""
        # Tasks that go through the model together have inputs of one kind.
        is_chain = self._is_chain(plan, constraints[0][0].x)
        for k, [batch] in enumerate(constraints if self._pass_task else constraints[:1]):
            way = (batch.task if self._pass_task else None, min(2, len(constraints)), is_chain)
            if way in plan.verified:
                continue
            [other] = constraints[0 if k > 0 else -1]
            batches = [batch, other][: len(constraints)]
            self._verify_some(plan, batches)
            plan.verified.add(way)

    def _verify_some(self, plan: Plan, batches: Sequence[Batch]) -> None:
        """Verifies one batch per task, or one half of each: a ReLU that rounding flips is in one half only."""
        try:
            return self._verify_clearly(plan, batches)
        except RowsDiffer:
            if plan.parameters[0].dtype == torch.float64 or min(len(batch.x) for batch in batches) < 2:
                raise
            with suppress(RowsDiffer):
                return self._verify_clearly(plan, [_half(batch, 0) for batch in batches])
            with suppress(RowsDiffer):
                return self._verify_clearly(plan, [_half(batch, 1) for batch in batches])
            raise

    def _verify_clearly(self, plan: Plan, batches: Sequence[Batch]) -> None:
        try:
            self._verify(plan, [[batch] for batch in batches])
        except CannotFuse:
            first, *others = batches
            if not plan.ambiguous or len(first.x) < 2:
                raise
            # A dimension is as long as there are examples: with one example less, it is told apart.
            shorter = first._replace(x=first.x[:-1], y=first.y[:-1])
            self._verify(plan, [[batch] for batch in (shorter, *others)])

    def _verify(self, plan: Plan, constraints: Sequence[Sequence[Batch]]) -> None:
        if self._pass_task:
            pieces = [_piece(batch) for [batch] in constraints]
        else:
            pieces = [ExampleCache(self._loss_fn)([batch for [batch] in constraints], None, slice(0, len(constraints)))]

        def fused(rows: Tensor) -> list[bool]:
            with KeptBytes(plan.parameters) as kept:
                reached = self._pass(plan, pieces, 0, rows, learning=True)
            # Beside what is kept for the backward there are the gradients at the layers' outputs.
            own = sum(layer.out_features * layer.weight.element_size() for layer in plan.layers)
            plan.bytes_per_example = max(1, 2 * max(own, kept.total // sum(piece.segments.total for piece in pieces)))
            return reached

        def loop(rows: Tensor) -> list[bool]:
            return self._reference(constraints, plan.parameters, out=rows).reached

        verify(self._model, plan.parameters, len(constraints), fused, loop)


def _half(batch: Batch, which: int) -> Batch:
    middle = len(batch.x) // 2
    some = slice(middle, None) if which else slice(middle)
    return batch._replace(x=batch.x[some], y=batch.y[some])


def _piece(batch: Batch) -> Piece:
    return Piece(batch.x, batch.y, batch.task, Segments([len(batch.x)]))


def _are_tasks(constraints: Sequence[Sequence[Batch]]) -> bool:
    """Whether there are several, of one batch each: one row is one backward in any case, as are A-GEM's batches."""
    return len(constraints) > 1 and all(len(batches) == 1 for batches in constraints)


@contextmanager
def _no_trace(plan: Plan) -> Iterator[None]:
    with torch.random.fork_rng(random_devices(plan.parameters)), torch.enable_grad():
        yield


@contextmanager
def _undone_on_failure(plan: Plan) -> Iterator[None]:
    """Puts running statistics back as they were where a pass fails: the loop is then to start from there."""
    before = [(buffer, buffer.clone()) for buffer in plan.statistics()]
    try:
        yield
    except Exception:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        raise
