"""What the command line tells its user: errors that the user can put right, and notes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# The name under which the user started it.
PROGRAM = "gem-fast" if Path(sys.argv[0]).stem == "gem-fast" else "python -m gem_fast"


class InputError(ValueError):
    """Bad input, described in one sentence, which the command line prints before it exits with code 2."""


class Diverged(InputError):
    """Training came to outputs that are not finite."""


@contextmanager
def extra(purpose: str, name: str = "demo") -> Iterator[None]:
    """Turns a failing import inside the block into an InputError that names the cure: the extra to install.

    The purpose is what needs the imported package, as the subject of a sentence: "the data set mnist-5k".
    """
    try:
        yield
    except ImportError as error:
        message = f"{purpose} needs a package that cannot be imported here ({error}): pip install 'gem_fast[{name}]'"
        raise InputError(message) from error


def print_note(sentence: str) -> None:
    """Prints a sentence on stderr that does not stop the command."""
    print_line(f"{PROGRAM}: {sentence}")


def print_line(line: str) -> None:
    """Prints a line on stderr, or nothing where that is closed or its disk is full: nobody waits for it there."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def flag(name: str) -> str:
    """An option as it is typed: --memory-per-task for memory_per_task."""
    return f"--{name.replace('_', '-')}"
