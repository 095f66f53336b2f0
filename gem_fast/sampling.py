"""Random choices of examples from the memory, where not all of them are to count in every step."""

import numpy as np
import torch

from gem_fast.task_gradients import Sample


def sample_each(counts: list[int], size: int, generator: torch.Generator) -> Sample:
    """A random subset of every task's examples, without replacement: `size` of them, or all where there are fewer.

    Args:
        counts: the number of examples of each task.
        size: the number to choose from each.
        generator: a CPU generator.
    """
    most = max(counts)
    # The places of a row's smallest random numbers are a random subset; what is no example is never among them.
    keys = torch.rand((len(counts), most), generator=generator).numpy()
    held = np.asarray(counts)
    keys[np.arange(most) >= held[:, None]] = 2.0
    taken = min(size, most)
    order = np.argpartition(keys, taken - 1, axis=1)[:, :taken] if taken < most else np.argsort(keys, axis=1)
    starts = np.cumsum(held) - held
    kept = np.take_along_axis(keys, order, 1) < 2.0
    positions = (order + starts[:, None])[kept]
    return Sample(torch.from_numpy(positions), np.minimum(held, size).tolist())


def sample_all(counts: list[int], size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """A random subset of all tasks' examples together, without replacement.

    Args:
        counts: the number of examples of each task.
        size: the number to choose in total; all where there are fewer.
        generator: a CPU generator.

    Returns:
        For each task the numbers of its examples that were chosen, (n,) int64 in ascending order; perhaps none.
    """
    held = torch.tensor(counts)
    drawn = torch.randperm(int(held.sum()), generator=generator)[:size].sort().values
    ends = held.cumsum(0)
    inner = torch.searchsorted(drawn, ends[:-1])
    parts = torch.tensor_split(drawn, inner)
    return [part - start for part, start in zip(parts, (ends - held).tolist(), strict=True)]
