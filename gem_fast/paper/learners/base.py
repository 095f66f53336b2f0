"""What learners have in common: SGD on one model, a state that a file can hold, a buffer of the current task."""

import abc
import copy
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gem_fast.distributed import replica
from gem_fast.paper.config import Options, Rate
from gem_fast.paper.learners.stream_info import StreamInfo
from gem_fast.paper.models import MultiHeadModel


class SgdConfig(Options):
    """The hyper-parameter of all learners; the published runs' values are the defaults, by stream.

    Names in the published code: `margin` is memory_strength, `memory_per_task` n_memories, `ridge` the eps of the
    solver. There are no published runs of agem and joint, of icarl on rotations and permutations, and of anything on
    split. The learning rates there are this project's: of a few from 0.01 to 0.3 the best one, or one as good within
    noise, on the 5000 digits, mean of seeds 0-2 (split: pairs of digits in 5 tasks). The rest is as in the learner's
    published runs. On cifar100, agem and joint have gem's learning rate, untried.
    """

    lr: Rate
    """learning rate of SGD"""


class SgdLearner(nn.Module, abc.ABC):
    """A model and its optimizer.

    state_dict() holds all that decides how training goes on, as torch.load(weights_only=True) reads it back: the
    model's tensors by name, and as `_extra_state` the states of its `parts`, all attributes that have one.

    A learner that `trains_jointly` does not see one task after another, but mini-batches of the shuffled union of all
    tasks, and `task` is the task of each example, shape (batch,), int64, on the CPU.
    """

    Config: ClassVar[type[SgdConfig]]
    trains_jointly: ClassVar[bool] = False

    def __init__(
        self, stream_info: StreamInfo, device: torch.device, config: SgdConfig, model: nn.Module | None = None
    ) -> None:
        """Takes over the training of a model on a device, whose weights come from torch's global generator.

        It is called as model(x, task); by default it is `stream_info.new_model()`, one network for all tasks.
        """
        super().__init__()
        self.stream_info = stream_info
        self.device = device
        self.descriptors = tuple(descriptor.to(device) for descriptor in stream_info.descriptors)
        self.model = (stream_info.new_model() if model is None else model).to(device)
        self._pass_task = model is not None or isinstance(self.model, MultiHeadModel)
        convolutions = [module for module in self.model.modules() if isinstance(module, nn.Conv2d)]
        if device.type == "cpu" and all(map(_is_safe_channels_last, convolutions)):
            # A convolution takes the format of its weights or of its input; this one is faster.
            for convolution in convolutions:
                convolution.weight.data = convolution.weight.data.to(memory_format=torch.channels_last)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.model = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=config.lr)

    @abc.abstractmethod
    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Trains on one mini-batch of a task: inputs x (batch, ...), labels y (batch,), int64."""

    def logits(self, x: Tensor, task: int) -> Tensor:
        """The model's outputs that are the task's classes, shape (batch, classes)."""
        # Several processes evaluate different examples: those passes exchange nothing.
        model = self.model if self.training else replica(self.model)
        told: tuple[Any, ...] = (self.descriptors[task],) if self.descriptors else (task,) if self._pass_task else ()
        logits: Tensor = model(x, *told)
        return logits

    def all_outputs(self, x: Tensor) -> Tensor:
        """The outputs for the classes of all tasks, shape (batch, stream_info.n_outputs), of the default model."""
        network = self.model.network if isinstance(self.model, MultiHeadModel) else self.model
        outputs: Tensor = network(x)
        return outputs

    def loss(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        """Mean cross-entropy of a mini-batch."""
        return F.cross_entropy(self.logits(x, task), y)

    def predict(self, x: Tensor, task: int) -> Tensor:
        """The model's logits."""
        return self.logits(x, task)

    def parts(self) -> dict[str, Any]:
        """What has a state of its own beside the model, by the name of its attribute: the optimizer, a memory, ..."""
        return {name: part for name, part in vars(self).items() if hasattr(part, "load_state_dict")}

    def get_extra_state(self) -> dict[str, Any]:
        """The states of all parts; torch calls it from state_dict."""
        return {name: part.state_dict() for name, part in self.parts().items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Gives the parts their states; torch calls it from load_state_dict."""
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


class Part:
    """A part of a learner, whose state are the attributes that STATE names: tensors, plain values, nests of such."""

    STATE: ClassVar[tuple[str, ...]]

    def state_dict(self) -> dict[str, Any]:
        """Copies of the attributes, by name."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes copies of what `state_dict` returned."""
        for name in self.STATE:
            setattr(self, name, copy.deepcopy(state[name]))


class CurrentTaskBuffer(Part):
    """Keeps the first examples of the current task; they are evicted when another task begins."""

    STATE = ("task", "batches")

    def __init__(self, capacity: int | None = None) -> None:
        """Begins without a task; at most `capacity` examples are kept, None keeps all of them."""
        self.task: int | None = None  # the current one; None before the first example
        self.batches: list[tuple[Tensor, Tensor]] = []
        self._capacity = capacity

    def ends_with(self, task: int) -> bool:
        """Whether an example of `task` ends the current task."""
        return self.task is not None and task != self.task

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Sees one mini-batch of a task, the current one or a new one."""
        if task != self.task:
            self.task, self.batches = task, []
        free = None if self._capacity is None else self._capacity - sum(len(labels) for _, labels in self.batches)
        if free is None or free > 0:
            self.batches.append((x[:free].clone(), y[:free].clone()))

    def examples(self) -> tuple[Tensor, Tensor]:
        """The examples kept, x (n, ...) and y (n,), in the order in which they came; there is a current task."""
        x, y = zip(*self.batches, strict=True)
        return torch.cat(x), torch.cat(y)


def _is_safe_channels_last(convolution: nn.Conv2d) -> bool:
    """Whether PyTorch's backward in that format keeps to its own memory on a CPU.

    With kernels of one pixel, a stride and two to seven input channels, that of 2.13 writes beyond it: the process
    crashes, at once or later.
    """
    strided = convolution.kernel_size == (1, 1) and convolution.stride != (1, 1)
    return not strided or convolution.in_channels >= 8
