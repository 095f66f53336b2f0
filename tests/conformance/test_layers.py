"""Each rule on its own: the fused engine's rows are the loop's."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from utils.engines import assert_as_the_loop, memory
from utils.layers import LAYERS, Attention, Head, of
from utils.models import Recurrent, classes

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (4, 3, 4)


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
