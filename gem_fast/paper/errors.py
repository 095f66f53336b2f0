"""The one exception for what the person at the command line can put right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Diverged", "InputError", "extra"]


class InputError(ValueError):
    """Bad input, told in one sentence; the command line prints that sentence and exits with code 2."""


class Diverged(InputError):
    """Training came to outputs that are not finite."""


@contextmanager
def extra(purpose: str) -> Iterator[None]:
    """Turns a failing import inside the block into an InputError that names the cure.

    Args:
        purpose: What needs the imported package, as the subject of a sentence: "the data set mnist-5k".

    Raises:
        InputError: An import in the block failed.
    """
    try:
        yield
    except ImportError as error:
        message = f"{purpose} needs a package that cannot be imported here ({error}): pip install 'gem_fast[demo]'"
        raise InputError(message) from error
