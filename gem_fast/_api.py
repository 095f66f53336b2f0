"""What `gem_fast` offers by name; importing it imports torch, whose libraries the compiled module links to."""

import torch as _torch

try:
    from gem_fast import _C
except ImportError as error:
    raise ImportError(
        f"gem_fast's compiled module does not load with torch {_torch.__version__}: {error}; build it for this Python "
        "with a torch of at least 2.10: pip install --force-reinstall --no-deps . in gem_fast's source folder"
    ) from error

from gem_fast import metrics, ops, solver
from gem_fast.agem import AGEM
from gem_fast.gem import GEM
from gem_fast.gradients import (
    Batch,
    Constraint,
    Engine,
    Fused,
    LayerwiseGradients,
    Loop,
    Objective,
    RowGradients,
    Sample,
    TaskGradients,
    register_rule,
)
from gem_fast.memory import (
    MEMORY_POLICIES,
    ClassBalancedMemory,
    EpisodicMemory,
    HerdingMemory,
    Memory,
    ReservoirMemory,
)
from gem_fast.ops import Status, build_info
from gem_fast.projection import Projection, project_

__version__: str = _C.build_info()["version"]

__all__ = [
    "AGEM",
    "GEM",
    "MEMORY_POLICIES",
    "Batch",
    "ClassBalancedMemory",
    "Constraint",
    "Engine",
    "EpisodicMemory",
    "Fused",
    "HerdingMemory",
    "LayerwiseGradients",
    "Loop",
    "Memory",
    "Objective",
    "Projection",
    "ReservoirMemory",
    "RowGradients",
    "Sample",
    "Status",
    "TaskGradients",
    "build_info",
    "metrics",
    "ops",
    "project_",
    "register_rule",
    "solver",
]
