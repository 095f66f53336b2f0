"""fully_shard: the same as one process on the union of all ranks' memories, and the same on all ranks."""

import pytest
import torch
from utils.ranks import Pool
from utils.ranks_training import MODELS, Data, assert_same, fsdp, hsdp, train_alone, train_rank

EVEN, UNEVEN = Data((5, 5), (5, 5)), Data((5, 3), (2, 5))


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("transformer", torch.float32, 1e-5), *((name, torch.float64, 1e-10) for name in MODELS)],
)
def test_equals_one_process_on_the_union(two: Pool, name: str, dtype: torch.dtype, tolerance: float) -> None:
    data = EVEN if name.startswith("sync") else UNEVEN
    assert_same(two.run(train_rank, name, dtype, data, fsdp), train_alone(name, dtype, data), tolerance)


def test_shards_with_replicas(two: Pool) -> None:
    data = Data((5, 3), (2, 5))
    assert_same(two.run(train_rank, "mlp", torch.float64, data, hsdp), train_alone("mlp", torch.float64, data), 1e-10)
