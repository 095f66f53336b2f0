"""The same training on several ranks, and in one process on the union of their memories."""

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gem_fast
from gem_fast.sampling import sample_all, sample_each
from utils.models import MultiHead, mlp

TASKS, STEPS = 4, 15


class AllReduced(torch.autograd.Function):
    """The sum over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """Synchronised batch normalisation without the kernels that torch has on GPUs only; alone an ordinary one."""

    def forward(self, x: Tensor) -> Tensor:
        sums = torch.stack([torch.ones_like(x).sum((0, 2, 3)), x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
        if dist.is_initialized():
            sums = AllReduced.apply(sums)
        mean, square = sums[1:] / sums[0]
        scale = self.weight / (square - mean.square() + self.eps).sqrt()
        return (x - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class Transformer(nn.Module):
    """Two features are a token; the labels are of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(2, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x.view(-1, 3, 2))).mean(1))


def _conv(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "batch norm": lambda: _conv(nn.BatchNorm2d),
    "synchronised batch norm": lambda: _conv(NaiveSyncBatchNorm),
    "heads": lambda: MultiHead(TASKS),
    "transformer": Transformer,
}


class Data(NamedTuple):
    """How much of it each rank sees."""

    sizes: tuple[int, ...]
    """A mini-batch of each rank."""
    last: tuple[int, ...]
    """The last mini-batch of each task, on each rank."""

    def steps(self, dtype: torch.dtype) -> Iterator[tuple[int, list[tuple[Tensor, Tensor]]]]:
        """The task, and each rank's mini-batch: the tasks disagree, and their inputs differ."""
        generator = torch.Generator().manual_seed(1)
        for task in range(TASKS):
            turn = torch.randn(6, 6, generator=generator)
            for step in range(STEPS):
                shards = []
                for n in self.last if step == STEPS - 1 else self.sizes:
                    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
                    shards.append(((x @ turn.double()).to(dtype), (x[:, :3].argmax(1) + task) % 3))
                yield task, shards


class Result(NamedTuple):
    parameters: Tensor
    q: list[Tensor]
    violations: int


def new(name: str, dtype: torch.dtype) -> nn.Module:
    """The same model on all ranks."""
    torch.manual_seed(0)
    return MODELS[name]().to(dtype)


def parameters_of(model: nn.Module) -> Tensor:
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in full])


class Recorder:
    """Notes what each step's projection did."""

    def __init__(self) -> None:
        self.q: list[Tensor] = []
        self.violations = 0

    def note(self, gem: gem_fast.GEM) -> None:
        if gem.last is not None:
            self.q.append(gem.last.q.clone())
            self.violations += int(gem.last.violations.any())

    def result(self, model: nn.Module) -> Result:
        return Result(parameters_of(model), self.q, self.violations)


