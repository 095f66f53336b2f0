"""Random mini-batches from the memory, where not all of its examples count in every step."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gem_fast.gradients import Sample
from gem_fast.state import check_generator

_CPU = torch.device("cpu")


class Generators:
    """The generators that draw subsets, one for each device that a memory has been on: to draw takes no copy.

    Args:
        seed: of each of them.
    """

    def __init__(self, seed: int) -> None:
        self.cpu = torch.Generator().manual_seed(seed)
        self._seed = seed
        self._others: dict[str, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """The generator of a device, made when first asked for."""
        if device.type == "cpu":
            return self.cpu
        name = str(device)
        if name not in self._others:
            self._others[name] = new_generator(device).manual_seed(self._seed)
        return self._others[name]

    @property
    def of_gpus(self) -> list[torch.Generator]:
        """Those that are not the CPU's."""
        return list(self._others.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The state of each by its device; a generator of a GPU keeps it on the host, so nothing waits."""
        return {"cpu": self.cpu.get_state()} | {name: other.get_state() for name, other in self._others.items()}

    def restored(self, state: Any) -> "Generators":
        """Others in the state that `state_dict` returned; a device that is not here is left out.

        Raises:
            ValueError: the state is not one of such generators.
        """
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise ValueError(f"generator must be a dictionary of states by device, got {type(state).__name__}")
        check_generator(state.get("cpu"))
        generators = Generators(self._seed)
        generators.cpu.set_state(state["cpu"])
        for name, value in state.items():
            if name == "cpu" or not _is_here(name):
                continue
            try:
                generators.on(torch.device(name)).set_state(value)
            except (TypeError, RuntimeError) as error:
                raise ValueError(f"generator must be the state of a torch.Generator on {name}, got another") from error
        return generators


def new_generator(device: torch.device) -> torch.Generator:
    """A generator of random numbers on a device."""
    return torch.Generator(device)


def sample_each(counts: list[int], size: int, generator: torch.Generator, device: torch.device = _CPU) -> Sample:
    """A random subset of every task's examples, without replacement.

    Args:
        counts: the number of examples of each task.
        size: the number to draw from each task; all of its examples where there are fewer.
        generator: one of the device.
        device: where the numbers are drawn, and the positions are.

    Returns:
        The positions of the examples drawn, among those of all tasks one after another, and how many each task has.
    """
    sizes, total = _sizes(tuple(counts), size)
    if device.type == "cpu":
        numbers = torch.empty(total, dtype=torch.int64).random_(generator=generator)
        return Sample(torch.ops.gem_fast._distinct(numbers, counts, size), sizes)
    longest = max(counts)
    first, beyond = _layout(tuple(counts), device)
    # One row of random keys per task: the columns of its `size` smallest keys are a random subset. Where a task has
    # fewer examples than the row has columns, the rest gets a key that no example has, and comes last.
    keys = torch.rand((len(counts), longest), generator=generator, device=device)
    if beyond is not None:
        keys.masked_fill_(beyond, 2.0)
    equal = min(sizes) == max(sizes)
    columns = keys.topk(max(sizes), dim=1, largest=False, sorted=not equal).indices
    positions = columns + first
    if equal:
        return Sample(positions.flatten(), sizes)
    return Sample(torch.cat([row[:count] for row, count in zip(positions, sizes, strict=True)]), sizes)


@lru_cache(maxsize=8)
def _sizes(counts: tuple[int, ...], size: int) -> tuple[list[int], int]:
    """How many are drawn of each task, and of all together."""
    sizes = [min(count, size) for count in counts]
    return sizes, sum(sizes)


@lru_cache(maxsize=8)
def _layout(counts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(t, 1): where each task's examples begin; (t, longest): which columns are beyond them, None where none is."""
    with torch.inference_mode(False):
        n_examples = torch.tensor(counts)[:, None]
        first = n_examples.cumsum(0) - n_examples
        beyond = torch.arange(max(counts)) >= n_examples if min(counts) < max(counts) else None
        # Nothing waits for the copies: what reads them is enqueued after them.
        return first.to(device, non_blocking=True), None if beyond is None else beyond.to(device, non_blocking=True)


def _is_here(device: str) -> bool:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # AssertionError: torch is built without CUDA
        return False
    return True


def sample_all(counts: list[int], size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """A random subset of all tasks' examples together, without replacement.

    Args:
        counts: the number of examples of each task.
        size: the number to draw in total; all where there are fewer.
        generator: a CPU generator.

    Returns:
        For each task the numbers of its examples that were drawn, (n,) int64 in ascending order; perhaps none.
    """
    n_examples = torch.tensor(counts)
    drawn = torch.randperm(int(n_examples.sum()), generator=generator)[:size].sort().values
    ends = n_examples.cumsum(0)
    by_task = torch.tensor_split(drawn, torch.searchsorted(drawn, ends[:-1]))
    return [part - start for part, start in zip(by_task, (ends - n_examples).tolist(), strict=True)]
