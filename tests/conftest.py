import os

import hypothesis
import pytest
import torch

from gem_fast import _C, _solver, build_info

# A busy machine is no failure: an example may take as long as it takes.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes do not name a test: gzip writes the time into them, and parallel workers must collect the same names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random numbers, whichever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For tests of many small models, which a second thread only slows down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=build_info()["simd_levels"])
def simd_level(request: pytest.FixtureRequest):
    """Runs a test once per instruction set that this processor and the binary have in common."""
    before = build_info()["simd_in_use"]
    for module in (_C, _solver):
        module.set_simd_level(request.param)
    yield request.param
    for module in (_C, _solver):
        module.set_simd_level(before)


@pytest.fixture(autouse=True)
def needs_gpu(request: pytest.FixtureRequest) -> None:
    """Tests marked `cuda` need a GPU and a build for it; where a machine is meant to have both they must not skip."""
    if request.node.get_closest_marker("cuda") is None:
        return
    if not build_info()["cuda_architectures"]:
        missing = "this build of gem_fast holds no CUDA code: install nvcc and build with GEM_FAST_CUDA=1"
    elif not torch.cuda.is_available():
        missing = f"torch {torch.__version__} finds no GPU"
    else:
        return
    if os.environ.get("GEM_FAST_TEST_CUDA") == "1":
        pytest.fail(missing)
    pytest.skip(missing)
