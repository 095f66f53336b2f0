"""Herding: the selected examples follow the mean of their class, as a plain reference selects them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from utils.memory_streams import batch, numbers, seen_by

from gem_fast import HerdingMemory
from gem_fast.paper.data import MNIST_5K, load_data


def turns(y: list[int], kept: list[int]) -> list[int]:
    """The classes: first those with the fewest examples kept, then those with the most candidates."""
    return sorted(set(y), key=lambda label: (kept.count(label), -y.count(label), label))


def reference(features: np.ndarray, y: np.ndarray, size: int, kept: list[int]) -> list[int]:
    """Algorithm 4 of Rebuffi et al. (2017), class by class, in NumPy; then one of each class in turn."""
    orders = []
    for label in turns(y.tolist(), kept):
        mine = np.flatnonzero(y == label)
        mean = features[mine].mean(0)
        selected: list[int] = []
        while len(selected) < len(mine):
            left = [i for i in mine if i not in selected]
            means = [features[[*selected, i]].mean(0) for i in left]
            selected.append(left[int(np.argmin([np.linalg.norm(mean - m) for m in means]))])
            if len(selected) == size:
                break
        orders.append(selected)
    in_turn = [order[k] for k in range(max(map(len, orders))) for order in orders if k < len(order)]
    return in_turn[:size]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_data(MNIST_5K)
    return data.train_images[:150].flatten(1).float() / 255, data.train_labels[:150]


def projected(x: Tensor) -> Tensor:
    return torch.tanh(x @ torch.linspace(-1, 1, 784 * 6).view(784, 6))


@pytest.mark.parametrize("feature_fn", [None, projected], ids=["pixels", "features"])
@pytest.mark.parametrize("size", [1, 7, 40, 150])
def test_equals_the_reference_on_real_digits(digits, feature_fn, size: int) -> None:
    x, y = digits
    memory = HerdingMemory(per_task=size, **({} if feature_fn is None else {"feature_fn": feature_fn}))
    for first in range(0, 150, 30):
        memory.observe(x[first : first + 30], y[first : first + 30], 0)
    features = (x if feature_fn is None else feature_fn(x)).double().numpy()
    order = reference(features, y.numpy(), size, [])
    for _ in ("while it is learned", "when another task has come"):
        kept_x, kept_y = memory.examples(0)
        assert torch.equal(kept_x, x[order])
        assert torch.equal(kept_y, y[order])
        memory.observe(x[:1], y[:1], 1)


def test_means_of_the_selected_follow_the_classes(digits) -> None:
    x, y = digits
    memory = HerdingMemory(per_task=50)
    memory.observe(x, y, 0)
    kept_x, kept_y = memory.examples(0)
    herded = first = 0.0
    for label in range(10):
        mean = x[y == label].mean(0)
        herded += float((kept_x[kept_y == label].mean(0) - mean).norm())
        first += float((x[y == label][: int((kept_y == label).sum())].mean(0) - mean).norm())
    assert herded < 0.85 * first


@settings(max_examples=60)
@given(
    size=st.integers(1, 9),
    tasks=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=15), min_size=1, max_size=5),
    batch_size=st.integers(1, 15),
)
def test_slots_left_over_go_to_the_classes_that_other_tasks_have_kept_least(size, tasks, batch_size) -> None:
    memory = HerdingMemory(per_task=size)
    expected: list[list[int]] = []
    for task, labels in enumerate(tasks):
        for part in torch.tensor(labels).split(batch_size):  # where mini-batches end does not matter
            memory.observe(torch.arange(len(part))[:, None], part, task)
        order = turns(labels, [label for kept in expected for label in kept])
        expected.append([label for k in range(size) for label in order if labels.count(label) > k][:size])
        assert [memory.examples(seen)[1].tolist() for seen in memory.tasks] == expected


@settings(max_examples=40)
@given(st.integers(2, 30), st.integers(2, 40))
def test_shrinking_keeps_what_a_smaller_memory_had_selected(total: int, n: int) -> None:
    shrunk, small = HerdingMemory(total=total), HerdingMemory(per_task=total // 2)
    seen_by(shrunk, [(0, n), (1, 1)])
    seen_by(small, [(0, n)])
    assert numbers(shrunk, 0) == numbers(small, 0)


def test_the_candidates_are_the_last_ones_and_evicted_when_another_task_comes() -> None:
    asked = []

    def noted(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        asked.append(x[:, 0].long().tolist())
        return x

    memory = HerdingMemory(per_task=3, candidates=8, feature_fn=noted)
    seen_by(memory, [(0, 5), (0, 6)])
    assert asked == []
    assert len(memory) == 3
    selected = numbers(memory, 0)
    assert asked == [[3, 4, 5, 6, 7, 8, 9, 10]]
    numbers(memory, 0)
    memory.observe(*batch(0, 2), 1)
    assert len(asked) == 1  # it had selected already
    assert memory.state_dict()["tasks"][0]["x"].shape == (3, 2)
    assert numbers(memory, 0) == selected
    memory.observe(*batch(11, 2), 0)  # the first task comes back, which ends the second
    assert asked[1:] == [[0, 1]]
    numbers(memory, 0)
    assert asked[2:] == [[*selected, 11, 12]]


@pytest.mark.parametrize(
    ("feature_fn", "message"),
    [
        (lambda x: x[:1], r"feature_fn must return a tensor of shape \(4, \.\.\.\), one row per example, got \(1, 2\)"),
        (lambda x: x.sum(), r"one row per example, got \(\)"),
        (lambda x: x.numpy(), "one row per example, got ndarray"),
        (lambda x: x / 0, "feature_fn must return finite numbers, got others"),
    ],
)
def test_features_that_cannot_be(feature_fn, message: str) -> None:
    memory = HerdingMemory(per_task=3, feature_fn=feature_fn)
    memory.observe(*batch(0, 4), 0)
    before = memory.state_dict()
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            memory.observe(*batch(0, 4), 1)
        with pytest.raises(ValueError, match=message):
            memory.examples(0)
    assert memory.tasks == [0]
    assert torch.equal(memory.state_dict()["tasks"][0]["x"], before["tasks"][0]["x"])


def test_features_that_fail_leave_all_tasks_as_they_were() -> None:
    good = True
    memory = HerdingMemory(total=12, feature_fn=lambda x: x if good else x / 0)
    seen_by(memory, [(0, 9), (1, 9)])
    good = False
    with pytest.raises(ValueError, match="feature_fn must return finite numbers"):
        memory.observe(*batch(0, 1), 2)
    assert memory.tasks == [0, 1]
    assert len(numbers(memory, 0)) == 6


def test_images_are_features() -> None:
    memory = HerdingMemory(per_task=2)
    memory.observe(torch.rand(9, 3, 4, 4), torch.zeros(9).long(), 0)
    assert memory.examples(0)[0].shape == (2, 3, 4, 4)


def test_candidates() -> None:
    with pytest.raises(ValueError, match="candidates must be at least the 5 to be selected, got 4"):
        HerdingMemory(per_task=5, candidates=4)
    with pytest.raises(ValueError, match="candidates must be at least the 9 to be selected, got 4"):
        HerdingMemory(total=9, candidates=4)
    with pytest.raises(TypeError, match="candidates must be an integer, got str"):
        HerdingMemory(per_task=5, candidates="all")
    assert HerdingMemory(per_task=5).candidates == 2048
    assert HerdingMemory(total=5120).candidates == 5120
