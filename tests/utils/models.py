"""Small models and streams, shared by the tests."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


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


class Residual(nn.Module):
    """The ResNet18 of the CIFAR-100 experiments, made small: 20 base maps, one block a stage, images (3, 8, 8)."""

    def __init__(self, maps: int = 20) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, maps, 3, padding=1, bias=False), nn.BatchNorm2d(maps), nn.ReLU(True))
        self.blocks = nn.Sequential(_Block(maps, maps, 1), _Block(maps, 2 * maps, 2), _Block(2 * maps, 2 * maps, 1))
        self.head = nn.Linear(2 * maps, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, maps_in: int, maps_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(maps_in, maps_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(maps_out),
            nn.ReLU(),
            nn.Conv2d(maps_out, maps_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(maps_out),
        )
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(maps_in, maps_out, 1, stride), nn.BatchNorm2d(maps_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def group_norm_net() -> nn.Module:
    """Takes images (3, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.ReLU(True),
        nn.Conv2d(8, 12, 3, stride=2, groups=2, padding_mode="reflect", padding=1),
        nn.GroupNorm(3, 12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


class Transformer(nn.Module):
    """An encoder of token sequences (n, 5), vocabulary 11; token 0 is padding where `masked`."""

    def __init__(
        self, batch_first: bool = True, masked: bool = False, dropout: float = 0.0, tied: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=batch_first, norm_first=masked)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 11 if tied else 3, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight
        self.batch_first = batch_first
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=h.dtype) if self.masked else None
        padding = torch.zeros_like(x, dtype=h.dtype).masked_fill(x == 0, -1e9) if self.masked else None
        h = h if self.batch_first else h.transpose(0, 1)
        h = self.encoder(h, causal, padding)
        return self.head(h.mean(1 if self.batch_first else 0))


class Autoencoder(nn.Module):
    """The decoder's layers share the encoder's weights: one is the same layer, one the same parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Linear(6, 6)
        self.wide = nn.Linear(6, 4)
        self.back = nn.ConvTranspose1d(4, 6, 1)
        self.narrow = nn.Linear(4, 6, bias=False)
        self.copy = nn.Linear(4, 6)
        self.copy.weight = self.narrow.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.wide(torch.tanh(self.square(x))))
        return self.square(torch.tanh(self.narrow(h) + self.copy(h) + self.back(h[:, :, None])[:, :, 0]))


class Recurrent(nn.Module):
    """Takes sequences (n, 4, 6)."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, batch_first: bool = True, **options: object) -> None:
        super().__init__()
        self.body = kind(6, 5, batch_first=batch_first, **options)
        self.head = nn.LazyLinear(3)
        self.batch_first = batch_first
        self(torch.zeros(2, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.body(x if self.batch_first else x.transpose(0, 1))
        return self.head(h[:, -1] if self.batch_first else h[-1])


Case = tuple[nn.Module, Callable[[int], Tensor], Callable[[int], Tensor], Loss]


def case(name: str) -> Case:
    """A model with what draws n inputs and n targets for it, and its loss."""
    model, inputs = {
        "mlp": lambda: (mlp(), rows),
        "residual": lambda: (Residual(), images),
        "group norm": lambda: (group_norm_net(), images),
        "transformer": lambda: (Transformer(), tokens),
        "transformer, positions first": lambda: (Transformer(batch_first=False), tokens),
        "transformer, masks": lambda: (Transformer(masked=True), tokens),
        "transformer, tied": lambda: (Transformer(tied=True), tokens),
        "autoencoder": lambda: (Autoencoder(), rows),
        "multi-head": lambda: (MultiHead(8), rows),
        "lstm": lambda: (Recurrent(), sequences),
        "gru": lambda: (Recurrent(nn.GRU, batch_first=False, num_layers=2, bidirectional=True), sequences),
    }[name]()
    if name == "autoencoder":
        return model, inputs, rows, F.mse_loss
    return model, inputs, classes, F.cross_entropy


CASES = (
    "mlp",
    "residual",
    "group norm",
    "transformer",
    "transformer, positions first",
    "transformer, masks",
    "transformer, tied",
    "autoencoder",
    "multi-head",
    "lstm",
    "gru",
)


def rows(n: int) -> Tensor:
    return torch.randn(n, 6)


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 8, 8)


def sequences(n: int) -> Tensor:
    return torch.randn(n, 4, 6)


def tokens(n: int) -> Tensor:
    return torch.randint(11, (n, 5))


def classes(n: int) -> Tensor:
    return torch.randint(3, (n,))
