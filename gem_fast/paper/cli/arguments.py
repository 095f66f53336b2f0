"""From arguments to options: tyro makes the command line of the options' classes."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from gem_fast.paper.config import shortened
from gem_fast.paper.errors import PROGRAM, InputError

__all__ = ["parse", "split_off"]

T = TypeVar("T")
REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def _number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Numbers, refused with a sentence that says what was expected; their bounds are the options' own affair."""
    kinds: dict[Any, str] = {int: "a whole number", float: "a number"}
    if info.type not in kinds:
        return None
    expected = kinds[info.type]

    def read(texts: list[str]) -> Any:
        try:
            return info.type(texts[0])
        except ValueError:
            raise ValueError(f"must be {expected}, got {shortened(texts[0])!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=info.type.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, info.type),
        str_from_instance=lambda value: [f"{value:g}" if info.type is float else str(value)],
    )


def parse(commands: Mapping[str, tuple[Any, str]], arguments: Sequence[str]) -> Any:
    """Reads a command and its options.

    Args:
        commands: For each command the class of its options, and what it does.
        arguments: What stands after the name of the program.

    Returns:
        An object of one of these classes.

    Raises:
        InputError: The arguments are not those of a command.
        SystemExit: With code 0, after --help.
    """
    kinds = [
        Annotated[kind, tyro.conf.subcommand(name, description=text, prefix_name=False)]
        for name, (kind, text) in commands.items()
    ]
    return _read(functools.reduce(operator.or_, kinds), arguments)


def split_off(kind: type[T], arguments: Sequence[str]) -> tuple[T, list[str]]:
    """Reads the options of one class, and returns them and all other arguments; errors as for `parse`."""
    options, others = _read(kind, arguments, return_unknown_args=True, add_help=False)
    return options, others


def _read(kind: Any, arguments: Sequence[str], **how: Any) -> Any:
    printed = io.StringIO()
    try:
        with REGISTRY, contextlib.redirect_stderr(printed):
            return tyro.cli(kind, prog=PROGRAM, args=list(arguments), config=(tyro.conf.OmitArgPrefixes,), **how)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_sentence(printed.getvalue())) from None


def _sentence(box: str) -> str:
    """The first paragraph of the box that tyro prints for an error."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    text = " ".join(itertools.takewhile(lambda line: not line.startswith(("─", "╰")), lines[1:]))
    # "Error parsing --lr: must be ..." is ours from there on; of a whole class, so is all that follows.
    text = re.sub(r"^Error parsing (--\S+): ", r"\1 ", text)
    return f"{re.sub(r'^Error parsing [^:]*: ', '', text)} (see {PROGRAM} COMMAND --help)"
