"""Gradient Episodic Memory (Lopez-Paz & Ranzato, 2017) for PyTorch: a compiled projection and an optimizer hook.

What is named here is imported when it is first used, and torch with it; `gem_fast.solver` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from gem_fast.ops import build_info
    from gem_fast.projection import Projection, project_
    from gem_fast.solver import Status

    __version__: str

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

# Where each name is defined.
_MODULES = {
    "agem": ["AGEM"],
    "gem": ["GEM"],
    "gradients": [
        "Batch",
        "Constraint",
        "Engine",
        "Fused",
        "LayerwiseGradients",
        "Loop",
        "Objective",
        "RowGradients",
        "Sample",
        "TaskGradients",
        "register_rule",
    ],
    "memory": [
        "MEMORY_POLICIES",
        "ClassBalancedMemory",
        "EpisodicMemory",
        "HerdingMemory",
        "Memory",
        "ReservoirMemory",
    ],
    "ops": ["build_info"],
    "projection": ["Projection", "project_"],
    "solver": ["Status"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_WITHOUT_TORCH = ("Status", "solver")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__", *(name for name in globals() if name.startswith("__"))})


if not TYPE_CHECKING:  # a type checker would take every name for granted

    def __getattr__(name: str) -> Any:
        if name in ("_C", "_solver"):
            value = _load_compiled_module(name)
        elif name == "__version__":
            value = __getattr__("_C").build_info()["version"]
        elif name in __all__:
            if name not in _WITHOUT_TORCH:
                __getattr__("_C")  # first, so that what is said is why it does not load
            module = import_module(f"gem_fast.{_MODULE_OF.get(name, name)}")
            value = getattr(module, name) if name in _MODULE_OF else module
        else:
            raise AttributeError(f"module 'gem_fast' has no attribute {name!r}")
        globals()[name] = value
        return value


def _load_compiled_module(name: str) -> Any:
    with_torch = ""
    if name == "_C":
        import torch  # whose libraries the module links to

        with_torch = f" with torch {torch.__version__}"
    try:
        return import_module(f"gem_fast.{name}")
    except ImportError as error:
        raise ImportError(
            f"gem_fast's compiled module does not load{with_torch}: {error}; build it for this Python with a torch of "
            "at least 2.10: pip install --force-reinstall --no-deps . in gem_fast's source folder"
        ) from error
