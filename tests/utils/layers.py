"""Every kind of layer that the fused engine has a rule for, and small models around one layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Head(nn.Module):
    """Sums a layer's outputs, weighted so that each position counts differently, to logits of three classes."""

    def __init__(self, layer: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.after = after or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.after(self.layer(x)).flatten(1)
        weights = torch.linspace(-1, 1, 3 * h.shape[1], dtype=h.dtype, device=h.device).sin()
        return h @ weights.view(-1, 3)


def of(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "linear, no bias": (lambda: nn.Linear(6, 5, bias=False), (6,)),
    "linear, one more dimension": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear, one more dimension, no bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "linear, three more dimensions": (lambda: nn.Linear(6, 5), (2, 3, 2, 6)),
    "linear, one feature": (lambda: nn.Linear(1, 1), (1,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), (4, 9)),
    "conv1d, same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2), (4, 9)),
    "conv1d, valid, circular": (lambda: nn.Conv1d(4, 6, 3, padding="valid", padding_mode="circular"), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 6)),
    "conv2d, all options": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2), groups=2), (4, 7, 8)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 6, 6)),
    "conv2d, reflect": (lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"), (3, 6, 6)),
    "conv2d, circular, same": (lambda: nn.Conv2d(3, 4, 2, padding="same", padding_mode="circular"), (3, 6, 6)),
    "conv2d, replicate": (lambda: nn.Conv2d(3, 4, 3, 2, padding=1, padding_mode="replicate"), (3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=(0, 1, 0), groups=2), (2, 3, 4, 3)),
    "conv3d, same": (lambda: nn.Conv3d(2, 3, 3, padding="same", bias=False), (2, 3, 4, 3)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), (4, 5)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 3, 3, 2, 1, 1, bias=False, dilation=2), (4, 4, 4)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 2)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(5), (5,)),
    "batch norm 1d, positions": (lambda: nn.BatchNorm1d(5, momentum=0.3), (5, 4)),
    "batch norm 2d, cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (3, 4, 4)),
    "batch norm 2d, no statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (3, 4, 4)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(3), (3, 2, 2, 2)),
    "layer norm": (lambda: nn.LayerNorm(6), (4, 6)),
    "layer norm, two dimensions": (lambda: nn.LayerNorm((4, 6), eps=0.1), (4, 6)),
    "layer norm, no bias": (lambda: nn.LayerNorm(6, bias=False), (2, 4, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6, eps=0.1), (6, 3, 3)),
    "group norm, features": (lambda: nn.GroupNorm(3, 6), (6,)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 4, 4)),
    "instance norm, statistics": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (3, 4, 4)),
    "instance norm 1d, momentum": (
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True, momentum=0.4),
        (3, 4),
    ),
    "rms norm": (lambda: nn.RMSNorm(6), (4, 6)),
    "rms norm, two dimensions": (lambda: nn.RMSNorm((4, 6), eps=0.1), (4, 6)),
    "own rms norm": (lambda: OwnRMSNorm(6), (4, 6)),
    "own rms norm, features": (lambda: OwnRMSNorm(6), (6,)),
    "own rms norm, from zero": (lambda: OwnRMSNorm(6, from_zero=True), (2, 4, 6)),
    "own rms norm, gated": (lambda: Gated(OwnRMSNorm(6)), (4, 6)),
    "prelu": (lambda: nn.PReLU(4, init=0.1), (4, 3)),
    "one number": (lambda: Scale(()), (4, 3)),
    "a custom module": (lambda: Scale((3, 4)), (4, 3)),
    "parameters in a list": (lambda: Listed(nn.ParameterList), (4, 6)),
    "parameters in a dict": (lambda: Listed(nn.ParameterDict), (4, 6)),
    "a parameter that a child has, too": (lambda: BiasOfChild(), (4, 6)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 5)), (6,)),
    "weight norm, no bias": (lambda: parametrizations.weight_norm(nn.Linear(6, 5, bias=False)), (6,)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(6, 5, bias=False)), (6,)),
}


class Scale(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sinh(x * self.weight) if self.weight.dim() == 0 else x @ self.weight


class OwnRMSNorm(nn.Module):
    """As language models bring it along: in float32 whatever comes in, with the weight as it is or added to 1."""

    def __init__(self, features: int, from_zero: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features) if from_zero else torch.ones(features))
        self.from_zero = from_zero

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        h = x.float()
        h = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        y = h * (1 + self.weight if self.from_zero else self.weight)
        return y if gate is None else y * torch.sigmoid(gate)


class Gated(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, x.sin())


class Listed(nn.Module):
    """Has its parameters in a container."""

    def __init__(self, kind: type[nn.ParameterList] | type[nn.ParameterDict]) -> None:
        super().__init__()
        weights = [nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6, 5))]
        self.weights = (
            nn.ParameterList(weights) if kind is nn.ParameterList else nn.ParameterDict(zip("ab", weights, strict=True))
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.weights if isinstance(self.weights, nn.ParameterList) else self.weights.values()
        return (x * a).sin() @ b


class BiasOfChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(6, 5)
        self.bias = self.child.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x)


class Attention(nn.Module):
    """Attends from x (n, 5, 6) to itself, or to what a linear layer makes of it."""

    def __init__(self, cross: bool = False, masks: tuple[str, ...] = (), weights: bool = False, **options: int) -> None:
        super().__init__()
        self.keys = nn.Linear(6, options.get("kdim", 6)) if cross else None
        self.values = nn.Linear(6, options.get("vdim", 6)) if cross else None
        self.attention = nn.MultiheadAttention(6, 2, **{"batch_first": True, **options})
        self.masks = masks
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        first = self.attention.batch_first
        padding = (x[:, :, 0] > 0.8) & (torch.arange(5) > 0) if "padding" in self.masks else None
        mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1) if "causal" in self.masks else None
        if "added" in self.masks:
            mask = torch.linspace(-1, 1, 25, dtype=x.dtype).view(5, 5)
        if "per head" in self.masks:
            mask = (x[:, :1].mean(2, keepdim=True) * torch.ones(5, 5, dtype=x.dtype)).repeat_interleave(2, 0)
        query = x if first else x.transpose(0, 1)
        key = query if self.keys is None else self.keys(query)
        value = query if self.values is None else self.values(query)
        h, weights = self.attention(query, key, value, padding, self.weights, mask)
        h = h if first else h.transpose(0, 1)
        if self.weights:
            h = h * weights.sum(1, keepdim=True).mT[:, :, :1]
        return h.mean(1)[:, :3]
