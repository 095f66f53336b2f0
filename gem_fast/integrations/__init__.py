"""gem_fast in the frameworks people use: one file for each, with names of its own, imported only when asked for."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def framework(extra: str) -> Iterator[None]:
    """Around an integration's imports: says which extra of gem_fast brings a package that is not installed.

    Raises:
        ModuleNotFoundError: an import in the block did not find its package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ModuleNotFoundError(
            f"gem_fast.integrations.{extra} needs {package}, which is not installed: pip install 'gem_fast[{extra}]'",
            name=package,
        ) from error
