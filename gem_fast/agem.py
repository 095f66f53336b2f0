"""Averaged GEM: GEM with one constraint on all past tasks together."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gem_fast.batches import DoNotFit, concatenate
from gem_fast.containers import Nest
from gem_fast.gem import GEM
from gem_fast.gradients import Batch, Constraint, Loop, Sample
from gem_fast.gradients.fused.descriptors import has_descriptors
from gem_fast.memory import Memory
from gem_fast.sampling import sample_all


class AGEM(GEM):
    """Averaged GEM (Chaudhry et al. 2019): one constraint, on the mean loss over a random batch of all past examples.

    With one constraint the projection has a closed form (their Eq. 11): where g . g_ref < 0,
    g~ = g - (g . g_ref / g_ref . g_ref) g_ref.

    Args:
        model: as for `GEM`.
        optimizer: as for `GEM`.
        loss_fn: as for `GEM`.
        memory: as for `GEM`.
        memory_batch: number of past examples drawn, without replacement, for each step: of all tasks together
            (`sample_size` in Avalanche).
        margin: lower bound on the multiplier when the constraint is violated; 0 is the published method.
        pass_task: as for `GEM`.
        forward: as for `GEM`.
        descriptors: as for `GEM`.
        seed: as for `GEM`.
        process_group: as for `GEM`; each process then draws from its own examples.
        check: as for `GEM`.

    Raises:
        TypeError, ValueError, RuntimeError: as for `GEM`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
        memory: Memory | None = None,
        memory_batch: int = 256,
        margin: float = 0.0,
        pass_task: bool | str | None = None,
        forward: Callable[..., Any] | None = None,
        descriptors: Mapping[Hashable, Nest] | None = None,
        seed: int = 0,
        process_group: "torch.distributed.ProcessGroup | None" = None,
        check: bool = False,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            loss_fn=loss_fn,
            memory=memory,
            margin=margin,
            memory_batch=memory_batch,
            engine=Loop(),
            pass_task=pass_task,
            forward=forward,
            descriptors=descriptors,
            seed=seed,
            process_group=process_group,
            check=check,
        )

    def constraints(self) -> tuple[list[Constraint], Sample | None]:
        """One, on the mean loss over examples drawn from all past tasks."""
        assert self.memory_batch is not None
        stored = self._stored_batches()
        if not stored:  # on several processes: another one has them all
            return [[]], None
        drawn = sample_all([batch.size for batch in stored], self.memory_batch, self.generators.cpu)
        batches = [batch.select(index) for batch, index in zip(stored, drawn, strict=True) if len(index)]
        return [batches if self.objective.pass_task or has_descriptors(batches) else _together(batches)], None

    def _constrained_tasks(self) -> list[list[Hashable]]:
        return [self.past_tasks]


def _together(batches: list[Batch]) -> list[Batch]:
    """One batch, for one forward, which for batch normalisation makes it one mini-batch; as they are if they differ."""
    pad = batches[0].pad
    try:
        x, y = (concatenate(name, [getattr(batch, name) for batch in batches], pad) for name in ("x", "y"))
    except DoNotFit:
        return batches
    return [Batch(None, x, y, pad)]
