"""Learners, registered here under the name the command line uses."""

from typing import Any, Literal

import torch

from gem_fast.paper.errors import InputError
from gem_fast.paper.learners.base import SgdConfig, SgdLearner
from gem_fast.paper.learners.baselines import Independent, Joint, Multimodal, Single
from gem_fast.paper.learners.ewc import Ewc
from gem_fast.paper.learners.gem import Agem, Gem, GemPurePython
from gem_fast.paper.learners.icarl import Icarl
from gem_fast.paper.learners.stream_info import StreamInfo
from gem_fast.paper.streams import STREAMS

__all__ = ["LEARNERS", "PRESETS", "LearnerName", "SgdConfig", "SgdLearner", "make_learner"]

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

    Raises InputError where the tasks have descriptors that its network does not take, or as the learner itself.
    """
    if stream_info.descriptors and name not in TAKE_DESCRIPTORS:
        raise InputError(f"--descriptor is for the learners {', '.join(TAKE_DESCRIPTORS)}, got --learner {name}")
    learner = LEARNERS[name]
    return learner(stream_info, device, learner.Config(**hyper))
