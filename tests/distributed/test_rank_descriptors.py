"""Descriptors on several ranks: each knows those that any of them was given, and all refuse two of one task."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from utils.descriptor_models import Modulated
from utils.ranks import Pool
from utils.ranks_training import ddp, fsdp

import gem_fast

DESCRIPTORS = {task: torch.randn(4, generator=torch.Generator().manual_seed(ord(task))) for task in "abcd"}


def new_hook(wrap, **options):
    torch.manual_seed(0)
    model = wrap(Modulated())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    memory = gem_fast.EpisodicMemory(per_task="all")
    return model, optimizer, gem_fast.GEM(model, optimizer, memory=memory, **options)


def step(parts, task, batches, rank=None):
    """A step with the mean over all batches of a task, (x, y) of each rank; this rank's alone where there is one."""
    model, optimizer, gem = parts
    mine = batches if rank is None else [batches[rank]]
    optimizer.zero_grad()
    x, y = (torch.cat(values) for values in zip(*batches, strict=True))
    if rank is None:
        F.cross_entropy(model(x, DESCRIPTORS[task]), y).backward()
    else:
        F.cross_entropy(model(mine[0][0], DESCRIPTORS[task]), mine[0][1]).backward()
    for r, (x, y) in enumerate(batches):
        # Rank 0 has no example of task a.
        if (r == rank or rank is None) and (task, r) != ("a", 0):
            gem.observe(x, y, task, DESCRIPTORS[task])
    gem.current_task = task
    optimizer.step()


def data(task, size):
    generator = torch.Generator().manual_seed(ord(task))
    return [(torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(size)]


def training(rank, wrap):
    parts = new_hook(wrap)
    for task in "abcd":
        step(parts, task, data(task, 2), rank)
    known = parts[2]._descriptors.on_cpu()
    return known, parts[2].last.q, parts[2].last.v


@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_as_one_process_with_all_examples(two: Pool, wrap) -> None:
    alone = new_hook(lambda model: model)
    for task in "abcd":
        step(alone, task, data(task, 2))
    for known, q, v in two.run(training, wrap):
        assert list(known) == list("abcd")
        assert all(torch.equal(known[task], DESCRIPTORS[task]) for task in "abcd")
        assert torch.allclose(q, alone[2].last.q, rtol=1e-3, atol=1e-5)
        assert torch.allclose(v, alone[2].last.v, rtol=1e-2, atol=1e-3)


def two_of_one_task(rank, wrap):
    model, optimizer, gem = new_hook(wrap)
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    F.cross_entropy(model(x, DESCRIPTORS["a"]), y).backward()
    gem.observe(x, y, "a", DESCRIPTORS["ab"[rank]])
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    dist.barrier()  # nobody waits in an exchange
    return str(error.value)


@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_two_descriptors_of_one_task_are_an_error_on_all_ranks(two: Pool, wrap) -> None:
    expected = "the descriptor of task 'a' must be the same on all ranks, got two that differ"
    assert two.run(two_of_one_task, wrap, timeout=30) == [expected] * 2


def state(rank):
    parts = new_hook(ddp)
    for task in "abcd":
        step(parts, task, data(task, 2), rank)
    return parts[2].state_dict()


def test_a_state_of_two_ranks_in_one_process(two: Pool) -> None:
    of_both = two.run(state)[0]
    _, _, gem = new_hook(lambda model: model)
    gem.load_state_dict(of_both)
    assert all(torch.equal(gem._descriptors.of(task), DESCRIPTORS[task]) for task in "abcd")
