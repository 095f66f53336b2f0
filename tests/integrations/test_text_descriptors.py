"""The sentence encoder whose embeddings of classes' names describe the tasks of cifar100."""

import torch

from gem_fast.paper.streams.descriptors import embeddings


def test_names_of_like_things_are_alike() -> None:
    threads = torch.get_num_threads()
    rows = embeddings(["oak tree", "maple tree", "pickup truck"])
    assert torch.get_num_threads() == threads
    assert (rows.shape, rows.dtype, rows.device.type) == ((3, 384), torch.float32, "cpu")
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    oak, maple, truck = rows
    assert oak @ maple > oak @ truck + 0.2
    assert torch.equal(embeddings(["oak tree", "maple tree", "pickup truck"]), rows)
