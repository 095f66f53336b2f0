"""Random choices of examples from the memory, where not all of them are to count in every step."""

import torch

from gem_fast.gradients import Sample


def sample_each(counts: list[int], size: int, generator: torch.Generator) -> Sample:
    """A random subset of every task's examples, without replacement: `size` of them, or all where there are fewer.

    Args:
        counts: the number of examples of each task.
        size: the number to choose from each.
        generator: a CPU generator.
    """
    held = torch.tensor(counts)
    most = max(counts)
    # The places of a row's smallest random numbers are a random subset; what is no example is never among them.
    keys = torch.rand((len(counts), most), generator=generator)
    full = min(counts) == most
    if not full:
        keys.masked_fill_(torch.arange(most) >= held[:, None], 2.0)
    smallest, places = keys.topk(min(size, most), dim=1, largest=False, sorted=False)
    positions = places + (held.cumsum(0) - held)[:, None]
    positions = positions.flatten() if full else positions[smallest < 2.0]
    return Sample(positions, [min(count, size) for count in counts])


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
