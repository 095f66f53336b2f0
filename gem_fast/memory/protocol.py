"""What GEM asks of a memory."""

from collections.abc import Hashable
from typing import Any, Protocol

from gem_fast.containers import Nest


class Memory(Protocol):
    """What GEM asks of a memory; any policy that keeps to this can be used."""

    @property
    def tasks(self) -> list[Hashable]:
        """The tasks seen so far, in the order in which they first came."""

    def observe(self, x: Nest, y: Nest, task: Hashable) -> None:
        """Sees one mini-batch: x (n, ...) and y (n, ...), or None, of `task`. Raises before it changes anything."""

    def examples(self, task: Hashable) -> tuple[Nest, Nest]:
        """The kept examples of `task`: x (m, ...) and y (m, ...) or None, not to be written to.

        As long as they are the same examples they are in the same storage, with the same `_version`.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on with the same examples."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the state that `state_dict` returned."""
