"""The command line of gem_fast: parses, runs a subcommand, turns failures into one sentence and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from gem_fast.paper import grid, run, tables
from gem_fast.paper.errors import InputError

__all__ = ["main"]

# Each adds itself to the subparsers and sets the default `command` to what runs it.
SUBCOMMANDS = (run, tables, grid)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the error and exits with code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The arguments after `python -m gem_fast`; those of this process by default.

    Returns:
        The exit code: 0, 2 for bad input, 130 after Ctrl-C.

    Raises:
        SystemExit: With code 2 if the arguments cannot be parsed, with 0 after --help.
    """
    parser = Parser(
        prog="python -m gem_fast", description="Gradient Episodic Memory on the paper's streams.", allow_abbrev=False
    )
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for subcommand in SUBCOMMANDS:
        subcommand.add_parser(subparsers)
    args = parser.parse_args(arguments)
    try:
        args.command(args)
    except InputError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(": ".join([f"{parser.prog}: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    return 0
