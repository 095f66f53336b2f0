"""Notices projections that the gradients have too few digits for, and on a GPU those that were not made."""

import logging

import torch
from torch import Tensor

from gem_fast.ops import Status
from gem_fast.projection import Projection

_log = logging.getLogger("gem_fast")

# On a GPU one step in so many asks for what was found: a question takes microseconds.
_ASKED_EVERY = 16

_MESSAGES = {
    Status.INACCURATE: (
        "the past tasks' gradients depend on each other to more digits than their products have: in %s "
        "(status INACCURATE) the gradient was moved as far as is safe, and some past task's loss may rise"
    ),
    Status.NON_FINITE: (
        "a gradient of a past task, or the one to be projected, has a NaN or an infinity: in %s (status NON_FINITE) "
        "the gradient was left as it was; GEM(..., check=True) raises there and says where it comes from"
    ),
}


class AccuracyWatch:
    """Says once, in the log "gem_fast", that a projection is not accurate, or that there was none.

    On a CPU what is not finite raises. A GPU keeps the largest status so far, and the host hears of it some steps
    later, so that nobody waits.
    """

    def __init__(self) -> None:
        self._has_said = False
        self._worst: LateNumber | None = None
        self._steps = 0

    def projected(self, projection: Projection, found_inf: Tensor | None = None) -> None:
        """A gradient was projected, or is as a CUDA graph is captured.

        Args:
            projection: what that did.
            found_inf: whether the step is skipped because a gradient is infinite, not zero then; None: it is not.
        """
        status = projection.status
        if self._has_said:
            return
        if status.device.type == "cpu":
            self._say(int(status), "this step")
        elif status.is_cuda:
            if found_inf is not None:
                status = torch.where(found_inf.to(status.device).reshape(()) != 0, 0, status)
            if self._worst is None or not self._worst.is_on(status.device):
                self._worst = LateNumber(status)
            self._worst.raise_to(status)

    def ask(self) -> None:
        """Reads what a GPU has found, where that is there; not while a CUDA graph is captured."""
        self._steps += 1
        if self._worst is None or self._has_said or self._steps % _ASKED_EVERY:
            return
        found = self._worst.read()
        if found is not None:
            self._say(found, f"one of the last {2 * _ASKED_EVERY} steps")

    def _say(self, status: int, when: str) -> None:
        if status != Status.SOLVED:
            self._has_said = True
            _log.warning(_MESSAGES[Status(status)], when)


class LateNumber:
    """The largest of numbers on a GPU, as the host hears of it: later, and without a wait."""

    def __init__(self, like: Tensor) -> None:
        self._largest = torch.zeros_like(like)
        self._sent: tuple[Tensor, torch.cuda.Event] | None = None  # to where, and whether it is there

    def is_on(self, device: torch.device) -> bool:
        """Whether it is on this GPU."""
        return self._largest.device == device

    def raise_to(self, x: Tensor) -> None:
        """One more number, (): it counts where it is larger."""
        torch.maximum(self._largest, x, out=self._largest)

    def read(self) -> int | None:
        """The number as it was when it was sent for last, where it is here by now; else None. Sends for the next."""
        found = None
        if self._sent is not None:
            there, event = self._sent
            if not event.query():
                return None
            found = int(there)
        with torch.cuda.device(self._largest.device):
            there = torch.empty_like(self._largest, device="cpu", pin_memory=True)
            there.copy_(self._largest, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._sent = there, event
        return found
