"""gem_fast.metrics against the sums of equations 2-4 written out, and its refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gem_fast import metrics

accuracies = st.floats(0, 1)


@st.composite
def r_and_baseline(draw, least=1):
    n = draw(st.integers(least, 8))
    return draw(arrays(np.float64, (n, n), elements=accuracies)), draw(arrays(np.float64, n, elements=accuracies))


@given(r_and_baseline(least=2))
def test_equations_2_to_4(case):
    R, baseline = case
    T = len(R)
    assert metrics.acc(R) == pytest.approx(sum(R[T - 1, i] for i in range(T)) / T)
    assert metrics.bwt(R) == pytest.approx(sum(R[T - 1, i] - R[i, i] for i in range(T - 1)) / (T - 1))
    assert metrics.fwt(R, baseline) == pytest.approx(sum(R[i - 1, i] - baseline[i] for i in range(1, T)) / (T - 1))


@given(r_and_baseline(), st.floats(-1, 1))
def test_transfer_is_about_differences(case, shift):
    R, baseline = case
    assert metrics.acc(R + shift) == pytest.approx(metrics.acc(R) + shift)
    assert metrics.bwt(R + shift) == pytest.approx(metrics.bwt(R), abs=1e-12)
    assert metrics.fwt(R + shift, baseline + shift) == pytest.approx(metrics.fwt(R, baseline), abs=1e-12)


@given(r_and_baseline())
def test_nothing_learned_or_forgotten_is_zero(case):
    _, baseline = case
    R = np.tile(baseline, (len(baseline), 1))
    assert metrics.bwt(R) == 0
    assert metrics.fwt(R, baseline) == 0


def test_one_task_transfers_nothing():
    assert (metrics.acc([[0.7]]), metrics.bwt([[0.7]]), metrics.fwt([[0.7]], [0.1])) == (0.7, 0.0, 0.0)


@given(r_and_baseline(), st.data())
def test_r_is_the_last_row_of_each_task(case, data):
    R, _ = case
    T = len(R)
    noise = data.draw(st.lists(st.integers(0, T - 1), max_size=10))
    curves = np.vstack([np.full((len(noise), T), 0.5), R])
    order = data.draw(st.permutations(range(T)))
    curves[len(noise) :] = R[order]
    np.testing.assert_array_equal(metrics.r_matrix(curves, [*noise, *order]), R)


@given(st.data(), st.integers(1, 6))
def test_zero_shot_is_the_accuracy_on_tasks_that_have_not_come_yet(data, n):
    order = data.draw(st.permutations(range(n)))
    # Some evaluations while each task is learned, and then tasks that come back.
    tasks = [task for task in order for _ in range(data.draw(st.integers(1, 3)))]
    curves = data.draw(arrays(np.float64, (len(tasks) + 2, n), elements=accuracies))
    got = metrics.zero_shot(curves, [*tasks, order[0], order[0]])
    assert got.shape == (n - 1,)
    for i, task in enumerate(order[:-1]):
        last = max(row for row, other in enumerate(tasks) if other == task)
        assert got[i] == pytest.approx(np.mean([curves[last, later] for later in order[i + 1 :]]))


def test_zero_shot_in_the_order_of_the_tasks_is_right_of_the_diagonal():
    R = np.arange(9.0).reshape(3, 3) / 10
    assert metrics.zero_shot(R, [0, 1, 2]).tolist() == pytest.approx([(0.1 + 0.2) / 2, 0.5])


def test_accepts_what_numpy_accepts_and_leaves_it_alone():
    curves = torch.tensor([[0.5, 0.25], [0.75, 1.0]])
    kept = curves.clone()
    R = metrics.r_matrix(curves, torch.tensor([0, 1]))
    R[:] = 0
    assert R.dtype == np.float64
    assert torch.equal(curves, kept)
    assert metrics.acc(curves) == metrics.acc(curves.tolist()) == 0.875


@pytest.mark.parametrize(
    ("curves", "tasks", "message"),
    [
        ([1.0, 2.0], [0], r"curves must have shape \(rows, T\).*\(2,\)"),
        (np.zeros((0, 3)), [], r"curves must have shape \(rows, T\) and not be empty.*\(0, 3\)"),
        ([[1.0, np.nan]], [0], r"curves must be finite, got nan at index \(0, 1\)"),
        ([["a"]], [0], "curves must be an array of real numbers, got dtype <U1"),
        ([[1.0], [1.0, 2.0]], [0], "curves must be an array of real numbers, got list"),
        ([[1j]], [0], "curves must be an array of real numbers, got dtype complex128"),
        (np.eye(2), [0], r"tasks must have shape \(rows,\) = \(2,\).*got \(1,\)"),
        (np.eye(2), [0.0, 1.0], "tasks must be an array of integers, got dtype float64"),
        (np.eye(2), [0, 2], "tasks must lie in 0 ... 1, .*got 2"),
        (np.eye(2), [-1, 1], "tasks must lie in 0 ... 1, .*got -1"),
        (np.eye(2), [1, 1], "tasks must contain every task 0 ... 1 at least once, got none for task 0"),
    ],
)
def test_r_matrix_refuses(curves, tasks, message):
    with pytest.raises(ValueError, match=message):
        metrics.r_matrix(curves, tasks)


@pytest.mark.parametrize(
    ("R", "message"),
    [
        (np.zeros((2, 3)), r"R must have shape \(T, T\), got \(2, 3\)"),
        (np.zeros(4), r"R must have shape \(T, T\).*\(4,\)"),
        (np.zeros((0, 0)), r"R must have shape \(T, T\) and not be empty"),
        ([[np.inf]], r"R must be finite, got inf at index \(0, 0\)"),
        (None, "R must be an array of real numbers, got dtype object"),
    ],
)
def test_measures_refuse(R, message):
    for measure in (metrics.acc, metrics.bwt, lambda R: metrics.fwt(R, [0.1])):
        with pytest.raises(ValueError, match=message):
            measure(R)


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ([0.1], r"baseline must have shape \(T,\) = \(2,\), one value per task of R, got \(1,\)"),
        (0.1, r"baseline must have shape \(T,\).*\(\)"),
        ([0.1, -np.inf], r"baseline must be finite, got -inf at index \(1,\)"),
    ],
)
def test_fwt_refuses_a_bad_baseline(baseline, message):
    with pytest.raises(ValueError, match=message):
        metrics.fwt(np.eye(2), baseline)
