"""Bytes as a source of choices: the same bytes always make the same input, and similar bytes similar ones."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Reads choices off a byte string; zeros follow its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def below(self, n: int) -> int:
        """An integer from 0 to n - 1, n at most 65536."""
        width = 1 if n <= 256 else 2
        return int.from_bytes(self.bytes(width), "little") % n

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[self.below(len(choices))]

    def one_in(self, n: int) -> bool:
        """True once in n times."""
        return self.below(n) == n - 1

    def bytes(self, n: int) -> bytes:
        """The next n bytes."""
        taken = self._data[self._at : self._at + n]
        self._at += n
        return taken.ljust(n, b"\0")

    def rest(self) -> bytes:
        """All bytes that are left."""
        taken = self._data[self._at :]
        self._at = len(self._data)
        return taken
