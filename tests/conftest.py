import pytest
import torch

from gem_fast import _C, build_info


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random numbers, whichever ran before."""
    torch.manual_seed(0)


@pytest.fixture(params=build_info()["simd_levels"])
def simd_level(request: pytest.FixtureRequest):
    """Runs a test once per instruction set that this processor and the binary have in common."""
    before = build_info()["simd_in_use"]
    _C.set_simd_level(request.param)
    yield request.param
    _C.set_simd_level(before)
