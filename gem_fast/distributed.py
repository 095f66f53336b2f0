"""Several processes that train one model: who they are, and what they agree on before each step.

Every rank keeps the examples that it observed. A past task's gradient is that of the mean loss over the examples of all
ranks, so the ranks need the same tasks in the same order (`Agreement`); `gradients/sharded.py` exchanges the rest.
"""

import gc
import logging
import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from gem_fast.hook.descriptors import Descriptors

_log = logging.getLogger("gem_fast")

_REFUSED = "model must be sharded by torch.distributed.fsdp.fully_shard, got one wrapped in FullyShardedDataParallel"


class Ranks:
    """The processes that train one model.

    Args:
        groups: process groups, one after the other over which a sum is one over all ranks: one, or one per dimension
            of a device mesh.
        device: where the tensors are that the ranks exchange.
        shards: whether the parameters are sharded (DTensor), over the last of the groups, and not replicated.

    Attributes:
        size: the number of ranks.
        rank: the number of this one.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup], device: torch.device, *, shards: bool = False) -> None:
        self.groups = list(groups)
        self.device = device
        self.shards = shards
        self.size, self.rank = 1, 0
        for group in groups:
            self.rank = self.rank * group.size() + group.rank()
            self.size *= group.size()

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that share out the columns of G among them."""
        return self.groups[-1]

    def sum_(self, x: Tensor) -> None:
        """Adds up a tensor over all ranks, in place; the bits are the same on all of them."""
        for group in self.groups:
            dist.all_reduce(x, group=group)

    def sum_columns_(self, x: Tensor, columns: slice) -> None:
        """Adds up x (n,) over all ranks, in place, but entries `columns` over the ranks that share out columns only."""
        dist.all_reduce(x, group=self.group)
        if len(self.groups) > 1:
            rest = x[columns.stop :]
            for group in self.groups[:-1]:
                dist.all_reduce(rest, group=group)

    def gather(self, value: Any) -> list[Any]:
        """A Python value of every rank, in the order of the ranks."""
        values = [value]
        for group in reversed(self.groups):
            parts: list[Any] = [None] * group.size()
            dist.all_gather_object(parts, values, group=group)
            values = [value for part in parts for value in part]
        return values


