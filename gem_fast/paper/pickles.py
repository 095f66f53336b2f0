"""Reads pickles of plain data: arrays of integers, bytes, strings, integers, None, lists and dictionaries.

A pickle is a program for a stack machine. This module is such a machine with only the instructions that plain data
need: none of them imports, calls or changes anything of Python's, so a stranger's file can do no harm. Python's own
unpickler is not safe enough even where imports are restricted: instructions of a few bytes make it take gigabytes, or
overflow the interpreter's stack.
"""

from __future__ import annotations

import enum
import io
import math
import pickletools
import re
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["PickleError", "loads"]

# An instruction of one byte can make an object of 64 bytes: this bounds them to about 256 MB. CIFAR-100 needs 0.4
# million instructions.
MAX_INSTRUCTIONS = 4_000_000
MAX_DIMENSIONS = 8
INTEGERS = re.compile(r"[iu][1248]")


class PickleError(ValueError):
    """The pickle is damaged, or holds something else than plain data; one clause without a subject says what."""


def loads(data: bytes) -> Any:
    """Reads a pickle of protocol 2 to 5.

    Args:
        data: The pickle; strings of Python 2 come back as bytes.

    Returns:
        What it holds; arrays cannot be written to. Lists and dictionaries may hold themselves.

    Raises:
        PickleError: It is damaged or holds something else. No other exception comes from the contents, and memory use
            follows the length of `data`.
    """
    machine = _Machine()
    file = io.BytesIO(data)
    try:
        for _ in range(MAX_INSTRUCTIONS):
            code = file.read(1).decode("latin-1")
            if code == STOP:
                return _plain(machine.stack.pop())
            instruction = INSTRUCTIONS.get(code)
            if instruction is None:
                raise PickleError(f"is damaged or truncated: got {code!r} for an instruction")
            if instruction.name not in UNDERSTOOD:
                raise PickleError(f"holds something else than plain data: the instruction {instruction.name}")
            machine.run(instruction.name, _argument(instruction, file))
    except PickleError:
        raise
    except IndexError as error:
        raise PickleError("is damaged: an instruction finds too little on the stack") from error
    except ValueError as error:  # of pickletools, where bytes are missing or make no sense
        raise PickleError(f"is damaged or truncated: {' '.join(str(error).split()):.100}") from error
    raise PickleError(f"has more than {MAX_INSTRUCTIONS} instructions")


class _Name(enum.Enum):
    """The names that pickled arrays refer to; they stand for themselves and are never looked up."""

    RECONSTRUCT = enum.auto()
    FROM_BUFFER = enum.auto()
    NDARRAY = enum.auto()
    DTYPE = enum.auto()


# NumPy 2 moved its insides from numpy.core to numpy._core.
NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _Name.RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _Name.FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _Name.FROM_BUFFER,
    ("numpy", "ndarray"): _Name.NDARRAY,
    ("numpy", "dtype"): _Name.DTYPE,
}


class _Mark(NamedTuple):
    """Where a list, tuple or dictionary begins on the stack."""