class Union(gem_fast.GEM):
    """In one process: the mean over the examples of one memory per rank, each a mini-batch of its own or all together.

    With `memory_batch`, and with `averaged` as AGEM does it, each rank draws from its own memory.
    """

    def __init__(self, *args: Any, ranks: int, per_task: int, together: bool, averaged: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.of_ranks = [gem_fast.EpisodicMemory(per_task=per_task) for _ in range(ranks)]
        self.generators = [torch.Generator().manual_seed(0) for _ in range(ranks)]
        self.together, self.averaged = together, averaged

    def observe_of(self, rank: int, x: Tensor, y: Tensor, task: Hashable) -> None:
        self.of_ranks[rank].observe(x, y, task)
        self.observe(x, y, task)

    def constraints(self) -> tuple[list[gem_fast.Constraint], None]:
        shards = [self._of_rank(*each) for each in zip(self.of_ranks, self.generators, strict=True)]
        if self.averaged:
            return [[batch for batches in shards for batch in batches]], None
        found = [list(batches) for batches in zip(*shards, strict=True)]
        if self.together:
            found = [
                [batches[0]._replace(x=torch.cat([b.x for b in batches]), y=torch.cat([b.y for b in batches]))]
                for batches in found
            ]
        return found, None

    def _of_rank(self, memory: gem_fast.Memory, generator: torch.Generator) -> list[gem_fast.Batch]:
        batches = [gem_fast.Batch(task, *memory.examples(task)) for task in self.past_tasks]
        counts = [len(batch.x) for batch in batches]
        if self.averaged:
            drawn = sample_all(counts, self.memory_batch, generator)
            some = [batch._replace(x=batch.x[i], y=batch.y[i]) for batch, i in zip(batches, drawn, strict=True)]
            return [gem_fast.Batch(None, torch.cat([b.x for b in some]), torch.cat([b.y for b in some]))]
        if self.memory_batch is not None:
            return [batch for [batch] in sample_each(counts, self.memory_batch, generator).of([[b] for b in batches])]
        return batches


class How(NamedTuple):
    """What a training loop does beside the usual."""

    parts: int = 1
    """Backward passes that a step's gradient is accumulated over."""
    clip_before: float | None = None
    clip_after: float | None = None
    scaled: bool = False


USUAL = How()


def _train(
    model: nn.Module,
    gem: gem_fast.GEM,
    optimizer: torch.optim.Optimizer,
    steps: Iterator[tuple[int, list[tuple[Tensor, Tensor]]]],
    how: How,
    observe: Callable[[list[tuple[Tensor, Tensor]], int], None],
) -> Result:
    """Trains on the mean of the losses on several mini-batches."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=how.scaled)
    noted = Recorder()
    if how.clip_after is not None:
        optimizer.register_step_pre_hook(
            lambda *_: nn.utils.clip_grad_norm_(model.parameters(), how.clip_after) and None
        )
    for task, batches in steps:
        optimizer.zero_grad()
        parts = [(x[i :: how.parts], y[i :: how.parts]) for i in range(how.parts) for x, y in batches]
        for i, (x, y) in enumerate(parts):
            is_last = i == len(parts) - 1
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(is_last)
            with contextlib.nullcontext() if is_last or not hasattr(model, "no_sync") else model.no_sync():
                output = model(x, task) if "heads" in dict(_inner(model).named_children()) else model(x)
                scaler.scale(F.cross_entropy(output, y) / len(parts)).backward()
        observe(batches, task)
        if how.clip_before is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), how.clip_before)
        scaler.step(optimizer)
        scaler.update()
        noted.note(gem)
    return noted.result(model)


def train_alone(
    name: str,
    dtype: torch.dtype,
    data: Data,
    how: How = USUAL,
    per_task: int = 12,
    averaged: bool = False,
    refresh_every: int = 1,
    **options: Any,
) -> Result:
    """In one process, on the union of the memories; the gradient is the mean over the ranks, as theirs is."""
    model, together = new(name, dtype), name.startswith("sync")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gem = Union(
        model,
        optimizer,
        ranks=len(data.sizes),
        per_task=per_task,
        together=together,
        averaged=averaged,
        engine=gem_fast.Loop(refresh_every=refresh_every),
        **options,
    )

    def observe(batches: list[tuple[Tensor, Tensor]], task: int) -> None:
        for rank, (x, y) in enumerate(batches):
            gem.observe_of(rank, x, y, task)

    steps = data.steps(dtype)
    if not together:
        return _train(model, gem, optimizer, steps, how, observe)
    joined = ((task, [tuple(map(torch.cat, zip(*batches, strict=True)))]) for task, batches in steps)
    n = len(data.sizes)
    return _train(
        model,
        gem,
        optimizer,
        joined,
        how,
        lambda b, task: observe([*zip(*(x.chunk(n) for x in b[0]), strict=True)], task),
    )


def train_rank(
    rank: int,
    name: str,
    dtype: torch.dtype,
    data: Data,
    wrap: Callable[..., nn.Module],
    how: How = USUAL,
    per_task: int = 12,
    hook: Callable[..., gem_fast.GEM] = gem_fast.GEM,
    **options: Any,
) -> Result:
    """On this rank, on its own shard."""
    model = wrap(new(name, dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gem = hook(model, optimizer, memory=gem_fast.EpisodicMemory(per_task=per_task), **options)
    steps = ((task, [batches[rank]]) for task, batches in data.steps(dtype))
    return _train(model, gem, optimizer, steps, how, lambda batches, task: gem.observe(*batches[0], task))


def _inner(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def ddp_of_heads(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp(model: nn.Module, *replicas: int, **options: Any) -> nn.Module:
    """Sharded over all ranks, or over those that are left beside so many replicas; the last layer by itself."""
    shape = (*replicas, dist.get_world_size() // (replicas[0] if replicas else 1))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    *_, last = model.children()
    if not isinstance(last, nn.ModuleList):
        fully_shard(last, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def hsdp(model: nn.Module) -> nn.Module:
    """Sharded over half of the ranks, with a replica on the other half."""
    return fsdp(model, 2)


def assert_same(results: list[Result], expected: Result, tolerance: float) -> None:
    for result in results[1:]:
        assert torch.equal(result.parameters, results[0].parameters)
        assert all(map(torch.equal, result.q, results[0].q))
    assert expected.violations > 10
    assert results[0].violations == expected.violations
    torch.testing.assert_close(results[0].parameters, expected.parameters, rtol=tolerance, atol=tolerance)
