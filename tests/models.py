"""Small models and streams, shared by the tests."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiHead(nn.Module):
    """One output layer per task behind a shared body."""

    def __init__(self, tasks: int = 3) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in range(tasks))

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.heads[task](F.relu(self.body(x)))


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def conv() -> nn.Module:
    """Takes the same (n, 6) inputs as `mlp`."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def stream(
    tasks: int, batches: int = 4, n: int = 5, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Mini-batches of tasks that disagree: the same inputs, other labels."""
    generator = torch.Generator().manual_seed(1)
    for task in range(tasks):
        for _ in range(batches):
            x = torch.randn(n, 6, generator=generator)
            yield x.to(dtype), (x[:, :3].argmax(1) + task) % 3, task
