"""Random mini-batches from the memory, where not all of its examples count in every step."""

import torch

from gem_fast.gradients import Sample


def sample_each(counts: list[int], size: int, generator: torch.Generator) -> Sample:
    """A random subset of every task's examples, without replacement.

    Args:
        counts: the number of examples of each task.
        size: the number to draw from each task; all of its examples where there are fewer.
        generator: a CPU generator.

    Returns:
        The positions of the examples drawn, among those of all tasks one after another, and how many each task has.
    """
    n_examples = torch.tensor(counts)
    longest = max(counts)
    # One row of random keys per task: the columns of its `size` smallest keys are a random subset. Where a task has
    # fewer examples than the row has columns, the rest gets a key that no example has.
    keys = torch.rand((len(counts), longest), generator=generator)
    equal = min(counts) == longest
    if not equal:
        keys.masked_fill_(torch.arange(longest) >= n_examples[:, None], 2.0)
    smallest, columns = keys.topk(min(size, longest), dim=1, largest=False, sorted=False)
    positions = columns + (n_examples.cumsum(0) - n_examples)[:, None]
    positions = positions.flatten() if equal else positions[smallest < 2.0]
    return Sample(positions, [min(count, size) for count in counts])


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
