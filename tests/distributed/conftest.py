from collections.abc import Iterator

import pytest
from utils.ranks import Pool


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, Pool]]:
    pools = {size: Pool(size) for size in (2, 3)}
    yield pools
    for pool in pools.values():
        pool.stop()


@pytest.fixture
def two(pools: dict[int, Pool]) -> Pool:
    """Two ranks."""
    return pools[2]


@pytest.fixture
def three(pools: dict[int, Pool]) -> Pool:
    """Three ranks."""
    return pools[3]
