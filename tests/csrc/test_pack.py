import pytest
import torch
from utils.asserts import assert_same_bits
from utils.problems import DTYPES

from gem_fast import ops


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_every_element_in_order(dtype: torch.dtype) -> None:
    tensors = [torch.randn(n).to(dtype) for n in (5, 0, 1, 70_000, 3)] + [torch.randn(4, 6).to(dtype).T]
    rows = torch.full((3, 70_040), float("nan")).to(dtype)
    row = rows[1, 1 : 1 + sum(x.numel() for x in tensors)]
    ops.pack_(row, tensors)
    assert_same_bits(row, torch.cat([x.reshape(-1) for x in tensors]))
    assert rows.isnan().sum() == rows.numel() - row.numel()


def test_missing_gradients_are_zeros() -> None:
    row = torch.full((6,), 7.0)
    ops.pack_(row, [None, torch.ones(2), None], [3, 2, 1])
    assert row.tolist() == [0, 0, 0, 1, 1, 0]


def test_missing_gradients_need_sizes() -> None:
    with pytest.raises(ValueError, match="sizes must be given where a tensor of tensors is None"):
        ops.pack_(torch.zeros(3), [None, torch.ones(2)])


@pytest.mark.parametrize("sizes", [[-1, 4], [2**62, 2], [1, 5]])
def test_sizes_that_do_not_fit_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"sizes\[[01]\] must be from 0 to p = 3, got"):
        ops.pack_(torch.zeros(3), [None, None], sizes)


def test_sizes_must_be_integers() -> None:
    with pytest.raises(TypeError, match=r"sizes must be a list of integers, got \['three'\]"):
        ops.pack_(torch.zeros(3), [None], ["three"])
