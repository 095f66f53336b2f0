"""A model that is wrapped after the hook was made, or around the module that the hook has: found by the first step."""

import logging

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from utils.ranks import Pool
from utils.ranks_training import parameters_of

import gem_fast


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


class Module(nn.Module):
    """A model among others, and a forward that is the training's, as in Lightning."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, y):
        return F.cross_entropy(self.inner(x), y)


def hooked(model, optimizer):
    return gem_fast.GEM(model, optimizer, memory=gem_fast.EpisodicMemory(per_task=8))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)


def train(loss_of, gem, optimizer, rank, tasks=(0, 1, 2)):
    for task in tasks:
        generator = torch.Generator().manual_seed(2 * task + rank)
        for _ in range(4):
            x, y = torch.randn(5, 6, generator=generator), torch.randint(4, (5,), generator=generator)
            optimizer.zero_grad()
            loss_of(x, y).backward()
            gem.observe(x, y, task)
            optimizer.step()


def wrapped_before(model):
    wrapped = DistributedDataParallel(model)
    optimizer = sgd(model)
    return hooked(wrapped, optimizer), optimizer, lambda x, y: F.cross_entropy(wrapped(x), y)


def wrapped_later(model):
    optimizer = sgd(model)
    gem = hooked(model, optimizer)
    wrapped = DistributedDataParallel(model)
    return gem, optimizer, lambda x, y: F.cross_entropy(wrapped(x), y)


def the_model_inside(model):
    wrapped = DistributedDataParallel(model)
    optimizer = sgd(model)
    return hooked(model, optimizer), optimizer, lambda x, y: F.cross_entropy(wrapped(x), y)


def a_part_of_what_is_wrapped(model):
    wrapped = DistributedDataParallel(Module(model))
    optimizer = sgd(model)
    return hooked(model, optimizer), optimizer, wrapped


def a_part_of_what_is_wrapped_later(model):
    optimizer = sgd(model)
    gem = hooked(model, optimizer)
    return gem, optimizer, DistributedDataParallel(Module(model))


def beside_a_wrapper_that_is_left(model):
    group = dist.new_group([0, 1])
    left = DistributedDataParallel(model, process_group=group)
    dist.destroy_process_group(group)
    gem, optimizer, loss_of = wrapped_later(model)
    return gem, optimizer, lambda x, y: left and loss_of(x, y)


def a_wrapper_of_the_models_own(model):
    optimizer = sgd(model)
    gem = hooked(nn.Sequential(model), optimizer)
    wrapped = DistributedDataParallel(model)
    return gem, optimizer, lambda x, y: F.cross_entropy(wrapped(x), y)


def sharded_before(model):
    fully_shard(model)
    optimizer = sgd(model)
    return hooked(model, optimizer), optimizer, lambda x, y: F.cross_entropy(model(x), y)


def sharded_later(model):
    """As Accelerate does it, which changes the parameters of an optimizer that was there before."""
    optimizer = sgd(model)
    gem = hooked(model, optimizer)
    fully_shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    return gem, optimizer, lambda x, y: F.cross_entropy(model(x), y)


def trained(rank, make):
    model = net()
    gem, optimizer, loss_of = make(model)
    train(loss_of, gem, optimizer, rank)
    return parameters_of(model), gem.last.q


@pytest.mark.parametrize(
    "make",
    [
        wrapped_later,
        the_model_inside,
        a_part_of_what_is_wrapped,
        a_part_of_what_is_wrapped_later,
        a_wrapper_of_the_models_own,
        beside_a_wrapper_that_is_left,
    ],
)
def test_as_wrapped_before(two: Pool, make) -> None:
    expected = two.run(trained, wrapped_before)
    for result in two.run(trained, make):
        assert all(map(torch.equal, result, expected[0]))


def test_as_sharded_before(two: Pool) -> None:
    expected = two.run(trained, sharded_before)
    for result in two.run(trained, sharded_later):
        assert all(map(torch.equal, result, expected[0]))


class Steps:
    """The hook, whose `step` takes the place of the loop."""

    def __init__(self, gem):
        self.gem = gem

    def observe(self, x, y, task):
        self.gem.step(x, y, task)


def stepped(rank, make):
    model = net()
    gem, optimizer, _ = make(model)
    nothing = torch.zeros((), requires_grad=True)
    train(lambda x, y: nothing * 1.0, Steps(gem), torch.optim.SGD([nothing], lr=0.1), rank)
    assert optimizer is gem._attachment.optimizer
    return parameters_of(model), gem.last.q


@pytest.mark.parametrize("make", [wrapped_before, sharded_before, sharded_later])
def test_steps_in_one_call_are_those_of_the_loop(two: Pool, make) -> None:
    for got, expected in zip(two.run(stepped, make), two.run(trained, make), strict=True):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def refused_step(rank, make):
    gem, _, _ = make(net())
    with pytest.raises(RuntimeError, match="step needs the hook's model in DistributedDataParallel"):
        gem.step(torch.zeros(2, 6), torch.zeros(2, dtype=torch.long), 0)
    assert gem.memory.tasks == []


@pytest.mark.parametrize("make", [wrapped_later, the_model_inside])
def test_a_step_whose_backward_would_exchange_nothing_is_refused(two: Pool, make) -> None:
    two.run(refused_step, make)


def resumed(rank, make):
    """Whether training goes on with the same bits from a state that is loaded before the first step."""
    model = net()
    gem, optimizer, loss_of = make(model)
    train(loss_of, gem, optimizer, rank)
    state = gem.state_dict()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    train(loss_of, gem, optimizer, rank, [3])
    again = net()
    again.load_state_dict(weights)
    gem, optimizer, loss_of = make(again)
    gem.load_state_dict(state)
    kept = [len(gem.memory.examples(task)[0]) for task in gem.memory.tasks]
    train(loss_of, gem, optimizer, rank, [3])
    return torch.equal(parameters_of(model), parameters_of(again)), kept


@pytest.mark.parametrize("make", [wrapped_later, a_part_of_what_is_wrapped_later])
def test_a_state_is_shared_out_before_the_first_step(two: Pool, make) -> None:
    assert two.run(resumed, make) == [(True, [8, 8, 8])] * 2


def loaded_too_early(rank):
    model = net()
    gem, optimizer, loss_of = wrapped_before(model)
    train(loss_of, gem, optimizer, rank)
    state = gem.state_dict()
    model = net()
    optimizer = sgd(model)
    gem = hooked(model, optimizer)
    gem.load_state_dict(state)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(RuntimeError) as error:
        train(lambda x, y: F.cross_entropy(wrapped(x), y), gem, optimizer, rank)
    return str(error.value)


def test_a_state_that_came_before_the_wrapper_is_an_error(two: Pool) -> None:
    for error in two.run(loaded_too_early):
        assert error.startswith("load_state_dict must be called after the model is wrapped")


def step_of_first_fsdp(rank, hook_first):
    model = net()
    optimizer = sgd(model)
    if hook_first:
        hooked_before = hooked(model, optimizer)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    gem = hooked_before if hook_first else hooked(model, optimizer)
    train(lambda x, y: F.cross_entropy(wrapped(x), y), gem, optimizer, rank)


def first_fsdp(rank, hook_first):
    with pytest.raises(ValueError, match=r"fully_shard, got one wrapped in FullyShardedDataParallel$"):
        step_of_first_fsdp(rank, hook_first)


@pytest.mark.parametrize("hook_first", [False, True])
def test_the_first_version_of_sharding_around_the_model_is_refused(two: Pool, hook_first: bool) -> None:
    two.run(first_fsdp, hook_first)


def said(rank, make):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("gem_fast").addHandler(handler)
    try:
        trained(rank, make)
    finally:
        logging.getLogger("gem_fast").removeHandler(handler)
    return lines


def alone(model):
    optimizer = sgd(model)
    return hooked(model, optimizer), optimizer, lambda x, y: F.cross_entropy(model(x), y)


def test_processes_that_no_group_is_known_of_are_said_in_the_first_step(two: Pool) -> None:
    for lines in two.run(said, alone):
        assert len(lines) == 1
        assert lines[0].startswith("2 processes, but the model is in no DistributedDataParallel")
    assert two.run(said, a_part_of_what_is_wrapped_later) == [[], []]
