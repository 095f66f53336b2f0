"""Numbers on the command line, for argparse's `type`: parsed, or refused with what was expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

__all__ = ["real", "whole"]


# The largest numbers that torch and the compiled code can compute with, and some more than anybody needs.
MAX_WHOLE = 2**31 - 1
MAX_REAL = 1e30


def whole(minimum: int, maximum: int = MAX_WHOLE) -> Callable[[str], int]:
    """A parser of whole numbers in a range, both ends included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            expected = f"of at least {minimum}" if value < minimum else f"of at most {maximum}"
            raise argparse.ArgumentTypeError(f"must be a whole number {expected}, got {shortened(text)!r}")
        return value

    return parse


def real(above_zero: bool) -> Callable[[str], float]:
    """A parser of finite numbers, above zero or of at least zero."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > 0 if above_zero else value >= 0)):
            expected = "above 0" if above_zero else "of at least 0"
            raise argparse.ArgumentTypeError(f"must be a finite number {expected}, got {shortened(text)!r}")
        if value > MAX_REAL:
            raise argparse.ArgumentTypeError(f"must be at most {MAX_REAL:g}, got {shortened(text)!r}")
        return value

    return parse


def shortened(text: str) -> str:
    """A text that fits into a sentence."""
    return text if len(text) <= 50 else f"{text[:47]}..."
