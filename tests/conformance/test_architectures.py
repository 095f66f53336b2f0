"""Every engine and form of G against the loop, on whole models: architectures, dtypes, losses, memory sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from utils.engines import assert_as_the_loop, assert_untouched, fused, memory, trained
from utils.forwards import WAYS, Net
from utils.models import CASES, case, classes, mlp, rows, sequences

from gem_fast import Sample
from gem_fast.paper.models import ResNet18

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (4, 3, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_loop(name: str, training: bool, dtype: torch.dtype) -> None:
    model, inputs, targets, loss_fn = case(name)
    model = model.to(dtype).train(training)
    batches = memory(SIZES, inputs, targets, dtype)
    assert_as_the_loop(model, batches, loss_fn, pass_task=name == "multi-head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_loop_on_the_resnet18_of_the_paper(training: bool, dtype: torch.dtype) -> None:
    model = ResNet18(100, maps=20).to(dtype).train(training)
    batches = memory((2, 3, 2), lambda n: torch.randn(n, 3, 32, 32), lambda n: torch.randint(100, (n,)), dtype)
    # 20 layers of batch normalisation over few examples make more of float32's rounding than one layer does.
    assert_as_the_loop(model, batches, tolerance=1e-10 if dtype == torch.float64 else 1e-3)


@settings(max_examples=30)
@given(
    name=st.sampled_from(["mlp", "residual", "transformer, positions first", "multi-head"]),
    sizes=st.lists(st.integers(2, 6), min_size=1, max_size=6),
    tasks_per_pass=st.one_of(st.none(), st.integers(1, 7)),
    activation_bytes=st.sampled_from([1, 10_000, 100_000, 2**30]),
    sampled=st.booleans(),
)
def test_any_numbers_of_tasks_and_examples(
    name: str, sizes: list[int], tasks_per_pass: int | None, activation_bytes: int, sampled: bool
) -> None:
    model, inputs, targets, loss_fn = case(name)
    batches = memory(sizes, inputs, targets)
    sample = None
    if sampled:
        # The first two examples of each task, the last one in front.
        starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
        sample = Sample((starts[:, None] + torch.tensor([1, 0])).flatten(), [2] * len(sizes))
    options = {"activation_bytes": activation_bytes}
    if tasks_per_pass is not None:
        options["tasks_per_pass"] = tasks_per_pass
    assert_as_the_loop(
        model.double(), batches, loss_fn, pass_task=name == "multi-head", sample=sample, tolerance=1e-9, **options
    )


# ---- losses ----------------------------------------------------------------------------------------------------------


def positions(n: int) -> Tensor:
    return torch.randint(3, (n, 4))


def partly_ignored(n: int) -> Tensor:
    return torch.cat([torch.randint(3, (n - 1,)), torch.tensor([-100])])


def distributions(n: int) -> Tensor:
    return torch.randn(n, 3).softmax(1)


def sliced(output: Tensor, target: Tensor) -> Tensor:
    """Targets 2 k and 2 k + 1 belong to task k, which has the outputs 2 k and 2 k + 1 of 8."""
    first = 2 * int(target[0] // 2)
    return F.cross_entropy(output[:, first : first + 2], target - first)


@pytest.mark.parametrize(
    ("loss_fn", "targets"),
    [
        (F.cross_entropy, distributions),
        (nn.CrossEntropyLoss(), classes),
        (nn.CrossEntropyLoss(), distributions),
        (F.cross_entropy, partly_ignored),
        (nn.CrossEntropyLoss(ignore_index=1), lambda n: torch.arange(n) % 3),
        (nn.CrossEntropyLoss(label_smoothing=0.1), classes),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double()), classes),
        (F.mse_loss, lambda n: torch.randn(n, 3)),
        (nn.SmoothL1Loss(), lambda n: torch.randn(n, 3)),
        (lambda output, target: F.cross_entropy(output, target) + output.square().mean(), classes),
    ],
)
@pytest.mark.parametrize("sizes", [(4, 4, 4), SIZES], ids=["equal", "ragged"])
def test_losses(loss_fn: Any, targets: Callable[[int], Tensor], sizes: tuple[int, ...]) -> None:
    assert_as_the_loop(mlp(torch.float64), memory(sizes, rows, targets), loss_fn)


@pytest.mark.parametrize("sizes", [(4, 4, 4), SIZES], ids=["equal", "ragged"])
@pytest.mark.parametrize("targets", [positions, lambda n: torch.where(torch.rand(n, 4) < 0.3, -100, positions(n))])
def test_cross_entropy_over_positions(targets: Callable[[int], Tensor], sizes: tuple[int, ...]) -> None:
    model = nn.Conv1d(4, 3, 3).double()
    assert_as_the_loop(model, memory(sizes, sequences, targets))


def test_per_task_slices_of_the_outputs() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 8)).double()
    batches = [[b._replace(y=2 * b.task + b.y % 2)] for [b] in memory(SIZES, rows, classes)]
    assert_as_the_loop(model, batches, sliced)


def test_loss_must_be_a_scalar() -> None:
    model = mlp()
    engine = fused(model, nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match=r"loss_fn must return a scalar, the mean over the examples, got shape \(4,\)"):
        engine(memory(SIZES, rows, classes, torch.float32), trained(model))
    assert_untouched(model)


# ---- ways in which models use their layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_use(way: str) -> None:
    net = Net(WAYS[way])
    if way == "one layer frozen":
        net.a.requires_grad_(False)
    assert_as_the_loop(net, memory(SIZES, rows, classes))


# ---- inputs that are the same for all examples -----------------------------------------------------------------------


class Positions(nn.Module):
    """Token sequences (n, 5) with learned positions, which a layer gets once for all examples."""

    def __init__(self, shape: tuple[int, ...], scaled: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(7, 8)
        self.scale = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) if scaled else nn.Identity()
        self.register_buffer("position_ids", torch.arange(5).view(shape))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.scale(self.positions(self.position_ids))
        return self.head(torch.tanh(h).mean(1))


@pytest.mark.parametrize("sizes", [SIZES, (3, 2, 2), (1, 4, 5)], ids=str)  # also as many examples as positions
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(1, 5), (5,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positions(shape: tuple[int, ...], scaled: bool, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    batches = memory(sizes, lambda n: torch.randint(11, (n, 5)), classes, dtype)
    assert_as_the_loop(Positions(shape, scaled).to(dtype), batches)
