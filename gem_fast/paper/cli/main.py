"""The command line of gem_fast: parses, runs a subcommand, turns failures into one sentence and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIGINT
from typing import NoReturn, TextIO

from gem_fast.paper.cli import grid, run, tables
from gem_fast.paper.errors import PROGRAM, InputError, print_line
from gem_fast.paper.experiments.signals import Stopped
from gem_fast.paper.experiments.torchrun import is_first_to_fail, processes

__all__ = ["main"]

# Each adds itself to the subparsers and sets the default `command` to what runs it.
SUBCOMMANDS = (run, tables, grid)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the error, once where torchrun has started several processes, and exits with code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n" if is_first_to_fail() else None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The arguments after the name of the program; those of this process by default.

    Returns:
        The exit code: 0; 1 if the output cannot be written; 2 for bad input; 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        SystemExit: With code 2 if the arguments cannot be parsed, with 0 after --help.
    """
    parser = Parser(prog=PROGRAM, description="Gradient Episodic Memory on the paper's streams.", allow_abbrev=False)
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for subcommand in SUBCOMMANDS:
        subcommand.add_parser(subparsers)
    try:
        try:
            return _run(parser, arguments)
        finally:
            sys.stdout.flush()
    except OSError as error:
        what = "the output" if error.filename is None else error.filename
        reason = "it was closed" if isinstance(error, BrokenPipeError) else error.strerror or error
        print_line(f"{parser.prog}: {what} cannot be written: {reason}")
        for stream in (sys.stdout, sys.stderr):
            _silence(stream)
        return 1


def _run(parser: Parser, arguments: Sequence[str] | None) -> int:
    args = parser.parse_args(arguments)
    try:
        if (size := processes().size) > 1 and args.command is not run.run:
            if not is_first_to_fail():
                return 2
            raise InputError(f"only the command run can use several processes, got {size} of torchrun")
        args.command(args)
    except InputError as error:
        print_line(f"{parser.prog}: {error}")
        return 2
    except KeyboardInterrupt as interrupt:
        print_line(": ".join([f"{parser.prog}: interrupted", *map(str, interrupt.args)]))
        return 128 + (interrupt.number if isinstance(interrupt, Stopped) else SIGINT)
    return 0


def _silence(stream: TextIO) -> None:
    """What a stream still holds goes nowhere; otherwise Python complains at its end that it cannot be written."""
    with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
