"""The models whose training steps are measured, and what their batches look like."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gem_fast.paper.models import ResNet18, mlp


@dataclass(frozen=True)
class Workload:
    """A model with a batch of the current task and memories of past ones.

    Attributes:
        batch: examples of the current task.
        per_task: examples of each past task.
        t: past tasks.
    """

    name: str
    new_model: Callable[[], nn.Module]
    new_examples: Callable[[int], tuple[Tensor, Tensor]]
    batch: int
    per_task: int
    t: int


class Transformer(nn.Module):
    """A decoder of GPT-2's kind; its output layer shares the embedding's weight.

    Args:
        layers: blocks; 12 with 768 features and 12 heads is GPT-2 small, 124 million parameters.
        lora: rank of a low-rank adaptation of the attention's weights, everything else being frozen; 0 for none.
    """

    def __init__(self, layers: int, features: int, heads: int, words: int, length: int, lora: int = 0) -> None:
        super().__init__()
        self.words = nn.Embedding(words, features)
        self.positions = nn.Embedding(length, features)
        self.blocks = nn.ModuleList(Block(features, heads, lora) for _ in range(layers))
        self.norm = nn.LayerNorm(features)
        self.out = nn.Linear(features, words, bias=False)
        self.out.weight = self.words.weight
        if lora:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("lora" in name)

    def forward(self, x: Tensor) -> Tensor:
        """(n, positions) words as logits (n, words, positions)."""
        h = self.words(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.out(self.norm(h))
        return logits.transpose(1, 2)


class Block(nn.Module):
    """Attention and two linear layers, each after a layer norm and beside a shortcut."""

    def __init__(self, features: int, heads: int, lora: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * features)
        self.lora = (
            nn.Sequential(nn.Linear(features, lora, False), nn.Linear(lora, 3 * features, False)) if lora else None
        )
        self.project = nn.Linear(features, features)
        self.mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))

    def forward(self, h: Tensor) -> Tensor:
        x = self.before_attention(h)
        qkv = self.qkv(x) if self.lora is None else self.qkv(x) + self.lora(x)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.project(mixed.transpose(1, 2).flatten(2))
        out: Tensor = h + self.mlp(self.before_mlp(h))
        return out


def digits(n: int) -> tuple[Tensor, Tensor]:
    # A fifth of a digit's pixels are not zero.
    x = torch.rand(n, 784)
    return x * (torch.rand(n, 784) < 0.2), torch.randint(10, (n,))


def images(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 32, 32), torch.randint(100, (n,))


def workloads(dry: bool) -> list[Workload]:
    """All of them, the most telling first."""
    size = (2, 32, 2, 50, 8) if dry else (12, 768, 12, 50257, 64)
    _, _, _, words, length = size

    def sentences(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(words, (n, length + 1))
        return x[:, :-1].contiguous(), x[:, 1:].contiguous()

    def transformer(lora: int) -> Callable[[], nn.Module]:
        return lambda: Transformer(*size, lora=lora)

    def few(n: int) -> int:
        return min(n, 4) if dry else n

    def tasks(t: int) -> int:
        return min(t, 2) if dry else t

    resnet = (lambda: ResNet18(100, 4)) if dry else (lambda: ResNet18(100))
    return [
        Workload("MLP, MNIST", lambda: mlp(784, 10), digits, 10, few(256), tasks(19)),
        Workload("ResNet18", resnet, images, 10, few(64), tasks(19)),
        Workload("transformer, LoRA", transformer(8), sentences, few(8), few(8), tasks(5)),
        Workload("transformer", transformer(0), sentences, few(8), few(8), tasks(5)),
        *(
            Workload("ResNet18", resnet, images, 10, few(per_task), tasks(t))
            for t, per_task in ((5, 64), (19, 10), (5, 10), (5, 256), (19, 256))
            if not dry
        ),
    ]
