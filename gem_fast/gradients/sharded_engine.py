"""Computes G on several processes: by an engine on each rank, or with all ranks in step where a pass communicates."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.batches import select, size_of
from gem_fast.containers import tensors
from gem_fast.distributed import Agreement, Ranks, communicates
from gem_fast.gradients.interface import Batch, Constraint, Engine, Objective, Sample, random_devices
from gem_fast.gradients.loop import Loop, RowEngine
from gem_fast.gradients.restore import grads_set_aside
from gem_fast.gradients.rows import RowGradients
from gem_fast.gradients.sharded import ColumnShare, LocalShards, ShardedGradients, columns_of, local_tensors
from gem_fast.hook.descriptors import Descriptors
from gem_fast.memory import Memory
from gem_fast.ops import pack_

_log = logging.getLogger("gem_fast")


class ShardedEngine:
    """Computes the gradients of all ranks' examples, from what each rank has of its own.

    The engine computes the rows of this rank's examples, as in one process. Where a pass through the model communicates
    (sharded parameters, synchronised batch normalisation) all ranks take part in one backward per past task instead, in
    the same order, those without examples of it, too.

    Args:
        engine: what computes the rows.
        ranks: the processes.
        model: as the passes call it.

    Attributes:
        agreement: on the tasks.

    Raises:
        ValueError: a pass through the model communicates, and the engine is none of the library's, or layerwise.
    """

    def __init__(self, engine: Engine, ranks: Ranks, model: nn.Module) -> None:
        self._together = ranks.shards or communicates(model)
        self.agreement = Agreement(ranks, at_once=self._together)
        self._engine = engine
        self._ranks = ranks
        self._share = ColumnShare(ranks)
        self._memory: Memory | None = None
        self._descriptors: Descriptors | None = None
        self._weights = torch.empty(0)
        self._shards: tuple[list[Parameter], list[Parameter]] = ([], [])
        if self._together and (not isinstance(engine, RowEngine) or getattr(engine, "_form", None) == "layerwise"):
            raise ValueError(
                "engine must keep G as rows where a pass through the model communicates (sharded parameters, "
                f"SyncBatchNorm), got {type(engine).__name__}"
            )
        if self._together and not isinstance(engine, Loop):
            _log.info("one backward per past task instead of one for all: a pass through the model communicates")

    def begin_step(self, memory: Memory, current: Hashable, descriptors: Descriptors) -> None:
        """Says what this rank has; see `Agreement.begin_step`."""
        self._memory = memory
        counts = {task: 0 if task == current else size_of(memory.examples(task)[0]) for task in memory.tasks}
        self._descriptors = descriptors
        self.agreement.begin_step(counts, current, descriptors)

    def reset(self, *, keep_rows: bool) -> None:
        """Forgets what was agreed, and what other ranks have sent.

        Args:
            keep_rows: whether the engine's rows are of the examples that this rank has now.
        """
        self.agreement.reset()
        self._share.reset()
        self._weights = torch.empty(0)
        if not keep_rows and isinstance(self._engine, RowEngine):
            self._engine.forget_rows()

    def __call__(
        self,
        objective: Objective,
        constraints: Sequence[Constraint],
        parameters: Sequence[Parameter],
        sample: Sample | None,
        tasks: Sequence[Sequence[Hashable]],
    ) -> ShardedGradients:
        """G of all ranks.

        Args:
            objective: as for `Engine.__call__`, as all that follow.
            constraints: of this rank's examples; one that has none here is empty.
            parameters: whose gradients make up a row.
            sample: which examples count.
            tasks: of each constraint the tasks that it is about.

        Raises:
            RuntimeError: a rank lacks examples that a pass needs of it; or as for `Agreement.confirm`.
        """
        present = [k for k, batches in enumerate(constraints) if _count(batches)]
        weights = torch.tensor([self.agreement.share(mine) for mine in tasks], dtype=torch.float64)
        local = [constraints[k] for k in present]
        sample = sample and Sample(sample.positions, [sample.sizes[k] for k in present])
        if self._together:
            sampled = iter(local if sample is None else sample.of(local))
            mine = [next(sampled) if k in present else [] for k in range(len(constraints))]
            return self._all_together(objective, mine, parameters, tasks, weights)
        G = self._engine(objective, local, parameters, sample) if local else None
        self.agreement.confirm()
        p = sum(parameter.numel() for parameter in parameters)
        stale = self._stale(G, tasks, p)
        some = slice(stale.start, stale.stop)
        if G is None:
            columns, depends = iter([parameters[0].new_empty(0, p)]), [False] * len(parameters)
        else:
            columns, depends = columns_of(G, len(local), parameters), G.depends
        if len(stale) < len(constraints):
            columns, present = (block[some] for block in columns), list(stale)
        self._keep_weights(weights, stale)
        self._share.exchange(columns, parameters, present, self._weights, some)
        return ShardedGradients(self._share, self._weights, depends, self._ranks)

    def _stale(self, G: object, tasks: Sequence[Sequence[Hashable]], p: int) -> range:
        """The rows to be exchanged, the same on all ranks: those computed anew where all ranks compute the same."""
        t = len(tasks)
        refresh_every = self._engine.rows.refresh_every if isinstance(self._engine, RowEngine) else 1
        if refresh_every == 1 or not self._share.holds(t, p) or any(map(self.agreement.ranks_without, tasks)):
            return range(t)
        assert isinstance(G, RowGradients)
        return range(G.stale.start, G.stale.stop)

    def _keep_weights(self, weights: Tensor, stale: range) -> None:
        """Rows keep the weights that they were exchanged with."""
        if len(self._weights) != len(weights):
            self._weights = weights.to(self._ranks.device)
        else:
            some = slice(stale.start, stale.stop)
            self._weights[some] = weights[some].to(self._ranks.device)

    # ---- where a pass communicates -----------------------------------------------------------------------------------

    def _all_together(
        self,
        objective: Objective,
        constraints: Sequence[Constraint],
        parameters: Sequence[Parameter],
        tasks: Sequence[Sequence[Hashable]],
        weights: Tensor,
    ) -> ShardedGradients:
        self._check_all_can(tasks)
        assert isinstance(self._engine, RowEngine)
        rows = self._engine.rows
        own = self._own(parameters)
        rows.begin_step([mine[0] if len(mine) == 1 else None for mine in tasks], own)
        some = range(rows.stale.start, rows.stale.stop)
        depends = [False] * len(parameters)
        with torch.random.fork_rng(random_devices(parameters)), torch.enable_grad():
            for k in some:
                loss = self._weighted_loss(objective, constraints, k, tasks[k], float(weights[k]))
                grads = self._gradients(objective.model, loss, parameters)
                pack_(rows.G[k], grads, [x.numel() for x in own])
                depends = [either or grad is not None for either, grad in zip(depends, grads, strict=True)]
        rows.computed(depends)
        self._keep_weights(weights, some)
        if self._ranks.shards:
            if not any(rows.depends):
                raise RuntimeError(
                    "the pass over the memory must leave gradients, got none; call set_requires_gradient_sync(True) "
                    "before the last backward of a step"
                )
            return ShardedGradients(LocalShards(rows.G), self._weights, rows.depends, self._ranks)
        # The losses had the weights already.
        ones = torch.ones_like(self._weights)
        self._share.exchange([rows.G[rows.stale]], parameters, list(some), ones, rows.stale)
        return ShardedGradients(self._share, self._weights, rows.depends, self._ranks)

    def _weighted_loss(
        self, objective: Objective, constraints: Sequence[Constraint], k: int, tasks: Sequence[Hashable], weight: float
    ) -> Tensor:
        """The loss whose gradients, added up over the ranks, are those of the mean over all examples."""
        if self._ranks.shards:
            weight *= self._ranks.size  # the sharded model's backward takes the mean over the ranks
        batches = constraints[k]
        n = _count(batches)
        assert self._descriptors is not None
        if objective.pass_task or any(self._descriptors.of(task) is not None for task in tasks):
            by_task = {batch.task: batch for batch in batches}
            calls = [(task, by_task.get(task)) for task in tasks]
        else:
            calls = [(batch.task, batch) for batch in batches] if n else [(None, None)]
        losses = []
        for task, batch in calls:
            if batch is not None and _count([batch]):
                losses.append(objective.loss(batch) * (weight * _count([batch]) / n))
            else:
                # Any example will do: what counts is that this rank takes part.
                assert self._memory is not None
                x, _ = self._memory.examples(self._memory.tasks[0])
                output = objective.output(select(x, slice(0, 1)), task, self._descriptors.of(task))
                losses.append(sum(x.sum() for x in tensors(output) if x.requires_grad) * 0)
        return torch.stack(losses).sum()

    def _gradients(self, model: nn.Module, loss: Tensor, parameters: Sequence[Parameter]) -> Sequence[Tensor | None]:
        if not self._ranks.shards:
            return torch.autograd.grad(loss, parameters, allow_unused=True)
        # The gradients of shards are there after a backward only, in `.grad`.
        with grads_set_aside({*model.parameters(), *parameters}):
            loss.backward()
            return [None if p.grad is None else local_tensors([p.grad])[0] for p in parameters]

    def _own(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """What the rows are made of: the parameters, or this rank's shards of them, the same objects in each step."""
        if not self._ranks.shards:
            return list(parameters)
        known, _ = self._shards
        if len(known) != len(parameters) or any(p is not q for p, q in zip(parameters, known, strict=True)):
            self._shards = list(parameters), cast(list[Parameter], local_tensors(parameters))
        return self._shards[1]

    def _check_all_can(self, tasks: Sequence[Sequence[Hashable]]) -> None:
        """Raises, on all ranks, where one has nothing to pass through the model."""
        if not self._ranks.shards:
            for mine in tasks:
                for rank in self.agreement.ranks_without(mine):
                    raise RuntimeError(
                        "with SyncBatchNorm all ranks must have examples of all past tasks, got none of task "
                        f"{mine[0]!r:.50} on rank {rank}"
                    )
        for rank in self.agreement.ranks_without_any():
            raise RuntimeError(
                f"with sharded parameters all ranks must have examples of some task, got none on rank {rank}"
            )


def _count(batches: Sequence[Batch]) -> int:
    return sum(batch.size for batch in batches)
