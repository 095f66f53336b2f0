"""Learners: one file each, registered here under the name the command line uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from torch import Tensor

from gem_fast.paper.learners.agem import Agem
from gem_fast.paper.learners.ewc import Ewc
from gem_fast.paper.learners.gem import Gem
from gem_fast.paper.learners.gem_pure_python import GemPurePython
from gem_fast.paper.learners.icarl import Icarl
from gem_fast.paper.learners.independent import Independent
from gem_fast.paper.learners.joint import Joint
from gem_fast.paper.learners.multimodal import Multimodal
from gem_fast.paper.learners.single import Single

__all__ = ["LEARNERS", "Learner"]


class Learner(Protocol):
    """What the protocol needs of a learner: torch.nn.Module has `train`, and SgdLearner the rest except `observe`.

    A learner's constructor takes the StreamInfo, the device to train on, and then its hyper-parameters by name. It
    makes its own model, whose initial weights come from torch's global generator.

    Attributes:
        trains_jointly: False for a learner that sees one task after another. True for joint training: the learner gets
            mini-batches of the shuffled union of all tasks, and `task` is the task of each example, shape (batch,),
            int64, on the CPU.
    """

    trains_jointly: ClassVar[bool]

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Trains on one mini-batch of task number `task`: inputs x (batch, ...), labels y (batch,), int64."""

    def predict(self, x: Tensor, task: int) -> Tensor:
        """Logits (batch, classes of the task) for inputs x (batch, ...) of task number `task`."""

    def train(self, mode: bool = True) -> object:
        """Switches to training mode, or to evaluation mode with mode = False."""

    def state_dict(self) -> Mapping[str, Any]:
        """All that decides how training goes on, as torch.load(weights_only=True) reads it back."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object:
        """Restores the state that `state_dict` returned; raises ValueError for another, and is then as it was."""


LEARNERS: dict[str, Callable[..., Learner]] = {
    "single": Single,
    "independent": Independent,
    "multimodal": Multimodal,
    "ewc": Ewc,
    "icarl": Icarl,
    "gem": Gem,
    "gem_pure_python": GemPurePython,
    "agem": Agem,
    "joint": Joint,
}
