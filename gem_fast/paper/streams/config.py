"""The options of the streams: which tasks, and in which order and pieces they are learned."""

from pathlib import Path
from typing import Any, Literal

import torch

from gem_fast.paper.config import Options, Seed, Whole
from gem_fast.paper.data import MNIST_5K, ImageData, load_data
from gem_fast.paper.errors import InputError
from gem_fast.paper.streams import STREAMS, Stream
from gem_fast.paper.streams.descriptors import DESCRIPTORS, DescriptorName, described


class RootOptions(Options):
    """Where torchvision keeps its data sets."""

    data_root: str | None = None
    """torchvision's folder of data sets; None: the one where torchvision puts them"""


class DataOptions(RootOptions):
    """The data set."""

    data: str = MNIST_5K
    """mnist-5k, 5000 digits; mnist, fashion-mnist, kmnist, cifar100 of torchvision; a folder or .tar.gz of such"""

    @property
    def data_name(self) -> str:
        """The name of the data set, or of its folder, for titles."""
        return Path(self.data).resolve().name


class StreamConfig(DataOptions):
    """Tasks that come one after another: the options of rotations and permutations."""

    tasks: Whole = 20
    """number of tasks"""
    samples_per_task: Whole | None = 1000
    """training examples of each task; None: all"""
    batch_size: Whole = 10
    """examples per mini-batch"""
    epochs: Whole = 1
    """passes over a task's examples before the next task begins"""
    rounds: Whole = 1
    """how often all tasks come, one after another; each time with another part of their examples"""
    shuffle_tasks: bool = False
    """learn the tasks in a random order instead of their own"""
    descriptor: DescriptorName | None = None
    """what the model is told about a task: its angle (rotations), which one it is, its classes' names (cifar100)"""
    seed: Seed = 0
    """seed of the stream, of the order of the examples and of the initial weights"""


class Cifar100Config(StreamConfig):
    """The options of cifar100."""

    data: str = "cifar100"
    samples_per_task: Whole | None = None
    class_order: Literal["natural", "random"] = "natural"
    """whether classes are given to the tasks in the order of their numbers or in a random order"""


class SplitConfig(Cifar100Config):
    """The options of split."""

    data: str = MNIST_5K
    tasks: Whole = 5
    head: Literal["task", "shared"] = "task"
    """task: a task is answered with outputs of its own; shared: with all outputs, without the task's number"""


STREAM_CONFIGS: dict[str, type[StreamConfig]] = dict.fromkeys(STREAMS, StreamConfig)
STREAM_CONFIGS |= {"cifar100": Cifar100Config, "split": SplitConfig}


def load_data_of(config: dict[str, Any]) -> ImageData:
    """The data set that a configuration names."""
    return load_data(config["data"], config["data_root"])


def make_stream(config: dict[str, Any], data: ImageData, generator: torch.Generator) -> Stream:
    """Makes the stream of a configuration and its data, on the CPU; the generator is the source of all that is random.

    Raises InputError where the data are not for this stream, a number is too large for them, or the tasks cannot have
    such descriptors.
    """
    name, descriptor = config["stream"], config.get("descriptor")
    if descriptor and descriptor not in DESCRIPTORS[name]:
        possible = " or ".join(DESCRIPTORS[name])
        raise InputError(f"--descriptor must be {possible} for the stream {name}, got {descriptor}")
    options = {option: config[option] for option in ("class_order", "head") if option in config}
    stream = STREAMS[name](data, config["tasks"], config["samples_per_task"], generator, **options)
    if descriptor:
        stream = described(stream, descriptor)
    if config["shuffle_tasks"]:
        stream = stream.in_order(torch.randperm(stream.n_tasks, generator=generator).tolist())
    return stream