class Agreement:
    """Which tasks have examples, on all ranks together, and in which order.

    The ranks agree, by gathering what each of them knows, in the step in which a task becomes the current one. In each
    step they make sure that none of them knows of a change that the others have not seen: a single number is added up
    over all ranks, while the pass over the memory runs.

    Args:
        ranks: who agrees.
        at_once: whether the number must be there before the pass, because the pass communicates itself.
    """

    def __init__(self, ranks: Ranks, *, at_once: bool) -> None:
        self._ranks = ranks
        self._at_once = at_once
        self._is_agreed = False
        self._current: Hashable = None
        self._order: list[Hashable] = []  # in which the tasks came
        self._of_all: list[dict[Hashable, int]] = []
        self._totals: dict[Hashable, int] = {}
        self._mine: Mapping[Hashable, int] = {}
        self._changes: _Sum | None = None
        self._error: RuntimeError | None = None

    def tasks(self, held: Sequence[Hashable] = ()) -> list[Hashable]:
        """The tasks that any rank has examples of, in the order agreed on; then those of `held` that are not agreed."""
        return [*self._totals, *(task for task in held if task not in self._order)]

    def begin_step(self, mine: Mapping[Hashable, int], current: Hashable, descriptors: Descriptors) -> None:
        """Starts a step.

        Args:
            mine: the number of examples that this rank's memory has of each task, in their order;
                0 of the current one.
            current: the task that is not to be protected.
            descriptors: of the tasks, as far as this rank knows them; takes up those that other ranks know.

        Raises:
            RuntimeError: another rank has another current task or another descriptor of a task, or a task came to some
                of the ranks only.
        """
        agreed = self._of_all[self._ranks.rank] if self._is_agreed else {}
        changed = not self._is_agreed or current != self._current
        changed = changed or any((n > 0) != (agreed.get(task, 0) > 0) for task, n in mine.items())
        self._error = None
        self._mine = mine
        self._changes = _Sum(changed, self._ranks)
        self._proposal = current
        self._descriptors = descriptors
        if changed or self._at_once or not any(task != current for task in self._totals):  # no pass to wait for
            self.confirm()

    def confirm(self) -> None:
        """Waits until it is known that no other rank had a change; called before the ranks exchange gradients.

        Raises:
            RuntimeError: as for `begin_step`.
        """
        if self._error is not None:  # where a pass that failed is tried again
            raise self._error
        if self._changes is None:
            return
        changes, self._changes = self._changes.value(), None
        if not changes:
            return
        known = self._ranks.gather((self._proposal, dict(self._mine), self._descriptors.on_cpu()))
        currents = [current for current, _, _ in known]
        if any(current != currents[0] for current in currents):
            self._error = RuntimeError(
                f"the current task must be the same on all ranks, got {currents} of the ranks in order"
            )
        elif changes < self._ranks.size:
            self._error = RuntimeError(
                f"a task must come to all ranks in the same step, got tasks {[list(mine) for _, mine, _ in known]} of "
                "the ranks in order; on ranks without examples of it set gem.current_task"
            )
        else:
            try:
                self._descriptors.take(self._descriptors.merged([theirs for _, _, theirs in known], "on all ranks"))
            except ValueError as error:
                self._error = RuntimeError(str(error))
        if self._error is not None:
            raise self._error
        self._is_agreed, self._current = True, self._proposal
        self._of_all = [mine for _, mine, _ in known]
        self._order += [
            task for task in dict.fromkeys(k for mine in self._of_all for k in mine) if task not in self._order
        ]
        totals = {task: sum(mine.get(task, 0) for mine in self._of_all) for task in self._order}
        self._totals = {task: total for task, total in totals.items() if total}

    def share(self, tasks: Sequence[Hashable]) -> float:
        """What part of the examples of these tasks, as many as there were when the ranks agreed, this rank has now."""
        return sum(self._mine.get(task, 0) for task in tasks) / sum(self._totals[task] for task in tasks)

    def ranks_without(self, tasks: Sequence[Hashable]) -> list[int]:
        """The ranks that have no example of these tasks."""
        return [rank for rank, mine in enumerate(self._of_all) if not any(mine.get(task, 0) for task in tasks)]

    def ranks_without_any(self) -> list[int]:
        """The ranks that have no example of any task, the current one included."""
        return [rank for rank, mine in enumerate(self._of_all) if not mine]

    def reset(self) -> None:
        """Forgets what was agreed; all ranks together agree anew in the next step."""
        self._is_agreed, self._order, self._totals = False, [], {}


class _Sum:
    """A number added up over all ranks, of which a GPU tells without waiting for what was launched since."""

    def __init__(self, value: int, ranks: Ranks) -> None:
        self._x = torch.full((1,), value, dtype=torch.int64, device=ranks.device)
        *first, last = ranks.groups
        for group in first:
            dist.all_reduce(self._x, group=group)
        self._work = dist.all_reduce(self._x, group=last, async_op=True)
        self._arrived: torch.cuda.Event | None = None
        if self._x.is_cuda:
            stream = torch.cuda.Stream(self._x.device)
            with torch.cuda.stream(stream):
                self._work.wait()  # which makes the stream wait, not the host
                self._host = torch.empty(1, dtype=torch.int64, pin_memory=True)
                self._host.copy_(self._x, non_blocking=True)
                self._arrived = torch.cuda.Event()
                self._arrived.record(stream)

    def value(self) -> int:
        if self._arrived is not None:
            self._arrived.synchronize()
            return int(self._host)
        self._work.wait()
        return int(self._x)


