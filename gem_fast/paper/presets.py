"""The hyper-parameters of the published runs: the defaults of the command line."""

from __future__ import annotations

__all__ = ["PRESETS"]

# (stream, learner) -> arguments of the learner's constructor. `ridge` is the diagonal term of the published solver.
PRESETS: dict[tuple[str, str], dict[str, float]] = {
    ("rotations", "single"): {"lr": 0.003},
    ("permutations", "single"): {"lr": 0.03},
    ("rotations", "gem"): {"lr": 0.1, "memory_per_task": 256, "margin": 0.5, "ridge": 1e-3},
    ("permutations", "gem"): {"lr": 0.1, "memory_per_task": 256, "margin": 0.5, "ridge": 1e-3},
}
