"""Averaged GEM: GEM with one constraint on all past tasks together."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gem_fast.hook import GEM
from gem_fast.sampling import sample_all
from gem_fast.task_gradients import Batch, Sample


class AGEM(GEM):
    """Averaged GEM (Chaudhry et al. 2019): one constraint, on the mean loss over a random batch of all past examples.

    With one constraint the projection has a closed form (their Eq. 11): where g . g_ref < 0,
    g~ = g - (g . g_ref / g_ref . g_ref) g_ref.

    Args:
        model: as for `GEM`.
        optimizer: as for `GEM`.
        memory_batch: number of past examples drawn, without replacement, for each step: of all tasks together.
        margin: lower bound on the multiplier when the constraint is violated; 0 is the published method.
        **options: the other options of `GEM`.

    Raises:
        TypeError, RuntimeError: as for `GEM`.
        ValueError: as for `GEM`, or refresh_every is not 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        memory_batch: int = 256,
        margin: float = 0.0,
        **options: Any,
    ) -> None:
        if options.get("refresh_every", 1) != 1:
            raise ValueError(
                f"refresh_every must be 1: the constraint is drawn anew for each step, got {options['refresh_every']}"
            )
        super().__init__(model, optimizer, memory_batch=memory_batch, margin=margin, **options)

    def _constraints(self, past: list[Hashable]) -> tuple[list[list[Batch]], Sample | None]:
        assert self.memory_batch is not None
        examples = [self.memory.examples(task) for task in past]
        drawn = sample_all([len(x) for x, _ in examples], self.memory_batch, self._generator)
        batches = [
            Batch(task, x[mine.to(x.device)], y[mine.to(y.device)])
            for task, (x, y), mine in zip(past, examples, drawn, strict=True)
            if len(mine)
        ]
        if not self._pass_task:
            # One forward for all of them, which for batch normalisation makes them one mini-batch.
            batches = [Batch(None, torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]))]
        return [batches], None
