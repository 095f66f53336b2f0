"""Whole training steps: plain SGD, GEM in its forms, one backward per past task, and the published method.

    python bench/gpu/steps.py FILE [--seconds S] [--dry-run]

A step is what a training loop does with one batch: gradient, memory pass, projection, update. Every method starts from
the same weights and memories.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from kernels import use_our_solver_where_quadprog_is_missing
from models import Workload, workloads
from timing import Call, Device, graph_of
from torch import Tensor, nn

import gem_fast
from gem_fast.reference import PurePythonGEM

LR, MARGIN = 0.01, 0.5
SAMPLED = 8  # m' of the sampled steps


def main() -> None:
    """Every workload by every method, as far as the time goes."""
    device = Device.from_command_line(__doc__)
    for workload in workloads(device.dry):
        for name, method in METHODS.items():
            if name.startswith("published") and workload.name.startswith("transformer"):
                continue  # p (t + 1) float64 on the host: it takes minutes
            device.try_case(
                {"case": workload.name, "per_task": workload.per_task, "t": workload.t, "method": name},
                lambda workload=workload, method=method: measure(device, workload, method),
            )


def measure(device: Device, workload: Workload, method: Callable[..., Call]) -> dict[str, Any]:
    """Seconds of a step, and the most memory that it took."""
    torch.manual_seed(0)
    model = workload.new_model().to(device.device)
    memory = gem_fast.EpisodicMemory(per_task=workload.per_task)
    for task in range(workload.t):
        memory.observe(*on_device(workload.new_examples(workload.per_task), device), task)
    x, y = on_device(workload.new_examples(workload.batch), device)
    if not device.dry:
        torch.cuda.reset_peak_memory_stats()
    seconds = device.median(method(model, memory, x, y, workload.t), 1.0, most=30)
    result: dict[str, Any] = {"seconds": seconds, "parameters": trained(model)}
    if not device.dry:
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def sgd(model: nn.Module, memory: gem_fast.EpisodicMemory, x: Tensor, y: Tensor, task: int) -> Call:
    """What GEM comes on top of."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def hook(**options: Any) -> Callable[..., Call]:
    """GEM in the optimizer's step pre-hook."""

    def method(model: nn.Module, memory: gem_fast.EpisodicMemory, x: Tensor, y: Tensor, task: int) -> Call:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        gem = gem_fast.GEM(model, optimizer, memory=memory, margin=MARGIN, **options)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            gem.observe(x, y, task)
            optimizer.step()

        return step

    return method


def one_call(**options: Any) -> Callable[..., Call]:
    """GEM.step: the current batch in the same pass as the memory."""

    def method(model: nn.Module, memory: gem_fast.EpisodicMemory, x: Tensor, y: Tensor, task: int) -> Call:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        gem = gem_fast.GEM(model, optimizer, memory=memory, margin=MARGIN, **options)

        def step() -> torch.optim.Optimizer:
            gem.step(x, y, task)
            return optimizer  # which the hook does not keep

        return step

    return method


def captured(**options: Any) -> Callable[..., Call]:
    """The whole step, forward to update, as one CUDA graph that the user captured around it."""

    def method(model: nn.Module, memory: gem_fast.EpisodicMemory, x: Tensor, y: Tensor, task: int) -> Call:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        gem = gem_fast.GEM(model, optimizer, memory=memory, margin=MARGIN, **options)
        gem.observe(x, y, task)
        gem.current_task = task  # though no further batch is observed

        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

        if x.device.type == "cpu":
            return step
        return graph_of(step, warm_up=5).replay

    return method


def published(model: nn.Module, memory: gem_fast.EpisodicMemory, x: Tensor, y: Tensor, task: int) -> Call:
    """One backward per past task into columns on the device; P and the quadratic program on the host."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    learner = PurePythonGEM(model, optimizer, memory, margin=MARGIN)
    return lambda: learner.observe(x, y, task)


# Name: model, memory, x, y, task -> a step.
METHODS: dict[str, Callable[..., Call]] = {
    "SGD": sgd,
    "hook, exact": hook(),
    "hook, exact, cuda_graph": hook(cuda_graph=True),
    "hook, exact, layerwise": hook(engine=gem_fast.Fused(form="layerwise")),
    "whole step captured, exact": captured(),
    "hook, sampled": hook(memory_batch=SAMPLED),
    "hook, sampled, cuda_graph": hook(memory_batch=SAMPLED, cuda_graph=True),
    "one backward per past task": hook(engine=gem_fast.Loop()),
    "published": published,
    "step, exact": one_call(),
    "step, exact, cuda_graph": one_call(cuda_graph=True),
    "step, sampled": one_call(memory_batch=SAMPLED),
    "step, sampled, cuda_graph": one_call(memory_batch=SAMPLED, cuda_graph=True),
}


def on_device(examples: tuple[Tensor, Tensor], device: Device) -> tuple[Tensor, Tensor]:
    x, y = examples
    return x.to(device.device), y.to(device.device)


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


if __name__ == "__main__":
    use_our_solver_where_quadprog_is_missing()
    main()