class _DType:
    """A dtype in the making: BUILD brings its byte order."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "<"

    def made(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class _Array:
    """An array in the making: BUILD brings its contents."""

    def __init__(self) -> None:
        self.made: npt.NDArray[Any] | None = None


VALUES = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
}
# Instructions whose argument is the value: integers, bytes and strings. Python 2's strings are bytes.
INTEGER = {"BININT", "BININT1", "BININT2", "LONG1"}
BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
TEXT = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
PYTHON_2_BYTES = {"BINSTRING", "SHORT_BINSTRING"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUT, GET = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
# Each of these is a method of the machine, of its name.
METHODS = {"PROTO", "FRAME", "MEMOIZE", "MARK", "EMPTY_LIST", "EMPTY_DICT", "TUPLE", "APPEND", "APPENDS", "SETITEM"}
METHODS |= {"SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"}
UNDERSTOOD = INTEGER | BYTES | TEXT | PYTHON_2_BYTES | set(VALUES) | set(TUPLES) | PUT | GET | METHODS
STOP = "."
# What Python knows of all instructions: their codes, and how to read the argument that follows the code.
INSTRUCTIONS = {instruction.code: instruction for instruction in pickletools.opcodes}


class _Machine:
    """The stack, and the memo: objects that later instructions refer to by number."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in INTEGER or name in BYTES or name in TEXT:
            stack.append(bytes(argument) if name == "BYTEARRAY8" else argument)
        elif name in PYTHON_2_BYTES:
            stack.append(argument.encode("latin-1"))
        elif name in VALUES:
            stack.append(VALUES[name])
        elif name in TUPLES:
            size = TUPLES[name]
            if len(stack) < size:
                raise IndexError
            stack[-size:] = [tuple(stack[-size:])]
        elif name in PUT:
            self.memo[argument] = stack[-1]
        elif name in GET:
            stack.append(self._remembered(argument))
        else:
            getattr(self, f"_{name.lower()}")(argument)

    # ---- METHODS -----------------------------------------------------------------------------------------------------

    def _proto(self, version: int) -> None:
        pass

    def _frame(self, length: int) -> None:
        pass

    def _memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _mark(self, _: None) -> None:
        self.stack.append(_Mark())

    def _empty_list(self, _: None) -> None:
        self.stack.append([])

    def _empty_dict(self, _: None) -> None:
        self.stack.append({})

    def _tuple(self, _: None) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _append(self, _: None) -> None:
        value = self.stack.pop()
        self._top(list).append(_plain(value))

    def _appends(self, _: None) -> None:
        values = self._since_mark()
        self._top(list).extend(map(_plain, values))

    def _setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._top(dict)[_key(key)] = _plain(value)

    def _setitems(self, _: None) -> None:
        values = self._since_mark()
        if len(values) % 2:
            raise PickleError("is damaged: a dictionary has a key without a value")
        items = self._top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            items[_key(key)] = _plain(value)

    def _global(self, names: tuple[str, str]) -> None:
        self._name(*names)

    def _stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._name(module, name)

    def _reduce(self, _: None) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        match name, arguments:
            case _Name.RECONSTRUCT, (_Name.NDARRAY, (0,), b"b" | "b"):
                self.stack.append(_Array())
            case _Name.DTYPE, (bytes() | str() as code, 0, 1) if INTEGERS.fullmatch(_text(code)):
                self.stack.append(_DType(_text(code)))
            case _Name.FROM_BUFFER, (bytes() as contents, _DType() as dtype, tuple() as shape, "C" | "F" as order):
                self.stack.append(_array(shape, dtype, order, contents))
            case _:
                raise PickleError("holds something else than plain data: an array that is not one of integers")

    def _build(self, _: None) -> None:
        state, built = self.stack.pop(), self.stack.pop()
        match built, state:
            case _DType(), (3, b"<" | b">" | b"|" | "<" | ">" | "|" as order, None, None, None, -1, -1, 0):
                built.order = _text(order)
                self.stack.append(built)
            case _Array(made=None), (1, tuple() as shape, _DType() as dtype, bool() as fortran, bytes() as contents):
                built.made = _array(shape, dtype, "F" if fortran else "C", contents)
                self.stack.append(built.made)
            case _:
                raise PickleError("holds something else than plain data: the state of an object that is no array")

    # ---- what they have in common ------------------------------------------------------------------------------------

    def _since_mark(self) -> list[Any]:
        values = []
        while not isinstance(value := self.stack.pop(), _Mark):
            values.append(value)
        return values[::-1]

    def _top(self, kind: type[Any]) -> Any:
        if type(self.stack[-1]) is not kind:
            raise PickleError(f"is damaged: an instruction for a {kind.__name__} finds another object")
        return self.stack[-1]

    def _remembered(self, number: int) -> Any:
        if number not in self.memo:
            raise PickleError("is damaged: it refers to an object that it does not hold")
        value = self.memo[number]
        return value if not isinstance(value, _Array) or value.made is None else value.made

    def _name(self, module: Any, name: Any) -> None:
        known = NAMES.get((module, name)) if type(module) is type(name) is str else None
        if known is None:
            raise PickleError(f"holds something else than plain data: it asks for {module!r:.50} {name!r:.50}")
        self.stack.append(known)


def _argument(instruction: pickletools.OpcodeInfo, file: io.BytesIO) -> Any:
    if instruction.name == "GLOBAL":  # two lines; pickletools would undo escapes in them, and warn of wrong ones
        return tuple(file.readline().removesuffix(b"\n").decode("latin-1") for _ in range(2))
    return None if instruction.arg is None else instruction.arg.reader(file)


def _plain(value: Any) -> Any:
    """What may be in a list, a dictionary or the result. Tuples may not: they only carry the parts of arrays."""
    if type(value) not in (int, bool, bytes, str, list, dict, type(None), np.ndarray):
        raise PickleError("holds something else than plain data, or an array without contents")
    return value


def _key(key: Any) -> bytes | str:
    if type(key) not in (bytes, str):
        raise PickleError("holds something else than plain data: a dictionary whose keys are not strings")
    return key  # type: ignore[no-any-return]


def _text(value: bytes | str) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _array(shape: tuple[Any, ...], dtype: _DType, order: Literal["C", "F"], contents: bytes) -> npt.NDArray[Any]:
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise PickleError("is damaged: the shape of an array makes no sense")
    made = dtype.made()
    if math.prod(shape) * made.itemsize != len(contents):
        raise PickleError(f"is damaged: an array of shape {shape} and dtype {made} comes with {len(contents)} bytes")
    return np.frombuffer(contents, made).reshape(shape, order=order)
