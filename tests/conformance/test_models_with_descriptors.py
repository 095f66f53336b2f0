"""Models that take a descriptor of the task: engines and forms against the loop, and the calls that a pass takes."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from utils.descriptor_models import (
    Centred,
    FromTwo,
    Hypernetwork,
    Modulated,
    ModulatedHeads,
    NamedClasses,
    TextClasses,
    WithOwnModule,
)
from utils.engines import assert_as_the_loop, half_of_each, memory, trained
from utils.models import classes, rows

from gem_fast import Fused, Objective

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (4, 3, 4, 5)


def vectors(*shape: int) -> list[Tensor]:
    return [torch.randn(shape) for _ in SIZES]


def nests() -> list[Any]:
    return [{"angle": torch.randn(2), "text": {"tokens": torch.randint(11, (5,)), "is_short": True}} for _ in SIZES]


def names_of_tokens() -> list[Tensor]:
    return [torch.randint(11, (3, 5)) for _ in SIZES]


# Each with its descriptors, and whether one call takes those of all tasks.
CASES: dict[str, tuple[Any, Any, bool]] = {
    "modulation": (Modulated, lambda: vectors(4), True),
    "modulation, a row": (Modulated, lambda: vectors(1, 4), True),
    "a nest": (FromTwo, nests, True),
    "class embeddings of each example": (lambda: NamedClasses(many=True), lambda: vectors(3, 4), True),
    "class embeddings": (NamedClasses, lambda: vectors(3, 4), False),
    "class names as tokens": (TextClasses, names_of_tokens, False),
    "hypernetwork": (Hypernetwork, lambda: vectors(4), False),
    "own module": (WithOwnModule, lambda: vectors(4), False),
    "task and descriptor": (ModulatedHeads, lambda: vectors(4), False),
    "mixing": (Centred, lambda: vectors(4), False),
    "descriptors of some tasks": (ModulatedHeads, lambda: [None, *vectors(4)[1:]], False),
    "descriptors of several shapes": (Centred, lambda: [torch.randn(1 + k % 2, 4)[-1:] for k in range(4)], False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_loop(name: str, sampled: bool, dtype: torch.dtype) -> None:
    make, descriptors, _ = CASES[name]
    model = make().to(dtype)
    batches = memory(SIZES, rows, classes, dtype, descriptors())
    sample = half_of_each(SIZES) if sampled else None
    assert_as_the_loop(model, batches, pass_task=isinstance(model, ModulatedHeads), sample=sample)


@pytest.mark.parametrize("name", CASES)
def test_one_call_takes_all_tasks_where_the_model_lets_it(name: str) -> None:
    make, descriptors, is_one = CASES[name]
    model = make().double()
    batches = memory(SIZES, rows, classes, descriptors=descriptors())
    objective = Objective(model, F.cross_entropy, isinstance(model, ModulatedHeads))
    engine = Fused()
    for _ in range(2):
        engine(objective, batches, trained(model))
    with mock.patch.object(type(model), "forward", autospec=True, side_effect=type(model).forward) as forward:
        engine(objective, batches, trained(model))  # the third pass, which is not compared
    assert forward.call_count == (1 if is_one else len(SIZES))


@settings(max_examples=20)
@given(
    make=st.sampled_from([Modulated, Hypernetwork, NamedClasses]),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    size=st.integers(1, 6),
    tasks_per_pass=st.one_of(st.none(), st.integers(1, 6)),
    sampled=st.booleans(),
)
def test_dimensions_that_are_as_long_as_there_are_examples(
    make: Any, sizes: list[int], size: int, tasks_per_pass: int | None, sampled: bool
) -> None:
    model = make(size).double()
    shape = (3, size) if make is NamedClasses else (size,)
    batches = memory(sizes, rows, classes, descriptors=[torch.randn(shape) for _ in sizes])
    sample = half_of_each(sizes) if sampled else None
    options = {} if tasks_per_pass is None else {"tasks_per_pass": tasks_per_pass}
    assert_as_the_loop(model, batches, sample=sample, tolerance=1e-9, **options)


def test_a_task_whose_descriptor_takes_a_call_of_its_own_joins_later() -> None:
    """Until then one call took all; what it took with the new task would be wrong, or fails."""
    model = nn.ModuleDict({"centred": Centred()}).double()["centred"]
    objective = Objective(model, F.cross_entropy)
    batches = memory(SIZES, rows, classes, descriptors=[*[torch.randn(1, 4)] * 3, torch.randn(2, 4)[1:]])
    engine, fresh = Fused(), Fused()
    for t in (2, 3, 4):
        G = engine(objective, batches[:t], trained(model)).G
        assert torch.allclose(G, fresh(objective, batches[:t], trained(model)).G, rtol=1e-10, atol=1e-12)
