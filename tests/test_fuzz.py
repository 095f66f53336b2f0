"""A fixed number of random inputs for every fuzz target; `make soak` searches for hours."""

import importlib
from collections.abc import Sequence

import numpy as np
import pytest
from fuzz import operators
from torch import Tensor

from gem_fast import project_


@pytest.mark.parametrize(
    ("target", "runs"), [("operators", 30000), ("idx", 5000), ("checkpoint", 5000), ("cifar", 5000)]
)
def test_random_inputs(target: str, runs: int) -> None:
    check = importlib.import_module(f"fuzz.{target}").target
    rng = np.random.default_rng(0)
    for run in range(runs):
        data = rng.bytes(int(rng.integers(4, 120)))
        try:
            check(data)
        except Exception as error:
            raise AssertionError(f"run {run} of {target} failed on {data.hex()}: {error}") from error


def test_an_operator_that_changes_its_input_and_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(grads: Sequence[Tensor], *others: object) -> object:
        result = project_(grads, *others)
        grads[0].add_(1)
        raise ValueError(f"too late: {result}"[:20])

    monkeypatch.setattr(operators, "project_", spoil)
    with pytest.raises(AssertionError, match="changed its argument 0 and raised"):
        test_random_inputs("operators", 500)
