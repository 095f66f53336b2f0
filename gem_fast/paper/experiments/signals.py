"""SIGINT and SIGTERM during training: the mini-batch is finished first, so that its state can be saved."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

from gem_fast.paper.errors import PROGRAM

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTE = f"{PROGRAM}: stopping after this mini-batch; press Ctrl-C again to stop at once\n".encode()


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM, whose number is `number`."""

    def __init__(self, number: int, *sentence: str) -> None:
        super().__init__(*sentence)
        self.number = number


def stopped(interrupt: KeyboardInterrupt, sentence: str) -> Stopped:
    """The same interruption with a sentence about what is kept of the work."""
    return Stopped(interrupt.number if isinstance(interrupt, Stopped) else signal.SIGINT, sentence)


class StopSignals:
    """A context in which SIGINT and SIGTERM wait until the work inside says that it can stop.

    Until `can_wait` is set, and for a second signal, `Stopped` is raised at once. Outside of the main thread Python
    handles no signals, and this does nothing.

    Attributes:
        can_wait: Whether the work inside is going to call `stop_if_asked`.
        asked: The signal that has come; None before.
    """

    def __init__(self) -> None:
        self.can_wait = False
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def stop_if_asked(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.asked is not None:
            raise Stopped(self.asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None or not self.can_wait:
            raise Stopped(number)
        self.asked = number
        with suppress(OSError):
            os.write(2, NOTE)  # not print, which must not be called while it is at work itself

    def __enter__(self) -> StopSignals:
        """Takes over both signals."""
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in SIGNALS}
            # A signal that is ignored, as SIGINT is in a background job, stays ignored.
            self._before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
            for number in self._before:
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        """Gives them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
