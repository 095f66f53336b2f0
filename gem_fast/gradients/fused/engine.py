"""The engine that takes all past tasks through the model at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch.nn import Parameter

from gem_fast.gradients import cpu_mlp
from gem_fast.gradients.fused.comparison import RowsDiffer
from gem_fast.gradients.fused.descriptors import has_descriptors
from gem_fast.gradients.fused.joint import Joint
from gem_fast.gradients.fused.model import FusedModel, LayerPass
from gem_fast.gradients.fused.options import Form, Options
from gem_fast.gradients.fused.recorder import CannotFuse, CannotVerify
from gem_fast.gradients.fused.schedule import Schedule
from gem_fast.gradients.fused.task_batch import TaskBatch
from gem_fast.gradients.fused.task_batches import TaskBatches
from gem_fast.gradients.fused.verifier import Verifier, failures_as_reasons
from gem_fast.gradients.interface import (
    Batch,
    Constraint,
    JointPass,
    Objective,
    Sample,
    TaskGradients,
    is_captured,
    random_devices,
)
from gem_fast.gradients.layerwise import layerwise
from gem_fast.gradients.loop import RowEngine, fill_rows
from gem_fast.gradients.restore import buffers_restored
from gem_fast.state import check_keys
from gem_fast.wrappers import uncompiled

_log = logging.getLogger("gem_fast")
_LEFT = "one backward per past task instead of one for all: %s"


class Fused(RowEngine):
    """Computes all past tasks' gradients in one forward and one backward over the concatenated memories.

    Autograd computes the gradients at the outputs of the layers only; from each, and from the layer's input, a rule per
    type of layer forms the weight's gradient of every task (`gem_fast.register_rule` adds one). Modules without a rule,
    and those that look at a mini-batch as a whole (batch normalisation), run once per task.

    The first pass through a model, and each one that is of a new kind, is compared with one backward per task (`Loop`)
    on two tasks. From then on some rows of a pass are compared before they are used: those of tasks that have joined
    the past, together with one other, and one in pass 1, 2, 4, 8 and so on. On a GPU such a pass waits for the result;
    one that is captured as a CUDA graph is not compared. A model that cannot be handled, or whose gradients differ, is
    left to the loop, from that very step on; a line in the log "gem_fast" names the reason. So is a convolutional net
    on a CPU, where the loop is as fast or faster, unless `tasks_per_pass` is given.

    Args:
        form: what G is kept as. "rows" is a matrix of t rows. "layerwise" never has t rows in memory: G's products
            follow layer by layer from the inputs and output gradients of all layers, for all examples of all past tasks
            at once; whole are only the gradients of modules without a rule (batch normalisation, recurrent layers,
            custom modules), and those of grouped and transposed convolutions, one parameter at a time. "auto" takes
            rows, but layerwise where t rows would take more than `row_bytes`.
        refresh_every: r, the number of steps in which each row of G is computed anew once, in turns; 1 is exact.
        tasks_per_pass: how many tasks' activations are in memory at a time; None: as many as fit in `activation_bytes`.
        activation_bytes: what the activations of a pass may take, in bytes; default 1 GiB. "layerwise" needs them all.
        row_bytes: what t rows may take before "auto" goes layerwise, in bytes; default 2 GiB.
        shortcuts: whether the passes of `cpu_mlp` are taken on a CPU (docs/architecture.md); the result is the same.

    Raises:
        ValueError: an option is out of range, or given beside one that it excludes: "layerwise" has no rows to refresh
            and takes all tasks in one pass.
    """

    def __init__(
        self,
        *,
        form: Form = "auto",
        refresh_every: int = 1,
        tasks_per_pass: int | None = None,
        activation_bytes: int = 2**30,
        row_bytes: int = 2**31,
        shortcuts: bool = True,
    ) -> None:
        self._options = Options(form, refresh_every, tasks_per_pass, activation_bytes, row_bytes, shortcuts)
        super().__init__(refresh_every)
        self._batches = TaskBatches()
        self._call_per_task = False  # because the model takes descriptors of one task only in a call
        self._model: FusedModel | None = None
        self._verifier: Verifier | None = None
        self._joint: Joint | None = None
        self._known: Literal["memory", "sample"] | None = None  # what the last pass took, where `cpu_mlp` did it all
        self._schedule = Schedule()
        self._reason: str | None = None  # why the model is left to the loop
        self._has_said_several = False

    def __call__(
        self,
        objective: Objective,
        constraints: Sequence[Constraint],
        parameters: Sequence[Parameter],
        sample: Sample | None = None,
    ) -> TaskGradients:
        """As `Engine.__call__`.

        Raises:
            ValueError: the loss is not a scalar.
            RuntimeError: form is "layerwise", and the model cannot be handled in one pass.
        """
        model, verifier = self._current(objective, constraints, parameters)
        return self._task_gradients(model, verifier, objective, constraints, parameters, sample)

    def _task_gradients(
        self,
        model: FusedModel,
        verifier: Verifier,
        objective: Objective,
        constraints: Sequence[Constraint],
        parameters: Sequence[Parameter],
        sample: Sample | None,
    ) -> TaskGradients:
        reason: CannotFuse | None = None
        try:
            known = self._known_batch(model, constraints, sample)
            if known is not None:
                return self._of_known(model, verifier, known, constraints)
        except CannotFuse as error:
            reason = error
        rows, tasks, t = self._rows, [batches[0].task for batches in constraints], len(constraints)
        is_layerwise = self._options.is_layerwise(t, parameters)
        if not is_layerwise:
            rows.begin_step(tasks, parameters)
        stale = slice(0, t) if is_layerwise else rows.stale
        # One task is one backward in any case, but for shortcuts that need none.
        fewest = 1 if self._options.shortcuts and model.mlp_layers else 2
        if reason is not None:
            pass  # a pass of a known kind has failed
        elif set(map(len, constraints)) != {1}:
            reason = CannotVerify("a constraint has several batches")
            if t > 1 and not self._has_said_several:
                self._has_said_several = True
                _log.warning(_LEFT, reason)
        elif stale.stop - stale.start >= fewest or is_layerwise:
            try:
                G = self._with_descriptors(
                    model, verifier, objective, constraints, parameters, sample, stale, is_layerwise
                )
                if G is not None:
                    return G
            except CannotFuse as error:
                reason = error
        if self._options.form == "layerwise":
            raise RuntimeError(
                f'form="layerwise" takes a model that one pass can handle, got one where {reason or self._reason}; '
                'take "rows"'
            ) from reason
        is_given_up = reason is not None and not isinstance(reason, CannotVerify) and t > 1
        if is_layerwise or is_given_up:
            # Rows that earlier passes have left are not to be trusted, either.
            rows.begin_step(tasks, parameters, anew=is_given_up)
        rows.computed(fill_rows(objective, constraints, parameters, rows.G, rows.stale, sample))
        if is_given_up:  # and the loop has not failed, too
            self._leave_to_the_loop(str(reason))
        return rows

    def with_current(
        self,
        objective: Objective,
        current: Batch,
        constraints: Sequence[Constraint],
        parameters: Sequence[Parameter],
        sample: Sample | None = None,
        margins: tuple[float, float] | None = None,
    ) -> JointPass | None:
        """As `Engine.with_current`."""
        model, verifier = self._current(objective, constraints, parameters)
        assert self._joint is not None
        is_own = type(self).__call__ is not Fused.__call__  # of a subclass, which may make something else of G
        if is_own or self._reason is not None or not self._joint.takes(current):
            return None
        if self._options.shortcuts:
            batch = self._joint.mlp_batch(current)
            if batch is not None:
                if margins is not None and sample is not None:
                    known = self._known_batch(model, constraints, sample)
                    if known is not None:
                        plan = model.sample_plan(known)
                        assert plan is not None
                        return cpu_mlp.step_pass(plan, known, batch, *margins)
                alone = self._joint.by_shortcut(current, batch)
                if alone is not None:
                    G = self._task_gradients(model, verifier, objective, constraints, parameters, sample)
                    return JointPass(G, *alone)
        t = len(constraints)
        if (
            self._options.refresh_every > 1
            or self._options.is_layerwise(t, parameters)
            or any(len(batches) != 1 for batches in constraints)
            or (self._options.tasks_per_pass is None and model.is_faster_one_by_one())
        ):
            return None
        every = slice(0, t)
        with self._joint.attempt(), torch.random.fork_rng(random_devices(parameters)), torch.enable_grad():
            batches = self._batches(model, constraints, sample, every)
            joint = self._joint.batch(batches, current)
            is_new = verifier.verify_new(constraints, shortcuts=self._options.shortcuts, is_mlp=False)
            if joint is None or self._options.tasks_at_once(joint.tasks.sizes, verifier.bytes_per_example) < t:
                return None
            tasks = [batch.task for [batch] in constraints]
            self._rows.begin_step(tasks, parameters, with_current=True)
            is_first = is_new or self._joint.is_first
            due = [] if is_captured(parameters) else self._schedule.due(tasks, is_new=is_first)
            with buffers_restored(model.stateful(), only_on_failure=True), failures_as_reasons():
                done = self._joint.run(joint, self._rows, constraints, sample, due, current, self._options.shortcuts)
            self._schedule.passed(tasks, due)
            return done
        return None

    def _known_batch(
        self, model: FusedModel, constraints: Sequence[Constraint], sample: Sample | None
    ) -> TaskBatch | None:
        """The examples that count, where `cpu_mlp` takes them in a pass of a kind that was compared; it counts as made.

        None where it is of no such kind, or a comparison is due. Such a pass draws no random numbers and leaves no
        trace in the model.
        """
        if self._reason is not None or self._known != ("memory" if sample is None else "sample"):
            return None
        batch = self._batches.again(constraints, sample)
        if batch is None and sample is not None and self._options.needs_no_rows(constraints, model.parameters):
            [batch] = self._batches(model, constraints, sample, slice(0, len(constraints)))
        if batch is None or (sample is not None and model.sample_plan(batch) is None):
            return None
        tasks = [batches[0].task for batches in constraints]
        if self._schedule.due(tasks, is_new=False):
            return None
        self._schedule.passed(tasks, [])
        return batch

    def _of_known(
        self, model: FusedModel, verifier: Verifier, batch: TaskBatch, constraints: Sequence[Constraint]
    ) -> TaskGradients:
        with failures_as_reasons():
            plan = model.sample_plan(batch)
            if plan is not None:
                return cpu_mlp.ExampleGradients(plan, batch)
            self._rows.begin_step([batches[0].task for batches in constraints], model.parameters)
            every = slice(0, len(constraints))
            return self._rows_of_passes(
                model, [batch], every, shortcuts=True, bytes_per_example=verifier.bytes_per_example
            )

    def state_dict(self) -> dict[str, Any]:
        """The rows that the next step does not compute anew, which comparisons there were, and what they have found."""
        return {
            **super().state_dict(),
            "schedule": self._schedule.state_dict(),
            "reason": self._reason,
            "call_per_task": self._call_per_task,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Engine.load_state_dict`: a model that was left to the loop still is."""
        check_keys("engine", state, ("rows", "schedule", "reason", "call_per_task"))
        if not isinstance(state["reason"], str | None):
            raise ValueError(f"reason of the state must be a string or None, got {type(state['reason']).__name__}")
        if not isinstance(state["call_per_task"], bool):
            raise ValueError(f"call_per_task must be a bool, got {type(state['call_per_task']).__name__}")
        schedule = Schedule.from_state(state["schedule"])
        super().load_state_dict({"rows": state["rows"]})
        self._schedule, self._reason = schedule, state["reason"]
        self._call_per_task = state["call_per_task"]

    def _leave_to_the_loop(self, reason: str) -> None:
        self._reason = reason
        _log.warning(_LEFT, reason)

    def _with_unchecked(self, error: RowsDiffer) -> str:
        passes = self._schedule.unchecked + 1
        return f"{error}; the last comparison, {passes} passes ago, found no difference" if passes > 1 else str(error)

    def _with_descriptors(
        self,
        model: FusedModel,
        verifier: Verifier,
        objective: Objective,
        constraints: Sequence[Constraint],
        parameters: Sequence[Parameter],
        *args: Any,
    ) -> TaskGradients | None:
        """As `_fused`, in one call of the model where it takes many descriptors in one, else in a call per task."""
        try:
            return self._fused(model, verifier, constraints, parameters, *args)
        except CannotVerify:
            raise
        except CannotFuse:
            if model.call_per_task or not has_descriptors(batch for [batch] in constraints):
                raise
            self._call_per_task = True
            model, verifier = self._current(objective, constraints, parameters)
            return self._fused(model, verifier, constraints, parameters, *args)

    def _fused(
        self,
        model: FusedModel,
        verifier: Verifier,
        constraints: Sequence[Constraint],
        parameters: Sequence[Parameter],
        sample: Sample | None,
        stale: slice,
        is_layerwise: bool,
    ) -> TaskGradients | None:
        """G by one pass, or by a few where not all activations fit; None where the loop is as fast."""
        may_be_slower = not is_layerwise and self._options.tasks_per_pass is None
        if self._reason is not None or (may_be_slower and model.is_faster_one_by_one()):
            return None
        shortcuts = self._options.shortcuts and not is_layerwise
        tasks = [batch.task for [batch] in constraints[stale]]
        with torch.random.fork_rng(random_devices(parameters)), torch.enable_grad():
            batches = self._batches(model, constraints, sample, stale)
            is_new = is_mlp = False
            try:
                is_mlp = shortcuts and not model.call_per_task and model.is_mlp(batches[0])
                if len(tasks) == 1 and not (is_mlp or is_layerwise):
                    return None
                is_new = verifier.verify_new(constraints, shortcuts=shortcuts, is_mlp=is_mlp)
            except CannotVerify:
                if not is_layerwise:  # else what is not finite is found in P and q
                    raise

            plan = (
                model.sample_plan(batches[0])
                if is_mlp and self._options.needs_no_rows(constraints, parameters)
                else None
            )

            def run() -> TaskGradients:
                if plan is not None:
                    return cpu_mlp.ExampleGradients(plan, batches[0])
                if is_layerwise:
                    done = model.run(batches, shortcuts=shortcuts)
                    assert isinstance(done, LayerPass)
                    return layerwise(done.contributions, parameters, len(constraints))
                return self._rows_of_passes(model, batches, stale, shortcuts, verifier.bytes_per_example)

            # Where a pass fails, the loop is to start from the running statistics of before.
            with buffers_restored(model.stateful(), only_on_failure=True), failures_as_reasons():
                due = [] if is_captured(parameters) else self._schedule.due(tasks, is_new=is_new)
                if not due:
                    G = run()
                else:
                    try:
                        G = verifier.verified(run, constraints, sample, stale, due)
                    except CannotVerify:
                        if not is_layerwise:
                            raise
                        return run()
                    except RowsDiffer as error:
                        raise RowsDiffer(self._with_unchecked(error)) from error
                self._schedule.passed(tasks, due)
                self._known = None
                if is_mlp and self._options.refresh_every == 1 and (sample is None or plan is not None):
                    self._known = "memory" if sample is None else "sample"
                return G

    def _rows_of_passes(
        self, model: FusedModel, batches: list[TaskBatch], stale: slice, shortcuts: bool, bytes_per_example: int
    ) -> TaskGradients:
        """The stale rows, by as many passes as the activations need."""
        rows, call_per_task = self._rows, model.call_per_task
        sizes = [size for batch in batches for size in batch.tasks.sizes]
        step = self._options.tasks_at_once(sizes, bytes_per_example)
        t = len(rows.G)
        for first in range(stale.start, stale.stop, step):
            last = min(first + step, stale.stop)
            some = slice(first - stale.start, last - stale.start)
            done = model.run(batches[some] if call_per_task else [batches[0].of_tasks(some)], shortcuts=shortcuts)
            done.write(rows.G if last - first == t else rows.G[first:last], model.parameters)
            rows.computed(done.depends(model.parameters))
        return rows

    def _current(
        self, objective: Objective, constraints: Sequence[Constraint], parameters: Sequence[Parameter]
    ) -> tuple[FusedModel, Verifier]:
        call_per_task = False
        if objective.pass_task or self._call_per_task:
            batches = [batch for batches in constraints for batch in batches]
            call_per_task = objective.takes_id(batches) or (self._call_per_task and has_descriptors(batches))
        # A compiled model is run as it was: compiled code has no layers to look into.
        original = uncompiled(objective.model)
        objective = objective if original is objective.model else replace(objective, model=original)
        serves = self._model is not None and self._model.serves(objective, parameters)
        if self._model is None or self._verifier is None or not serves or call_per_task != self._model.call_per_task:
            if self._model is None:
                if self._reason is not None:  # in the run that is resumed
                    self._leave_to_the_loop(self._reason)
            else:
                # What another model did, or this one where it was not to be trusted, says nothing about this pass.
                if self._reason is not None or objective.model is not self._model.objective.model:
                    self._schedule = Schedule()
                self._reason = None
            self._model = FusedModel(objective, parameters, call_per_task=call_per_task)
            self._verifier = Verifier(self._model)
            self._known = None
            self._joint = Joint(self._model, self._verifier)
        return self._model, self._verifier
