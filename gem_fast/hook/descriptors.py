"""What the model is told about each task beside its id: a tensor or a nest of tensors."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gem_fast.batches import CONSTANTS, clone, moved, stored, versions
from gem_fast.containers import Nest, leaves, structure, tensors
from gem_fast.gradients.interface import Objective
from gem_fast.memory.checks import plain_task
from gem_fast.state import check_keys, check_plain_task, check_plain_tensor


class Descriptors:
    """The descriptor of each task: the same at all times, on the model's device and in its dtype.

    Args:
        objective: the model, and how it is called.
        given: descriptors by task, which may also come one by one.

    Raises:
        TypeError: `given` is no mapping, or a descriptor is no tensor or nest of tensors.
        ValueError: as for `check`.
    """

    def __init__(self, objective: Objective, given: Mapping[Hashable, Nest] | None) -> None:
        self._objective = objective
        self._kept: dict[Hashable, Nest] = {}  # as they came
        self._moved: dict[Hashable, Nest] = {}
        self._place: tuple[torch.device, torch.dtype] | None = None  # where those are
        self._last: dict[Hashable, tuple[Nest, Any]] = {}  # what came last, and its versions
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"descriptors must be a mapping from tasks to tensors, got {type(given).__name__}")
        for task, descriptor in (given or {}).items():
            task = plain_task(task)
            self.check(task, descriptor)
            self.keep(task, descriptor)
        self._given = dict(self._kept)

    def check(self, task: Hashable, descriptor: Nest) -> None:
        """Raises unless a task may have a descriptor, or for None may go without another word.

        Raises:
            TypeError: it is no tensor or nest of tensors.
            ValueError: the model takes none, or needs one; or it is not the task's earlier one, or has a gradient.
        """
        objective = self._objective
        if descriptor is None:
            is_wanted = objective.needs_descriptor or (self._kept and objective.descriptor_name == objective.task_name)
            if is_wanted and task not in self._kept:
                raise ValueError(f"descriptor must be given for each task once, got none for task {task!r:.50}")
            return
        if objective.descriptor_name is None:
            raise ValueError(
                "descriptor must be None for a model whose forward has no parameter descriptor or task, got one for "
                f"task {task!r:.50}"
            )
        if self._is_last(task, descriptor):
            return
        _check_nest(descriptor)
        if task in self._kept and not _is_same(self._kept[task], descriptor):
            raise ValueError(f"descriptor must be the same for a task at all times, got another one for {task!r:.50}")

    def keep(self, task: Hashable, descriptor: Nest) -> None:
        """Keeps a copy of what `check` has let pass; of None nothing."""
        if descriptor is None or self._is_last(task, descriptor):
            return
        if task not in self._kept:
            with torch.inference_mode(False):
                self._kept[task] = clone(stored(descriptor))
        if not any(x.is_inference() for x in tensors(descriptor)):
            self._last[task] = descriptor, versions(descriptor)

    def of(self, task: Hashable) -> Nest:
        """The task's descriptor with the model's device and floating-point dtype; None where it has none."""
        if task not in self._kept:
            return None
        like = next(p for p in self._objective.model.parameters() if p.is_floating_point())
        if self._place != (like.device, like.dtype):
            self._place = like.device, like.dtype
            self._moved.clear()
        if task not in self._moved:
            with torch.inference_mode(False):
                self._moved[task] = moved(self._kept[task], *self._place)
        return self._moved[task]

    def of_each(self, tasks: Sequence[Hashable]) -> list[Nest]:
        """`of` for each of some tasks."""
        return [self.of(task) for task in tasks] if self._kept else [None] * len(tasks)

    def on_cpu(self) -> dict[Hashable, Nest]:
        """All of them by task, to be sent to other processes."""
        return {task: moved(descriptor, "cpu", None) for task, descriptor in self._kept.items()}

    def merged(
        self, others: Sequence[Mapping[Hashable, Nest]], where: str, *, anew: bool = False
    ) -> dict[Hashable, Nest]:
        """These and others, which `take` takes.

        Args:
            others: descriptors by task.
            where: what a task's descriptors must be the same as, or where, for the error.
            anew: whether those that came one by one are left out.

        Raises:
            ValueError: a task has two that are not the same; or the model takes none.
        """
        all_of_them = dict(self._given if anew else self._kept)
        for task, descriptor in (item for other in others for item in other.items()):
            if self._objective.descriptor_name is None:
                raise ValueError(f"the model must take a descriptor {where}, got one without such a parameter")
            if not _is_same(all_of_them.setdefault(task, descriptor), descriptor):
                raise ValueError(f"the descriptor of task {task!r:.50} must be the same {where}, got two that differ")
        return all_of_them

    def take(self, descriptors: Mapping[Hashable, Nest]) -> None:
        """Keeps these from now on."""
        self._kept = dict(descriptors)
        self._moved.clear()
        self._last.clear()

    def _is_last(self, task: Hashable, descriptor: Nest) -> bool:
        last, before = self._last.get(task, (None, None))
        return last is descriptor and versions(descriptor) == before

    def state_dict(self, tasks: Iterable[Hashable]) -> list[dict[str, Any]]:
        """Copies of those of some tasks."""
        return [{"task": task, "descriptor": clone(self._kept[task])} for task in tasks if task in self._kept]


def descriptors_of_state(state: Any) -> dict[Hashable, Nest]:
    """What `Descriptors.state_dict` returned, by task; raises ValueError where it is something else."""
    if not isinstance(state, list):
        raise ValueError(f"descriptors of the state must be a list, got {type(state).__name__}")
    found: dict[Hashable, Nest] = {}
    for entry in state:
        check_keys("a descriptor of the state", entry, ("task", "descriptor"))
        check_plain_task("task", entry["task"])
        try:
            _check_nest(entry["descriptor"])
        except TypeError as error:
            raise ValueError(str(error)) from error
        for name, leaf, _ in leaves("descriptor", entry["descriptor"]):
            if isinstance(leaf, Tensor):
                check_plain_tensor(name, leaf)
        if entry["task"] in found:
            raise ValueError(f"tasks with a descriptor in the state must differ, got {entry['task']!r:.50} twice")
        found[entry["task"]] = clone(entry["descriptor"])
    return found


def _check_nest(descriptor: Any) -> None:
    has_tensor = False
    for name, leaf, is_named in leaves("descriptor", descriptor):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_nested:
            has_tensor = True
            if leaf.requires_grad:
                raise ValueError(f"{name} must not require a gradient, which it would not get, got one that does")
        elif not (is_named and isinstance(leaf, CONSTANTS)):
            raise TypeError(f"{name} must be a dense tensor or a nest of these, got {type(leaf).__name__}")
    if not has_tensor:
        raise TypeError("descriptor must be a dense tensor or a nest of these, got no tensor")


def _is_same(one: Nest, other: Nest) -> bool:
    if structure(one) != structure(stored(other)):
        return False
    theirs = {name: leaf for name, leaf, _ in leaves("descriptor", other)}
    mine = ((leaf, theirs[name]) for name, leaf, _ in leaves("descriptor", one))
    return all(a.shape == b.shape and torch.equal(a, b.to(a)) for a, b in mine if isinstance(a, Tensor))
