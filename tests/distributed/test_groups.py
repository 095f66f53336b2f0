"""Which processes train together: found from the model or the parameters, given, or refused by name."""

import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from utils.ranks import Pool
from utils.ranks_training import ddp, fsdp, parameters_of

import gem_fast


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def train(model, gem, optimizer, rank, tasks=2, average=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rank)
    for task in range(tasks):
        for _ in range(4):
            x, y = torch.randn(5, 6, generator=generator), torch.randint(4, (5,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(dtype)).float(), y).backward()
            if average:
                for p in model.parameters():
                    dist.all_reduce(p.grad)
                    p.grad /= dist.get_world_size()
            gem.observe(x, y, task)
            optimizer.step()


def tensor_parallel(model):
    return parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})


def tensor_parallel_and_sharded(model):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    return fully_shard(parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()}), mesh=mesh["dp"])


def partly_sharded(model):
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
    return model


def of_two_meshes(model):
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))
    return fully_shard(model, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards")))


class FullyShardedDataParallel(nn.Module):
    """As torch's first version of sharding is called."""

    def __init__(self, model):
        super().__init__()
        self.module = model


def error_of(rank, wrap):
    model = wrap(net())
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller looks at it
        gem_fast.GEM(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return str(error.value)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (tensor_parallel, "got DTensor parameters of another origin: tensor parallel models are not supported"),
        (tensor_parallel_and_sharded, "tensor parallel models are not supported"),
        (partly_sharded, "must all be sharded by fully_shard, or none of them, got an ordinary one of shape (4, 8)"),
        (of_two_meshes, "sharded parameters must all have one device mesh, got 2 meshes"),
        (FullyShardedDataParallel, "must be sharded by torch.distributed.fsdp.fully_shard, got one wrapped in"),
    ],
)
def test_refused_by_name(two: Pool, wrap, message: str) -> None:
    assert all(message in error for error in two.run(error_of, wrap))


def given_group(rank):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gem = gem_fast.GEM(model, optimizer, process_group=dist.group.WORLD)
    train(model, gem, optimizer, rank, average=True)
    return parameters_of(model), gem.last.q


def test_a_group_that_is_given(two: Pool) -> None:
    first, second = two.run(given_group)
    assert all(map(torch.equal, first, second))


def group_of_one(rank):
    """A world of one rank for each of two: the plain path."""
    [mine] = [group for i in range(2) if (group := dist.new_group([i])) and i == rank]
    results = []
    for wrap in (lambda model: nn.parallel.DistributedDataParallel(model, process_group=mine), nn.Sequential):
        model = wrap(net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        gem = gem_fast.GEM(model, optimizer)
        assert gem._sharded is None
        train(model, gem, optimizer, rank)
        results.append(parameters_of(model))
    return torch.equal(*results)


def test_a_world_of_one_rank_is_the_plain_path(two: Pool) -> None:
    assert two.run(group_of_one) == [True, True]


def mixed_precision(rank):
    model = fsdp(net(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    assert isinstance(model, FSDPModule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gem = gem_fast.GEM(model, optimizer)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    train(model, gem, optimizer, rank)
    return set(seen), gem.last.q, parameters_of(model)


def test_passes_keep_to_the_policy_of_mixed_precision(two: Pool) -> None:
    first, second = two.run(mixed_precision)
    assert first[0] == {torch.bfloat16}
    assert first[2].dtype == torch.float32
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


def not_finite(rank, wrap):
    model = wrap(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gem = gem_fast.GEM(model, optimizer)
    train(model, gem, optimizer, rank)
    x, _ = gem.memory.examples(0)
    if rank == 1:
        x[0, 0] = math.nan
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    dist.barrier()
    return str(error.value)


@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_a_number_that_is_not_finite_on_one_rank_is_an_error_on_all(two: Pool, wrap) -> None:
    first, second = two.run(not_finite, wrap)
    assert first == "G must be finite, got a NaN or an infinity in row 0"
    assert second == "the memory's examples must be finite, got a NaN or an infinity in example 0 of task 0"


def test_nothing_is_imported_for_those_with_one_process() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import gem_fast; gem_fast.GEM;"
        "print(sorted(name for name in set(sys.modules) - before if name.startswith('torch.distributed')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def infinite_on_one_rank(rank, wrap, fused):
    model = wrap(net())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    gem = gem_fast.GEM(model, optimizer)
    train(model, gem, optimizer, rank)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = parameters_of(model)
    for factor in (math.inf if rank == 1 else 1.0, 1.0):
        optimizer.zero_grad()
        x, y = torch.randn(5, 6), torch.randint(4, (5,))
        scaler.scale(F.cross_entropy(model(x), y) * factor).backward()
        gem.observe(x, y, 1)
        scaler.step(optimizer)
        scaler.update()
    after = parameters_of(model)
    return after, bool(after.isfinite().all()), not torch.equal(before, after)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("wrap", [ddp, fsdp])
def test_a_step_that_the_scaler_skips(two: Pool, wrap, fused: bool) -> None:
    first, second = two.run(infinite_on_one_rank, wrap, fused)
    assert first[1:] == second[1:] == (True, True)
    assert torch.equal(first[0], second[0])
