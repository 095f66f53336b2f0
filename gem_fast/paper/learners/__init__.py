"""Learners: one file each, registered here under the name the command line uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from gem_fast.paper.errors import InputError
from gem_fast.paper.learners.agem import Agem
from gem_fast.paper.learners.base import SgdConfig, SgdLearner
from gem_fast.paper.learners.ewc import Ewc
from gem_fast.paper.learners.gem import Gem
from gem_fast.paper.learners.gem_pure_python import GemPurePython
from gem_fast.paper.learners.icarl import Icarl
from gem_fast.paper.learners.independent import Independent
from gem_fast.paper.learners.joint import Joint
from gem_fast.paper.learners.multimodal import Multimodal
from gem_fast.paper.learners.single import Single
from gem_fast.paper.learners.stream_info import StreamInfo
from gem_fast.paper.streams import STREAMS

__all__ = ["LEARNERS", "PRESETS", "Learner", "LearnerName", "SgdConfig", "SgdLearner", "make_learner"]


class Learner(Protocol):
    """What the protocol needs of a learner: torch.nn.Module has `train`, and SgdLearner the rest except `observe`.

    A learner's constructor takes the StreamInfo, the device to train on, and its `Config`. It makes its own model,
    whose initial weights come from torch's global generator.

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


LearnerName = Literal["single", "independent", "multimodal", "ewc", "icarl", "gem", "gem_pure_python", "agem", "joint"]
LEARNERS: dict[str, type[SgdLearner]] = {
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
# Those whose network can be told what a task is about.
TAKE_DESCRIPTORS = ("single", "ewc", "gem", "joint")

# (stream, learner) -> the published hyper-parameters, for each learner that can be run on the stream.
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    (stream, name): preset
    for stream in STREAMS
    for name, learner in LEARNERS.items()
    if (preset := learner.Config.defaults(stream)) is not None
}


def make_learner(name: str, stream_info: StreamInfo, device: torch.device, **hyper: Any) -> SgdLearner:
    """A new learner, one of LEARNERS, with all of its hyper-parameters by name.

    Raises:
        InputError: The tasks have descriptors, which this learner's network does not take, or another one is needed.
    """
    if stream_info.descriptors and name not in TAKE_DESCRIPTORS:
        raise InputError(f"--descriptor is for the learners {', '.join(TAKE_DESCRIPTORS)}, got --learner {name}")
    learner = LEARNERS[name]
    return learner(stream_info, device, learner.Config(**hyper))
