"""Runs with checkpoints, for the tests of what becomes of them."""

from pathlib import Path
from typing import Any

from torch import Tensor

from gem_fast.paper.experiments.checkpoint import Checkpoints, read_checkpoint


def command(data: Path, folder: Path, *more: str) -> list[str]:
    """A run of 60 mini-batches, with a checkpoint after each."""
    fixed = "run --tasks 3 --samples-per-task 20 --batch-size 1 --eval-every 7 --memory-per-task 5 --checkpoint-every 1"
    return [*fixed.split(), "--data", str(data), "--checkpoint", str(folder), *more]


def end_of(folder: Path) -> dict[str, Any]:
    """The last state of a run, without its times."""
    state = read_checkpoint(Checkpoints(folder).paths()[0])
    seconds = state["record"].pop("seconds")
    assert list(seconds) == ["train", "eval"]
    assert min(seconds.values()) > 0
    return state


def assert_same(a: Any, b: Any) -> None:
    """Two states are equal to the last bit."""
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b
