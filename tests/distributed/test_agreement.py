"""Ranks agree on the tasks; where they do not, all of them get the same error."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from utils.ranks import Pool
from utils.ranks_training import ddp, fsdp

import gem_fast


def new_hook(wrap, lr=0.05, **options):
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return model, optimizer, gem_fast.GEM(model, optimizer, **options)


def step(model, optimizer, gem, task, observes=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(4, 6, generator=generator), torch.randint(3, (4,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    if observes:
        gem.observe(x, y, task)
    gem.current_task = task
    optimizer.step()


def tasks_that_disagree(rank, wrap, tasks_of_ranks):
    parts = new_hook(wrap)
    for task in tasks_of_ranks[rank][:-1]:
        step(*parts, task)
    with pytest.raises(RuntimeError, match="current task") as error:
        step(*parts, tasks_of_ranks[rank][-1])
    dist.barrier()  # nobody waits in an exchange
    return str(error.value)


@pytest.mark.parametrize("wrap", [ddp, fsdp])
@pytest.mark.parametrize("tasks", [([0], [1]), ([0, 0], [0, 1]), ([0, 1, 1], [0, 1, 2]), ([0, 1, "a"], [0, 1, 0])])
def test_another_current_task_is_an_error_on_all_ranks(two: Pool, wrap, tasks) -> None:
    messages = two.run(tasks_that_disagree, wrap, tasks, timeout=30)
    expected = (
        f"the current task must be the same on all ranks, got {[mine[-1] for mine in tasks]} of the ranks in order"
    )
    assert messages == [expected] * 2


def task_that_comes_to_one_rank(rank):
    parts = new_hook(ddp)
    step(*parts, 0)
    step(*parts, 1)
    if rank == 1:
        parts[2].memory.observe(torch.randn(2, 6), torch.tensor([0, 1]), "late")
    with pytest.raises(RuntimeError) as error:
        step(*parts, 1)
    return str(error.value)


def test_a_past_task_that_comes_to_one_rank_alone_is_an_error_on_all(two: Pool) -> None:
    first, second = two.run(task_that_comes_to_one_rank)
    assert first == second
    assert "a task must come to all ranks in the same step, got tasks [[0, 1], [0, 1, 'late']]" in first


def orders(rank, wrap):
    """Rank r has no example of task r, and sees the others in the order in which all do."""
    parts = new_hook(wrap)
    for task in ["a", "b", "c", "a", "d"]:
        for seed in range(2):
            step(*parts, task, observes=rank != "abc".index(task) if task != "d" else True, seed=seed)
    gem = parts[2]
    return gem.past_tasks, gem.last.v, gem.last.q


@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_ranks_without_examples_of_a_task_have_the_same_constraints(three: Pool, wrap) -> None:
    results = three.run(orders, wrap)
    for tasks, v, q in results:
        assert tasks == ["a", "b", "c"]
        assert torch.equal(v, results[0][1])
        assert torch.equal(q, results[0][2])


def weights(rank, wrap):
    """Rank 0 has no example of task 0, the others have 2 and 3 of it: the mean is that over all of them."""
    counts = (0, 2, 3)
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(5, 6, generator=generator).double(), torch.randint(3, (5,), generator=generator)
    model, optimizer, gem = new_hook(lambda model: wrap(model.double()))
    start = sum(counts[:rank])
    if counts[rank]:
        gem.observe(x[start : start + counts[rank]], y[start : start + counts[rank]], 0)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    gem.observe(x, y, 1)
    optimizer.step()
    return gem.last.q, x, y


@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_weights_are_numbers_of_examples(three: Pool, wrap) -> None:
    [q, x, y], *others = three.run(weights, wrap)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    F.cross_entropy(model(x), y).backward()
    norm = sum(p.grad.square().sum() for p in model.parameters())
    torch.testing.assert_close(q, norm[None])  # the same examples: q = |g|^2
    assert all(torch.equal(q, other) for other, *_ in others)