def ranks_of(
    model: nn.Module, parameters: Sequence[Parameter], process_group: dist.ProcessGroup | None = None
) -> Ranks | None:
    """The processes that train these parameters together; None where there is no process group.

    Args:
        model: as the user has it; one in DistributedDataParallel has a process group, and so does the model inside.
        parameters: those that the optimizer trains; sharded ones have a device mesh.
        process_group: the ranks that train replicas of the model, where it does not say so itself.

    Raises:
        ValueError: the parameters are sharded in a way that the hook cannot follow; or process_group is given, too.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ValueError("process_group must be None where torch.distributed is not initialised, got a group")
        return None
    device = parameters[0].device
    if any(_is_first_fsdp(module) for module in model.modules()):
        raise ValueError(_REFUSED)
    if any(map(is_sharded, parameters)):
        if process_group is not None:
            raise ValueError("process_group must be None for sharded parameters, whose mesh has one, got a group")
        return Ranks(_groups_of_mesh(model, parameters), device, shards=True)
    if process_group is None:
        wrapper = _replicated(model) or _wrapper_around(parameters[0])
        process_group = None if wrapper is None else wrapper.process_group
    return None if process_group is None else Ranks([process_group], device)


def exchanges_gradients(model: nn.Module) -> bool:
    """Whether a backward through the model leaves the mean of all ranks' gradients: whether it is, or is in, DDP."""
    return _replicated(model) is not None


def say_alone() -> None:
    """Says, where there are several processes, that they do not train one model as far as could be found."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        _log.warning(
            "%d processes, but the model is in no DistributedDataParallel: each process projects its gradient by its "
            "own memory alone, unless process_group= is given",
            dist.get_world_size(),
        )


def replica(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, whose passes start no reduction of gradients; else the model."""
    wrapper = _replicated(model)
    return model if wrapper is None else wrapper.module


def communicates(model: nn.Module) -> bool:
    """Whether a pass through the model needs all ranks: it synchronises batch statistics."""
    # By name: torch's class, and those of other libraries that do the same.
    return any("SyncBatchNorm" in base.__name__ for module in model.modules() for base in type(module).__mro__)


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    tensor = sys.modules.get("torch.distributed.tensor")  # while nobody has imported it there is none
    return tensor is not None and isinstance(x, tensor.DTensor)


def _replicated(model: nn.Module) -> DistributedDataParallel | None:
    while not isinstance(model, DistributedDataParallel):
        # What torch.compile and Fabric wrap.
        inner = getattr(model, "_orig_mod", None) or getattr(model, "_forward_module", None)
        if inner is None:
            return None
        model = inner
    return model


def _wrapper_around(parameter: Parameter) -> DistributedDataParallel | None:
    """The wrapper that trains a parameter, where the hook has the model inside; a wrapper leaves no mark on that."""
    if dist.get_world_size() == 1:
        return None
    wrappers = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel) or _is_first_fsdp(x)]
    for wrapper in wrappers:
        if any(p is parameter for p in wrapper.parameters()):
            if not isinstance(wrapper, DistributedDataParallel):
                raise ValueError(_REFUSED)
            if _is_alive(wrapper.process_group):
                return wrapper
    return None


def _is_alive(group: dist.ProcessGroup) -> bool:
    try:
        dist.get_process_group_ranks(group)
    except KeyError:  # of a wrapper that is left from before the processes joined anew
        return False
    return True


def _is_first_fsdp(x: object) -> bool:
    return type(x).__name__ == "FullyShardedDataParallel"


def _groups_of_mesh(model: nn.Module, parameters: Sequence[Parameter]) -> list[dist.ProcessGroup]:
    """The groups of the mesh's dimensions, the sharded one last."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Replicate

    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(
            "model must be sharded by torch.distributed.fsdp.fully_shard, got DTensor parameters of another origin: "
            "tensor parallel models are not supported"
        )
    meshes = set()
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            raise ValueError(
                "the optimizer's parameters must all be sharded by fully_shard, or none of them, got an ordinary one "
                f"of shape {tuple(parameter.shape)} among sharded ones"
            )
        *replicated, sharded = parameter.placements
        if len(replicated) > 1 or not sharded.is_shard() or any(x != Replicate() for x in replicated):
            raise ValueError(
                "parameters must be sharded over one dimension of their mesh, perhaps after one of replicas, got "
                f"placements {parameter.placements}: tensor parallel models are not supported"
            )
        meshes.add(parameter.device_mesh)
    if len(meshes) > 1:
        raise ValueError(f"sharded parameters must all have one device mesh, got {len(meshes)} meshes")
    [mesh] = meshes
    return [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
