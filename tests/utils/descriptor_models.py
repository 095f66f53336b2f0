"""Models that take a descriptor of the task, for examples (n, 6) of three classes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Modulated(nn.Module):
    """A hidden layer scaled and shifted by a linear map of the descriptor: (4,), (1, 4), or (n, 4) one per example."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.modulation = nn.Linear(size, 16)
        self.b = nn.Linear(8, 3)

    def forward(self, x: Tensor, descriptor: Tensor) -> Tensor:
        scale, shift = self.modulation(descriptor).chunk(2, -1)
        return self.b(F.relu(self.a(x) * (1 + scale) + shift))


class Hypernetwork(nn.Module):
    """The last layer's weight and bias are made of the descriptor (4,), of which it takes one only."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.makes = nn.Sequential(nn.Linear(size, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 27))

    def forward(self, x: Tensor, descriptor: Tensor) -> Tensor:
        made = self.makes(descriptor)
        return F.linear(F.relu(self.a(x)), made[:24].view(3, 8), made[24:])


class NamedClasses(nn.Module):
    """Logits are products with embeddings of the classes' names (3, size); `many`: of those of each example, too."""

    def __init__(self, size: int = 4, *, many: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.names = nn.Linear(size, 8)
        self.many = many

    def forward(self, x: Tensor, descriptor: Tensor) -> Tensor:
        h, names = self.a(x).tanh(), self.names(descriptor)
        return (
            torch.einsum("nf,...cf->nc" if names.dim() == 2 else "nf,ncf->nc", h, names) if self.many else h @ names.T
        )


class TextClasses(nn.Module):
    """The same for names that are rows of tokens, (3, length): attention, normalisation and convolution over them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.tokens = nn.Embedding(11, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.over_names = nn.GroupNorm(2, 8)
        self.mixed = nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor, descriptor: Tensor) -> Tensor:
        h = self.tokens(descriptor)
        h, _ = self.attention(h, h, h, need_weights=False)
        names = self.mixed(self.over_names(h.mT)).mean(2)
        return self.a(x).tanh() @ names.T


class Affine(nn.Module):
    """A module that owns its parameters: h (n, 8), scaled by a product with the descriptor (4,)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))

    def forward(self, h: Tensor, descriptor: Tensor) -> Tensor:
        return h * (self.weight @ descriptor)


class WithOwnModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale, self.b = nn.Linear(6, 8), Affine(), nn.Linear(8, 3)

    def forward(self, x: Tensor, descriptor: Tensor) -> Tensor:
        return self.b(self.scale(self.a(x), descriptor).tanh())


class ModulatedHeads(nn.Module):
    """Takes the task's id and its descriptor, and works without one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Modulated()
        self.heads = nn.ModuleList(nn.Linear(3, 3) for _ in range(8))

    def forward(self, x: Tensor, task: int, descriptor: Tensor | None = None) -> Tensor:
        return self.heads[task](self.body(x, x.new_zeros(4) if descriptor is None else descriptor))


class Centred(nn.Module):
    """Takes the mean off the descriptor's first dimension: over a mini-batch of several it mixes examples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Modulated()

    def forward(self, x: Tensor, descriptor: Tensor) -> Tensor:
        return self.inner(x, descriptor - descriptor.mean(0))


class FromTwo(nn.Module):
    """A nest as its descriptor: {"angle": (2,), "text": {"tokens": (5,), "is_short": bool}}."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 4)
        self.inner = Modulated(6)

    def forward(self, x: Tensor, descriptor: dict) -> Tensor:  # type: ignore[type-arg]
        text = descriptor["text"]
        words = self.tokens(text["tokens"]).mean(-2)
        return self.inner(x, torch.cat([descriptor["angle"], words if text["is_short"] else -words], -1))
