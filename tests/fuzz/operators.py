"""Fuzz target: every operator, with arguments that mostly fit and now and then do not.

A call works, or raises TypeError, ValueError or RuntimeError with one sentence and leaves its arguments as they were.
What an operator does not write to stays as it was in any case.
"""

import warnings
from collections.abc import Callable

import torch
from fuzz.draw import Draw
from fuzz.sentence import check_sentence
from fuzz.tensors import FLOATS, SIZES, fitting, wild
from torch import Tensor

from gem_fast import ops, project_


def gradient(draw: Draw, p: int, dtype: torch.dtype) -> list[object]:
    """A list of tensors with p elements in total."""
    parts: list[object] = []
    while p > 0 and len(parts) < 6:
        n = p if draw.one_in(3) else draw.below(p + 1)
        parts.append(fitting(draw, (n,) if n % 2 or draw.one_in(2) else (2, n // 2), dtype))
        p -= n
    return parts if p == 0 and (parts or draw.one_in(2)) else [*parts, fitting(draw, (p,), dtype)]


def number(draw: Draw) -> object:
    """A margin or a ridge."""
    return draw.pick([0.0, 0.5, 1e-3, 1e3, 1e300, -1.0, float("nan"), float("inf"), 1, True, None, "much"])


def mutate(draw: Draw, x: object) -> object:
    """Once in eight times something else."""
    return wild(draw) if draw.one_in(8) else x


def call(draw: Draw) -> tuple[Callable[..., object], list[object], int | None]:
    """An operator, its arguments, and the place of the argument that it writes to."""
    dtype = draw.pick(FLOATS)
    t, p = draw.pick(SIZES[:-1]), draw.pick(SIZES)
    G = mutate(draw, fitting(draw, (t, p), dtype))
    grads: object = [mutate(draw, x) for x in gradient(draw, p, dtype)]
    if draw.one_in(16):
        grads = wild(draw)
    name = draw.below(5)
    if name == 0:
        return ops.gram, [G, grads], None
    if name == 1:
        return ops.combine_, [grads, G, mutate(draw, fitting(draw, (t,), torch.float64))], 0
    if name == 2:
        tensors = [None if draw.one_in(8) else x for x in grads] if isinstance(grads, list) else grads
        sizes = (
            draw.pick([None, [x.numel() if isinstance(x, Tensor) else 0 for x in grads]])
            if isinstance(grads, list)
            else None
        )
        if sizes and draw.one_in(4):
            sizes[0] = draw.pick([-1, 0, 5, 2**62, "n"])
        return ops.pack_, [mutate(draw, fitting(draw, (p,), dtype)), tensors, sizes], 0
    if name == 3:
        batch = draw.pick([(), (), (0,), (3,), (2, 2)])
        A = fitting(draw, (*batch, t, t), torch.float64)
        P = A @ A.mT if draw.one_in(2) else A
        return (
            ops.nnqp,
            [mutate(draw, P), mutate(draw, fitting(draw, (*batch, t), torch.float64)), number(draw), number(draw)],
            None,
        )
    return project_, [grads, G, number(draw), number(draw)], 0


def tensors_of(x: object) -> list[Tensor]:
    """The tensors of an argument that have numbers to look at."""
    items = x if isinstance(x, list) else [x]
    return [y for y in items if isinstance(y, Tensor) and y.layout is torch.strided and y.device.type == "cpu"]


def bits(x: Tensor) -> bytes:
    """What the tensor holds, to the bit."""
    packed = torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().flatten())
    return packed.view(torch.uint8).numpy().tobytes()


def target(data: bytes) -> None:
    """One call."""
    f, arguments, written = call(Draw(data))
    before = [[bits(x) for x in tensors_of(argument)] for argument in arguments]
    raised: Exception | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            f(*arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raised = error
    if raised is not None:
        check_sentence(raised)
    for place, argument in enumerate(arguments):
        if place == written and raised is None:
            continue
        after = [bits(x) for x in tensors_of(argument)]
        assert after == before[place], f"{f.__name__} changed its argument {place}" + (
            " and raised" if raised is not None else ""
        )
