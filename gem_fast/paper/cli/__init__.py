"""The command line: parses, runs a subcommand, prints one sentence where that fails."""

from __future__ import annotations

from collections.abc import Sequence

from gem_fast.paper.errors import PROGRAM, InputError, extra, print_line

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; arguments, result and errors as `commands.main`."""
    try:
        with extra("the command line"):
            import tyro  # noqa: F401
    except InputError as error:
        print_line(f"{PROGRAM}: {error}")
        return 2
    from gem_fast.paper.cli import commands

    return commands.main(arguments)
