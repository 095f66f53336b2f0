"""Learners: one file each, registered here under the name the command line uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from gem_fast.paper.learners.gem import Gem
from gem_fast.paper.learners.single import Single

__all__ = ["LEARNERS", "Learner"]


class Learner(Protocol):
    """What the protocol needs of a learner; torch.nn.Module has `train` already, and SgdLearner the states.

    A learner's constructor takes the model, on its device, and then its hyper-parameters by name.
    """

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Trains on one mini-batch of task number `task`: inputs x (batch, ...), labels y (batch,), int64."""

    def predict(self, x: Tensor, task: int) -> Tensor:
        """Logits (batch, classes) for inputs x (batch, ...) of task number `task`."""

    def train(self, mode: bool = True) -> object:
        """Switches to training mode, or to evaluation mode with mode = False."""

    def state_dict(self) -> Mapping[str, Any]:
        """All that decides how training goes on, as torch.load(weights_only=True) reads it back."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object:
        """Takes up the state that `state_dict` returned; raises ValueError for another, and is then as it was."""


LEARNERS: dict[str, Callable[..., Learner]] = {
    "single": Single,
    "gem": Gem,
}
