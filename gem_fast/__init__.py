"""Gradient Episodic Memory (Lopez-Paz & Ranzato, 2017) for PyTorch: a compiled projection and an optimizer hook.

Names are imported when the first of them is used, and torch with them: `import gem_fast.solver` needs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gem_fast._api import *  # noqa: F403
    from gem_fast._api import __all__ as __all__
    from gem_fast._api import __version__ as __version__
else:

    def __getattr__(name: str) -> Any:
        if not name.startswith("_") or name in ("__all__", "__version__"):
            from importlib import import_module
            from importlib.util import find_spec

            if find_spec(f"gem_fast.{name}") is not None:  # the rest may be in the middle of its import
                return import_module(f"gem_fast.{name}")
            api = import_module("gem_fast._api")
            if name in api.__all__ or name.startswith("_"):
                return getattr(api, name)
        raise AttributeError(f"module 'gem_fast' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*__getattr__("__all__"), "__version__", *globals()})
