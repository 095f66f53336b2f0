"""Each rule on its own: the fused engine's rows are the loop's."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from engines import assert_as_the_loop, memory
from models import Recurrent, classes
from torch import Tensor, nn
from torch.nn.utils import parametrizations

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (4, 3, 4)


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
    "prelu": (lambda: nn.PReLU(4, init=0.1), (4, 3)),
    "one number": (lambda: Scale(()), (4, 3)),
    "a custom module": (lambda: Scale((3, 4)), (4, 3)),
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


@pytest.mark.parametrize("sizes", [(4, 4, 4), SIZES], ids=["equal", "ragged"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, sizes: tuple[int, ...]) -> None:
    layer, shape = LAYERS[name]
    model = Head(layer()).double()
    for parameter in model.parameters():  # norms start from ones and zeros
        torch.nn.init.normal_(parameter)
    assert_as_the_loop(model, memory(sizes, of(*shape), classes))


@pytest.mark.parametrize("name", ["batch norm 2d, cumulative", "instance norm, statistics", "batch norm 1d"])
def test_layer_in_evaluation_mode(name: str) -> None:
    layer, shape = LAYERS[name]
    model = Head(layer()).double()
    model(torch.randn(8, *shape).double())
    assert_as_the_loop(model.eval(), memory(SIZES, of(*shape), classes))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(nn.BatchNorm2d, affine=False), nn.InstanceNorm2d])
def test_norms_between_layers_see_one_task_at_a_time(norm: Callable[[int], nn.Module]) -> None:
    model = Head(nn.Sequential(nn.Conv2d(3, 4, 2), norm(4), nn.Conv2d(4, 4, 2))).double()
    assert_as_the_loop(model, memory(SIZES, of(3, 4, 4), classes))


def test_running_statistics_are_those_of_one_pass_per_task_in_order_to_the_bit() -> None:
    model = Head(nn.BatchNorm2d(3)).double()
    engine = assert_as_the_loop(model, memory(SIZES, of(3, 4, 4), classes), tolerance=1e-10)
    twin = Head(nn.BatchNorm2d(3)).double()
    model.layer.reset_running_stats()
    batches = memory(SIZES, of(3, 4, 4), classes)
    engine(batches, list(model.parameters()))
    for [batch] in batches:
        twin(batch.x)
    for mine, right in zip(model.buffers(), twin.buffers(), strict=True):
        assert mine.equal(right)


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_embedding(shape: tuple[int, ...], padding_idx: int | None) -> None:
    model = Head(nn.Embedding(7, 5, padding_idx=padding_idx), nn.Tanh()).double()
    assert_as_the_loop(model, memory(SIZES, lambda n: torch.randint(7, (n, *shape)), classes))


@pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq"])
def test_embeddings_that_look_at_the_whole_mini_batch_are_left_to_the_loop(option: str) -> None:
    model = Head(nn.Embedding(7, 5, **{option: True}), nn.Tanh()).double()
    inputs = memory(SIZES, lambda n: torch.randint(7, (n, 4)), classes)
    assert_as_the_loop(model, inputs, fallback=f"Embedding has the option {option}")


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": False},
        {"bias": False},
        {"cross": True},
        {"cross": True, "batch_first": False},
        {"masks": ("padding",)},
        {"masks": ("causal",)},
        {"masks": ("padding", "causal")},
        {"masks": ("added",), "batch_first": False},
        {"masks": ("per head",)},
        {"weights": True},
        {"weights": True, "masks": ("padding",), "batch_first": False},
        {"cross": True, "kdim": 4, "vdim": 3},
        {"add_bias_kv": True},
        {"add_zero_attn": True, "masks": ("padding",)},
    ],
    ids=str,
)
def test_attention(options: dict[str, object]) -> None:
    assert_as_the_loop(Attention(**options).double(), memory(SIZES, of(5, 6), classes))


def test_attention_to_shared_keys_and_values() -> None:
    model = Attention(cross=True)
    model.values = model.keys
    assert_as_the_loop(model.double(), memory(SIZES, of(5, 6), classes))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent(kind: type[nn.RNNBase], batch_first: bool) -> None:
    model = Recurrent(kind, batch_first, num_layers=2, bidirectional=True).double()
    assert_as_the_loop(model, memory(SIZES, of(4, 6), classes))


class Two(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, :3], x[:, 3:])


def test_bilinear() -> None:
    assert_as_the_loop(Two(nn.Bilinear(3, 3, 3)).double(), memory(SIZES, of(6), classes))


def test_size_of_a_transposed_convolution_given_in_the_call() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, output_size=[8, 8])

    assert_as_the_loop(Head(Sized()).double(), memory(SIZES, of(3, 4, 4), classes))


@pytest.mark.parametrize("name", ["conv2d", "conv2d, all options", "transposed conv2d", "batch norm 3d"])
def test_inputs_in_another_memory_format(name: str) -> None:
    layer, shape = LAYERS[name]
    last = {4: torch.channels_last, 5: torch.channels_last_3d}[1 + len(shape)]
    batches = memory(SIZES, lambda n: torch.randn(n, *shape).to(memory_format=last), classes)
    assert_as_the_loop(Head(layer()).double(), batches)
    assert_as_the_loop(Head(layer()).double().to(memory_format=last), batches)


@pytest.mark.parametrize("name", ["linear, one more dimension", "layer norm", "rms norm", "conv1d", "group norm"])
def test_inputs_that_are_not_contiguous(name: str) -> None:
    layer, shape = LAYERS[name]
    model = Head(layer()).double()

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x.transpose(1, 2))

    shape = (shape[1], shape[0], *shape[2:])
    assert_as_the_loop(Turned(), memory(SIZES, of(*shape), classes))


@pytest.mark.parametrize("name", ["linear", "conv2d", "layer norm", "batch norm 2d, cumulative", "group norm"])
def test_bfloat16(name: str) -> None:
    layer, shape = LAYERS[name]
    model = Head(layer()).bfloat16()
    assert_as_the_loop(model, memory(SIZES, of(*shape), classes, torch.bfloat16), tolerance=0.05)
