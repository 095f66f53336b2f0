"""The same training by a plain loop and by Lightning's Trainer."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gem_fast
from utils.models import mlp, stream

TASKS, BATCHES, SIZE = 3, 4, 6


class How(NamedTuple):
    """What a training does beside the usual."""

    precision: str = "32-true"
    accumulate: int = 1
    clip: float | None = None
    manual: bool = False
    rule: Callable[..., gem_fast.GEM] = gem_fast.GEM


def loader(tasks: Sequence[int] = range(TASKS), ranks: int = 1) -> DataLoader:
    """(x, y, task), task after task; on several ranks every rank has its part of each mini-batch."""
    batches = [(x, y, torch.full_like(y, task)) for x, y, task in stream(TASKS, BATCHES, SIZE) if task in tasks]
    data = TensorDataset(*map(torch.cat, zip(*batches, strict=True)))
    # Lightning's own sampler would shuffle the tasks.
    sampler = DistributedSampler(data, shuffle=False) if ranks > 1 else None
    return DataLoader(data, SIZE // ranks, sampler=sampler)


def new() -> nn.Module:
    torch.manual_seed(0)
    return mlp()


def hook(how: How, model: nn.Module, optimizer: torch.optim.Optimizer, per_task: int) -> gem_fast.GEM:
    return how.rule(model, optimizer, memory=gem_fast.EpisodicMemory(per_task=per_task))


class Module(pl.LightningModule):
    """Two lines are the hook's: it is made in configure_optimizers, and it observes in training_step."""

    def __init__(self, how: How, hooked: str = "net", per_task: int = 8) -> None:
        super().__init__()
        self.net = new()
        self.how, self.hooked, self.per_task = how, hooked, per_task
        self.automatic_optimization = not how.manual
        self.violations = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], i: int) -> Tensor | None:
        x, y, task = batch
        loss = F.cross_entropy(self(x), y)
        self.gem.observe(x, y, int(task[0]))
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss / self.how.accumulate)
        if (i + 1) % self.how.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        self.gem = hook(self.how, self.net if self.hooked == "net" else self, optimizer, self.per_task)
        return optimizer

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.how.manual and self.how.clip:  # the gradients are unscaled from here on
            self.clip_gradients(optimizer, self.how.clip, "norm")

    def on_train_batch_end(self, *args: Any) -> None:
        if self.gem.last is not None:
            self.violations += bool(self.gem.last.violations.any())


def trainer(how: How = How(), epochs: int = 1, **options: Any) -> pl.Trainer:
    if not how.manual:
        options |= {"accumulate_grad_batches": how.accumulate, "gradient_clip_val": how.clip}
    if how.precision == "16-mixed":  # which a Trainer refuses on a CPU
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        options["plugins"] = MixedPrecision("16-mixed", "cpu", scaler)
    else:
        options["precision"] = how.precision
    options = {"logger": False, "enable_checkpointing": False} | options
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options
    )


def plain(how: How, per_task: int = 8) -> Tensor:
    """The parameters after training without Lightning."""
    model = new()
    if how.precision.endswith("-true"):
        dtype = {"32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}[how.precision[:-5]]
        model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gem = hook(how, model, optimizer, per_task)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=how.precision == "16-mixed")
    autocast = contextlib.nullcontext()
    if how.precision.endswith("mixed"):
        autocast = torch.autocast("cpu", torch.bfloat16 if how.precision.startswith("bf") else torch.float16)
    for i, (x, y, task) in enumerate(loader()):
        x = x.to(next(model.parameters()).dtype)
        with autocast:
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss / how.accumulate).backward()
        gem.observe(x, y, int(task[0]))
        if (i + 1) % how.accumulate == 0:
            scaler.unscale_(optimizer)
            if how.clip:
                nn.utils.clip_grad_norm_(model.parameters(), how.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return weights(model)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])
