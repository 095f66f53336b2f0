"""The environment of `make integrations`: the frameworks with a torch of another version, and the same binary."""

import re
from pathlib import Path

import torch

import gem_fast


def test_one_binary_serves_several_versions_of_torch():
    """The module that stands in the source folder was built with another torch than the one that loads it here."""
    assert Path(gem_fast._C.__file__).parent == Path(__file__).resolve().parents[2] / "gem_fast"
    built_with, running = (
        re.match(r"\d+\.\d+", str(version))[0]
        for version in (gem_fast.build_info()["torch_built_with"], torch.__version__)
    )
    assert built_with != running
    G = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    g = torch.tensor([-1.0, 2.0])
    assert gem_fast.project_([g], G, margin=0.0).violations.tolist() == [True, False]
    assert g.tolist() == [0.0, 2.0]
