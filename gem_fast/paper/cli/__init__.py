"""The command line of gem_fast: parses, runs a subcommand, turns failures into one sentence and an exit code."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIGINT
from typing import Any

from gem_fast.paper.errors import PROGRAM, InputError, extra, print_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line with the arguments after the name of the program, by default those of this process.

    Returns the exit code: 0; 1 if the output cannot be written; 2 for bad input; 130 after Ctrl-C, 143 after SIGTERM.
    Raises SystemExit, with code 0, after --help.
    """
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except OSError as error:
        what = "the output" if error.filename is None else error.filename
        reason = "it was closed" if isinstance(error, BrokenPipeError) else error.strerror or error
        print_line(f"{PROGRAM}: {what} cannot be written: {reason}")
        for stream in (sys.stdout, sys.stderr):
            # What it still holds goes nowhere; otherwise Python complains at its end that it cannot be written.
            with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
        return 1


def _run(arguments: Sequence[str]) -> int:
    try:
        with extra("the command line"):
            import tyro  # noqa: F401
        from gem_fast.paper.experiments.torchrun import is_first_to_fail

        try:
            command = _parse(arguments)
        except InputError:
            if is_first_to_fail():
                raise
            return 2
        command.run()
    except InputError as error:
        print_line(f"{PROGRAM}: {error}")
        return 2
    except KeyboardInterrupt as interrupt:
        print_line(": ".join([f"{PROGRAM}: interrupted", *map(str, interrupt.args)]))
        return 128 + getattr(interrupt, "number", SIGINT)
    return 0


def _parse(arguments: Sequence[str]) -> Any:
    """The command with its options: RunOptions, a table or Grid."""
    from gem_fast.paper.cli.arguments import parse
    from gem_fast.paper.cli.grid import Grid
    from gem_fast.paper.cli.run import DESCRIPTION, run_options
    from gem_fast.paper.cli.tables import TABLES
    from gem_fast.paper.experiments.torchrun import processes

    runs = list(arguments[:1]) == ["run"]
    commands: dict[str, tuple[Any, str]] = {"run": (run_options(arguments[1:] if runs else ()), DESCRIPTION)}
    commands |= {table.name: (table, table.description()) for table in TABLES} | {"grid": (Grid, Grid.DESCRIPTION)}
    command = parse(commands, arguments)
    if (size := processes().size) > 1 and not runs:
        raise InputError(f"only the command run can use several processes, got {size} of torchrun")
    return command
