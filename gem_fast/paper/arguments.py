"""What the options of the command line hold: checked, and refused in one sentence."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch

from gem_fast.paper.errors import InputError

__all__ = ["check_device", "real", "whole"]


def check_device(name: str) -> None:
    """Makes sure that torch can use a device.

    Args:
        name: What --device was given.

    Raises:
        InputError: It cannot.
    """
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # torch raises many kinds here; whatever it is, this device is of no use
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--device must be a device torch can use here, got {name!r}: {reason}") from error


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that is a whole number.

    Args:
        least: The smallest allowed.
        most: The largest allowed; None: any.

    Returns:
        Turns the option's text into the number; raises argparse.ArgumentTypeError for another.
    """
    span = f"of at least {least}" if most is None else f"between {least} and {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be a whole number {span}, got {text!r}")
        return value

    return parse


def real(above_zero: bool) -> Callable[[str], float]:
    """The type of an option that is a finite number.

    Args:
        above_zero: Whether 0 is refused, as negative numbers are.

    Returns:
        As for `whole`.
    """

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > 0 if above_zero else value >= 0)):
            least = "above 0" if above_zero else "of at least 0"
            raise argparse.ArgumentTypeError(f"must be a finite number {least}, got {text!r}")
        return value

    return parse
