"""Notices projections that the gradients have too few digits for."""

import logging

from gem_fast.ops import Status
from gem_fast.projection import Projection

_log = logging.getLogger("gem_fast")


class AccuracyWatch:
    """Says once, in the log "gem_fast", that a projection is not accurate; not on a GPU, which it would wait for."""

    def __init__(self) -> None:
        self._said = False

    def projected(self, projection: Projection) -> None:
        """A gradient was projected."""
        if self._said or projection.v.device.type != "cpu" or projection.status.item() != Status.INACCURATE:
            return
        self._said = True
        _log.warning(
            "the past tasks' gradients depend on each other to more digits than their products have: in this step "
            "(status INACCURATE) the gradient was moved as far as is safe, and some past task's loss may rise"
        )
