"""An experiment: from a configuration, which is a plain dictionary, to a stream, a learner and what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gem_fast.paper.data import MNIST_5K, load_data
from gem_fast.paper.errors import InputError
from gem_fast.paper.learners import LEARNERS
from gem_fast.paper.models import mlp
from gem_fast.paper.presets import PRESETS
from gem_fast.paper.protocol import Journal, Record, learn_stream
from gem_fast.paper.streams import STREAMS

__all__ = ["FIELDS", "Experiment", "configuration", "hyper_parameters"]

EVALUATIONS_PER_TASK = 2
# What a configuration holds beside the hyper-parameters and eval_every.
FIELDS = ("stream", "data", "tasks", "samples_per_task", "batch_size", "epochs", "seed", "device", "learner")


def configuration(
    *,
    stream: str,
    learner: str,
    data: str = MNIST_5K,
    tasks: int = 20,
    samples_per_task: int = 1000,
    batch_size: int = 10,
    epochs: int = 1,
    seed: int = 0,
    device: str = "cpu",
    eval_every: int | None = None,
    **hyper: Any,
) -> dict[str, Any]:
    """Everything that decides what an experiment does, by name.

    Args:
        stream: Kind of tasks, one of STREAMS.
        learner: Method, one of LEARNERS.
        data: What `load_data` takes.
        tasks: Tasks T of the stream.
        samples_per_task: Training examples of each task.
        batch_size: Examples per mini-batch.
        epochs: Passes over a task's examples before the next task begins.
        seed: Of the stream, of the order of the examples and of the initial weights.
        device: The torch device.
        eval_every: Mini-batches between two evaluations; None: half of a task's.
        hyper: The learner's hyper-parameters; those left out are the published ones.

    Returns:
        Numbers and texts only, in a fixed order; JSON holds it.

    Raises:
        InputError: The learner was not run on the stream, or has no such hyper-parameter.
    """
    batches = epochs * math.ceil(samples_per_task / batch_size)
    values = (stream, data, tasks, samples_per_task, batch_size, epochs, seed, device, learner)
    return (
        dict(zip(FIELDS, values, strict=True))
        | hyper_parameters(stream, learner, hyper)
        | {"eval_every": eval_every or math.ceil(batches / EVALUATIONS_PER_TASK)}
    )


def hyper_parameters(stream: str, learner: str, given: dict[str, Any]) -> dict[str, Any]:
    """The published hyper-parameters of a learner on a stream, overruled by those given.

    Args:
        stream: Kind of tasks.
        learner: Method.
        given: Values by name.

    Returns:
        The arguments of the learner's constructor by name.

    Raises:
        InputError: There are none for this learner on this stream, or one is given that the learner does not have.
    """
    preset = PRESETS.get((stream, learner))
    if preset is None:
        raise InputError(f"the learner {learner} has no published settings for the stream {stream}")
    for name in given:
        if name not in preset:
            raise InputError(f"--{name.replace('_', '-')} is not an option of the learner {learner}")
    return preset | given


class Experiment:
    """A learner in front of a stream, ready to run once.

    Attributes:
        config: The configuration.
        stream: The tasks, on the device.
        learner: The learner, on the device.
        batches_per_task: Mini-batches of each task.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        """Loads the data, makes the stream and the learner, and seeds torch's global generator.

        Args:
            config: What `configuration` returned.

        Raises:
            InputError: The data cannot be loaded, or are not enough.
        """
        self.config = config
        self._generator = torch.Generator().manual_seed(config["seed"])
        make_stream = STREAMS[config["stream"]]
        data = load_data(config["data"])
        device = torch.device(config["device"])
        self.stream = make_stream(data, config["tasks"], config["samples_per_task"], self._generator).to(device)
        self.batches_per_task: int = config["epochs"] * math.ceil(config["samples_per_task"] / config["batch_size"])
        hyper = {name: value for name, value in config.items() if name not in (*FIELDS, "eval_every")}
        torch.manual_seed(config["seed"])
        model = mlp(self.stream.n_inputs, self.stream.n_outputs).to(device)
        self.learner = LEARNERS[config["learner"]](model, **hyper)

    def run(
        self,
        *,
        on_batch: Callable[[int, npt.NDArray[np.float64] | None], None] = lambda task, accuracy: None,
        on_journal: Callable[[Journal], None] = lambda journal: None,
        journal: Journal | None = None,
    ) -> Record:
        """Learns the stream; arguments, result and errors as `learn_stream`."""
        return learn_stream(
            self.learner,
            self.stream,
            batch_size=self.config["batch_size"],
            epochs=self.config["epochs"],
            eval_every=self.config["eval_every"],
            generator=self._generator,
            on_batch=on_batch,
            on_journal=on_journal,
            journal=journal,
        )
