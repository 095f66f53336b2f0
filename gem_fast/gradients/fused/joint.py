"""The current mini-batch in the same pass as the past tasks' examples: g beside G."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from gem_fast.containers import tensors
from gem_fast.gradients import cpu_mlp
from gem_fast.gradients.fused.descriptors import repeated
from gem_fast.gradients.fused.losses import is_plain_cross_entropy
from gem_fast.gradients.fused.model import FusedModel
from gem_fast.gradients.fused.recorder import CannotFuse, CannotVerify
from gem_fast.gradients.fused.task_batch import Inputs, TaskBatch, TaskSizes
from gem_fast.gradients.fused.verifier import Verifier, failures_as_reasons, random_states
from gem_fast.gradients.interface import Batch, Constraint, JointPass, Sample, is_captured, random_devices
from gem_fast.gradients.rows import RowGradients, by_parameter


class Joint:
    """Passes through one model that the current mini-batch takes part in, as the last task.

    There are none where something would not be as with a forward and backward of its own: the model draws random
    numbers, somebody looks into it, or a backward reaches more than the wanted parameters.

    Args:
        model: what goes through.
        verifier: what compares.

    Attributes:
        is_first: whether there has been no such pass yet.
    """

    def __init__(self, model: FusedModel, verifier: Verifier) -> None:
        self.is_first = True
        self._model = model
        self._verifier = verifier
        self._fails = False
        self._by_shortcut = 0

    def takes(self, current: Batch) -> bool:
        """Whether a pass may be tried."""
        return not (
            self._fails
            or self._model.call_per_task
            or any(isinstance(x, Tensor) and x.requires_grad for x in tensors(current.x))
            or self._model.has_other_gradients
        )

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Leaves a pass that cannot be as it should, and tries no other: the mini-batch has its own pass then."""
        try:
            yield
        except CannotVerify:  # the gradients of this step are not finite
            pass
        except CannotFuse:
            self._fails = True

    def mlp_batch(self, current: Batch) -> TaskBatch | None:
        """The mini-batch as `cpu_mlp` takes it; None where it does not."""
        model = self._model
        if not model.mlp_layers or model.parameters[0].device.type != "cpu":
            return None
        plain = is_plain_cross_entropy(model.objective.loss_fn, current.y)
        batch = TaskBatch(Inputs([current.x]), current.y, None, TaskSizes([current.size]), plain)
        return batch if model.is_mlp(batch) else None

    def by_shortcut(self, current: Batch, batch: TaskBatch) -> tuple[list[Tensor | None], Tensor] | None:
        """The gradients and the loss by a pass of `cpu_mlp` through the mini-batch alone; None where it fails."""
        plan = self._model.mlp_plan
        self._by_shortcut += 1
        if self._by_shortcut & (self._by_shortcut - 1):
            return cpu_mlp.alone_pass(plan, batch)
        with self.attempt(), failures_as_reasons():
            self._verifier.verify_alone(current, lambda: cpu_mlp.alone_pass(plan, batch)[0])
            return cpu_mlp.alone_pass(plan, batch)
        return None

    def batch(self, batches: Sequence[TaskBatch], current: Batch) -> TaskBatch | None:
        """The current mini-batch behind the others; None where that costs more than it saves."""
        [past] = batches
        # On a CPU a copy of the whole memory takes longer than a pass of the mini-batch's own.
        is_copied = past.positions is not None or self._model.parameters[0].device.type != "cpu"
        if not is_copied or past.entries is not None or (self._model.mlp_layers and past.plain_cross_entropy):
            return None
        return past.with_current(current.x, current.y, repeated(current.descriptor, current.size))

    def run(
        self,
        batch: TaskBatch,
        rows: RowGradients,
        constraints: Sequence[Constraint],
        sample: Sample | None,
        due: Sequence[int],
        current: Batch,
        shortcuts: bool,
    ) -> JointPass:
        """One pass, compared with the loop where that is due.

        Args:
            batch: see `batch`.
            rows: of all past tasks, and one for the mini-batch.
            constraints: as for `Engine.__call__`.
            sample: likewise.
            due: as for `Verifier.verified`, as is `current`.
            current: the mini-batch.
            shortcuts: as for `FusedModel.run`.

        Raises:
            CannotFuse: the pass is not the same as one of the mini-batch's own beside one of the past tasks.
        """
        parameters = self._model.parameters
        devices = random_devices(parameters)
        depends: list[bool] = []
        loss: Tensor = parameters[0]

        def run() -> Tensor:
            nonlocal depends, loss
            before = random_states(devices)
            done, loss = self._model.run_with_current(batch, shortcuts=shortcuts)
            if not is_captured(parameters) and not all(map(torch.equal, random_states(devices), before)):
                raise CannotFuse("the model draws random numbers")
            G = rows.with_current
            done.write(G, parameters)
            depends = done.depends(parameters)
            return G

        if due:
            G = self._verifier.verified(run, constraints, sample, slice(0, len(constraints)), due, current)
        else:
            G = run()
        rows.computed(depends)
        self.is_first = False
        return JointPass(rows, _copies(G[-1:], parameters, depends), loss)


def _copies(row: Tensor, parameters: Sequence[Parameter], depends: Sequence[bool]) -> list[Tensor | None]:
    """Tensors like the parameters with the numbers of a row (1, p); None where the loss does not depend on one."""
    parts = by_parameter(row, parameters)
    copies = [torch.empty_like(p) if used else None for p, used in zip(parameters, depends, strict=True)]
    used = [(copy, part.view_as(copy)) for copy, part in zip(copies, parts, strict=True) if copy is not None]
    torch._foreach_copy_([copy for copy, _ in used], [part for _, part in used])
    return copies
