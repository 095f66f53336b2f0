"""Accuracy, backward and forward transfer, equations 2-4 of Lopez-Paz & Ranzato (2017), and zero-shot accuracy.

R[i, j] is the accuracy on the test set of task j after the learner has finished task i, for T tasks, as a fraction
between 0 and 1. Every function takes anything NumPy can turn into an array and computes in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["acc", "bwt", "fwt", "r_matrix", "zero_shot"]

FloatArray = npt.NDArray[np.float64]


def r_matrix(curves: npt.ArrayLike, tasks: npt.ArrayLike) -> FloatArray:
    """Picks R out of learning curves: for each task the last evaluation made while that task was being learned.

    Where a task is learned several times, that is the end of its last time.

    Args:
        curves: Shape (rows, T), real numbers. Row r holds the accuracy on every task at the r-th evaluation; the
            rows are in the order of time, and there may be any number of them per task.
        tasks: Shape (rows,), integers 0 ... T - 1. The task that was being learned at each evaluation. Every task
            occurs at least once; the order is free.

    Returns:
        R, shape (T, T), float64: R[i, j] is the accuracy on task j at the last evaluation of task i.

    Raises:
        ValueError: A shape does not fit, a value is not finite, a task is out of range or never occurs.
    """
    curves, tasks = _curves(curves, tasks)
    last_row = {int(task): row for row, task in enumerate(tasks)}
    return curves[[last_row[task] for task in range(curves.shape[1])]]


def zero_shot(curves: npt.ArrayLike, tasks: npt.ArrayLike) -> FloatArray:
    """Mean accuracy on the tasks not yet seen, along the stream: what a learner can do without an example of a task.

    Args:
        curves: As for r_matrix.
        tasks: As for r_matrix.

    Returns:
        Shape (T - 1,), float64: entry n - 1 is that of the last evaluation at which n of the T tasks had been seen,
        over the other T - n.

    Raises:
        ValueError: As for r_matrix.
    """
    curves, tasks = _curves(curves, tasks)
    n_tasks = curves.shape[1]
    is_unseen = np.ones(n_tasks, dtype=bool)
    means = np.empty(n_tasks)
    for row, task in zip(curves, tasks, strict=True):
        is_unseen[task] = False
        n_seen = n_tasks - int(is_unseen.sum())
        means[n_seen - 1] = row[is_unseen].mean() if n_seen < n_tasks else 0.0
    return means[:-1]


def acc(R: npt.ArrayLike) -> float:
    """Average accuracy over all tasks after the last one (Eq. 2): ACC = 1/T sum_i R[T-1, i].

    Args:
        R: Shape (T, T), finite real numbers, T >= 1.

    Returns:
        ACC, in the unit of R.

    Raises:
        ValueError: R has another shape or holds a value that is not finite.
    """
    return float(_square(R)[-1].mean())


def bwt(R: npt.ArrayLike) -> float:
    """Backward transfer (Eq. 3): BWT = 1/(T-1) sum_{i<T-1} R[T-1, i] - R[i, i]; negative means forgetting.

    Args:
        R: Shape (T, T), finite real numbers, T >= 1.

    Returns:
        BWT, in the unit of R. With a single task there is no earlier one, so nothing was transferred: 0.0.

    Raises:
        ValueError: R has another shape or holds a value that is not finite.
    """
    R = _square(R)
    return _mean_transfer(R[-1, :-1] - np.diagonal(R)[:-1])


def fwt(R: npt.ArrayLike, baseline: npt.ArrayLike) -> float:
    """Forward transfer (Eq. 4): FWT = 1/(T-1) sum_{i>0} R[i-1, i] - baseline[i].

    Args:
        R: Shape (T, T), finite real numbers, T >= 1.
        baseline: Shape (T,), finite real numbers in the unit of R: the accuracy on each task at random
            initialisation.

    Returns:
        FWT, in the unit of R. With a single task there is no later one, so nothing was transferred: 0.0.

    Raises:
        ValueError: A shape does not fit or a value is not finite.
    """
    R = _square(R)
    baseline = _finite("baseline", baseline, ndim=1, shape="(T,)")
    if baseline.shape != (len(R),):
        raise ValueError(f"baseline must have shape (T,) = ({len(R)},), one value per task of R, got {baseline.shape}")
    return _mean_transfer(np.diagonal(R, offset=1) - baseline[1:])


def _curves(curves: npt.ArrayLike, tasks: npt.ArrayLike) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    curves = _finite("curves", curves, ndim=2, shape="(rows, T)")
    rows, n_tasks = curves.shape
    tasks = _numeric("tasks", tasks, kinds="iu", numbers="integers")
    if tasks.shape != (rows,):
        raise ValueError(f"tasks must have shape (rows,) = ({rows},), one task per row of curves, got {tasks.shape}")
    outside = tasks[(tasks < 0) | (tasks >= n_tasks)]
    if outside.size:
        raise ValueError(f"tasks must lie in 0 ... {n_tasks - 1}, the columns of curves, got {outside[0]}")
    missing = sorted(set(range(n_tasks)) - set(tasks.tolist()))
    if missing:
        raise ValueError(
            f"tasks must contain every task 0 ... {n_tasks - 1} at least once, got none for task {missing[0]}"
        )
    return curves, tasks


def _mean_transfer(transfer: FloatArray) -> float:
    return float(transfer.mean()) if transfer.size else 0.0


def _square(R: npt.ArrayLike) -> FloatArray:
    R = _finite("R", R, ndim=2, shape="(T, T)")
    if R.shape[0] != R.shape[1]:
        raise ValueError(f"R must have shape (T, T), got {R.shape}")
    return R


def _finite(name: str, value: npt.ArrayLike, ndim: int, shape: str) -> FloatArray:
    array = _numeric(name, value, kinds="fiu", numbers="real numbers").astype(np.float64)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name} must have shape {shape} and not be empty, got shape {array.shape}")
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, got {array[where]} at index {where}")
    return array


def _numeric(name: str, value: npt.ArrayLike, kinds: str, numbers: str) -> npt.NDArray[Any]:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be an array of {numbers}, got {type(value).__name__}: {error}") from error
    if array.dtype.kind not in kinds:
        raise ValueError(f"{name} must be an array of {numbers}, got dtype {array.dtype}")
    return array
