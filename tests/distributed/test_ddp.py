"""DistributedDataParallel: the same as one process on the union of all ranks' memories, and the same on all ranks."""

import pytest
import torch
from utils.ranks import Pool
from utils.ranks_training import MODELS, Data, assert_same, ddp, ddp_of_heads, train_alone, train_rank

EVEN, UNEVEN = Data((5, 5), (5, 5)), Data((5, 3), (2, 5))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", MODELS)
def test_equals_one_process_on_the_union(two: Pool, name: str, dtype: torch.dtype, tolerance: float) -> None:
    data = EVEN if name.startswith("sync") else UNEVEN
    wrap = ddp_of_heads if name == "heads" else ddp
    assert_same(two.run(train_rank, name, dtype, data, wrap), train_alone(name, dtype, data), tolerance)
