"""torch.distributed.checkpoint: the same bits on as many ranks, the same examples on any other number."""

import os
import signal
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from utils.ranks import Pool
from utils.ranks_training import ddp, fsdp, parameters_of

import gem_fast

POLICIES = {
    "last": partial(gem_fast.EpisodicMemory, per_task=6),
    "last of a total": partial(gem_fast.EpisodicMemory, total=18),
    "reservoir": partial(gem_fast.ReservoirMemory, per_task=6),
    "balanced": partial(gem_fast.ClassBalancedMemory, per_task=6),
}


def start(wrap, policy="last", seed=0, **options):
    torch.manual_seed(seed)
    model = wrap(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    return model, optimizer, gem_fast.GEM(model, optimizer, memory=POLICIES[policy](), **options)


def train(model, optimizer, gem, rank, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * rank + step)
        x, y = torch.randn(4, 6, generator=generator), torch.randint(4, (4,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gem.observe(x, y, step // 5)
        optimizer.step()


def examples_of(gem):
    return {task: tuple(x.clone() for x in gem.memory.examples(task)) for task in gem.memory.tasks}


def saved(rank, path, wrap, options, policy="last"):
    model, optimizer, gem = start(wrap, policy, **options)
    train(model, optimizer, gem, rank, range(13))
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer, "gem": gem}, checkpoint_id=path)
    kept = examples_of(gem)
    train(model, optimizer, gem, rank, range(13, 20))
    return parameters_of(model), gem.last.v, kept


def resumed(rank, path, wrap, options, policy="last"):
    model, optimizer, gem = start(wrap, policy, seed=1, **options)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    states = {"model": of_model, "optimizer": of_optimizer, "gem": gem.state_dict()}
    dcp.load(states, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    gem.load_state_dict(states["gem"])
    kept = examples_of(gem)
    train(model, optimizer, gem, rank, range(13, 20))
    return parameters_of(model), gem.last.v, kept


@pytest.mark.parametrize("wrap", [ddp, fsdp])
@pytest.mark.parametrize("options", [{}, {"memory_batch": 3}, {"engine": gem_fast.Loop(refresh_every=2)}])
def test_goes_on_with_the_same_bits(two: Pool, tmp_path, wrap, options) -> None:
    expected = two.run(saved, str(tmp_path), wrap, options)
    got = two.run(resumed, str(tmp_path), wrap, options)
    for [parameters, v, _], [parameters_got, v_got, _] in zip(expected, got, strict=True):
        assert torch.equal(parameters, parameters_got)
        assert torch.equal(v, v_got)


def union(results):
    """Per task the examples of all ranks, in an order of their own."""
    tasks = list(dict.fromkeys(task for *_, kept in results for task in kept))
    found = {}
    for task in tasks:
        rows = [torch.cat([kept[task][0], kept[task][1][:, None]], 1) for *_, kept in results if task in kept]
        found[task] = sorted(torch.cat(rows).tolist())
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("more", [True, False])
def test_another_number_of_ranks_has_the_same_examples(
    two: Pool, three: Pool, tmp_path, policy: str, more: bool
) -> None:
    before, after = (two, three) if more else (three, two)
    expected = before.run(saved, str(tmp_path), ddp, {}, policy)
    got = after.run(resumed, str(tmp_path), ddp, {}, policy)
    assert union(got) == union(expected)
    assert list(union(got)) == list(union(expected))
    assert all(torch.equal(got[0][0], parameters) for parameters, *_ in got)


def packed(rank):
    model, optimizer, gem = start(ddp)
    train(model, optimizer, gem, rank, range(13))
    return gem.state_dict(), examples_of(gem)


def shared_out(rank, state):
    *_, gem = start(ddp)
    gem.load_state_dict(state)
    return None, examples_of(gem)


def test_to_one_process_and_back(two: Pool) -> None:
    ranks = two.run(packed)
    assert ranks[0][0] == ranks[1][0]  # every rank has the state of all
    *_, gem = start(nn.Sequential)
    gem.load_state_dict(ranks[0][0])
    alone = [(None, examples_of(gem))]
    assert union(alone) == union(ranks)
    assert gem.memory.per_task == 12
    model, optimizer, gem = start(nn.Sequential)
    train(model, optimizer, gem, 0, [0, 1, 5, 6])
    alone = [(None, examples_of(gem))]
    assert union(two.run(shared_out, gem.state_dict())) == union(alone)


@pytest.mark.parametrize("value", [b"", b"other", "text", None])
def test_states_of_ranks_that_are_none(value) -> None:
    *_, gem = start(nn.Sequential)
    with pytest.raises(ValueError, match="ranks of the state must be"):
        gem.load_state_dict({"ranks": value})


def killed(rank, path):
    model, optimizer, gem = start(ddp)
    train(model, optimizer, gem, rank, range(13))
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer, "gem": gem}, checkpoint_id=path)
    train(model, optimizer, gem, rank, range(13, 16))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(model, optimizer, gem, rank, range(16, 20))


def test_a_job_whose_rank_was_killed_ends_with_the_same_bits(two: Pool, tmp_path) -> None:
    """The other rank fails, too, instead of waiting; torchrun then starts all of them again, as the pool does here."""
    with pytest.raises(AssertionError, match=r"rank 0: Traceback(.|\n)*rank 1: the process died"):
        two.run(killed, str(tmp_path / "killed"))
    got = two.run(resumed, str(tmp_path / "killed"), ddp, {})
    expected = two.run(saved, str(tmp_path / "uninterrupted"), ddp, {})
    for [parameters, v, _], [parameters_got, v_got, _] in zip(expected, got, strict=True):
        assert torch.equal(parameters, parameters_got)
        assert torch.equal(v, v_got)
