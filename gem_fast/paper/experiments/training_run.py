"""A training run: from a configuration, a dictionary of plain values, to a stream, a learner and what was measured."""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gem_fast.paper.data import ImageData
from gem_fast.paper.errors import Diverged, InputError, flag
from gem_fast.paper.experiments.protocol import Record, learn_stream
from gem_fast.paper.experiments.torchrun import Learner, ParallelLearner, processes, share
from gem_fast.paper.learners import LEARNERS, PRESETS, make_learner
from gem_fast.paper.learners.stream_info import StreamInfo
from gem_fast.paper.streams.config import STREAM_CONFIGS, load_data_of, make_stream
from gem_fast.paper.streams.schedule import make_schedule

RunConfig = dict[str, Any]

# By architecture, where nothing else is asked for: testing a convolutional network takes longer than training it.
EVALUATIONS_PER_EXPERIENCE = {"mlp": 2, "resnet18": 1}
# What every configuration has beside the options of its stream and of its learner.
COMMON: dict[str, Any] = {"device": "cpu", "eval_every": None}

FLOAT, INT64 = 4, 8  # bytes
# Where cgroups, version 2 and 1, say how much memory a container may use.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def configuration(stream: str, learner: str, **options: Any) -> RunConfig:
    """Everything that decides what a run does, by name: numbers, texts, booleans and None, which JSON can hold.

    `options` are those that differ from the published settings of the learner on the stream, by the names that the
    subcommand `run` has. Raises InputError where the learner was not run on the stream, an option is neither the
    stream's nor the learner's, or a value is out of its bounds.
    """
    kind = STREAM_CONFIGS[stream]
    of_stream = {name: options.pop(name) for name in kind.names() if name in options}
    common = {name: options.pop(name, value) for name, value in COMMON.items()}
    hyper = hyper_parameters(stream, learner, options)
    found = {"stream": stream, "learner": learner} | asdict(kind(**of_stream)) | common | hyper
    if found["descriptor"] is None:
        del found["descriptor"]  # the names of runs in the cache are older than this option
    return found


def hyper_parameters(stream: str, learner: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The published hyper-parameters of a learner on a stream by name, overruled by those given.

    Raises InputError where the learner cannot be run on the stream, a value is given for what it does not have, or is
    out of its bounds.
    """
    preset = PRESETS.get((stream, learner))
    if preset is None:
        raise InputError(f"--learner {learner} is not for the stream {stream}, whose network it cannot train")
    for name in given:
        if name not in preset:
            raise InputError(f"{flag(name)} is not an option of the learner {learner}")
    return asdict(LEARNERS[learner].Config(**{**preset, **given}))


def describe(config: RunConfig) -> str:
    """A run in a few words, for titles."""
    epochs = "" if config["epochs"] == 1 else f", {config['epochs']} epochs"
    told = f", descriptor {config['descriptor']}" if config.get("descriptor") else ""
    data = Path(config["data"]).resolve().name
    return f"{config['learner']} on {config['stream']} of {data}{epochs}{told}, seed {config['seed']}"


def check_device(name: str) -> None:
    """Raises InputError unless torch can use a device."""
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # torch raises many kinds here
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--device must be a device torch can use here, got {name!r}: {reason}") from error


def check_footprint(config: RunConfig, data: ImageData) -> None:
    """Raises InputError, before anything is allocated, unless a run on its data fits into the memory of its device.

    The estimate counts what grows with an option: the examples, the networks, the episodic memory and the accuracies.
    """
    tasks, learner = config["tasks"], config["learner"]
    example, n_train = data.train_images[0].numel(), len(data.train_labels)
    per_task = min(config["samples_per_task"] or n_train // tasks, n_train)
    # Images as bytes and their labels; a stream of pixels has a map of them for each task.
    pixel_map = INT64 * example if config["stream"] in ("rotations", "permutations") else 0
    stream = tasks * (per_task * (example + INT64) + pixel_map)
    # An input layer of 100 units, or a gradient of its size, for each task; those of `independent` are T times smaller.
    layers = FLOAT * tasks * example * {"multimodal": 100, "gem_pure_python": 100, "independent": 1}.get(learner, 0)
    one_hot = FLOAT * tasks**2 if config.get("descriptor") == "one-hot" else 0
    # A row of accuracies after each task and within it.
    needed = {"tasks": stream + layers + one_hot + 2 * INT64 * config["rounds"] * tasks**2}
    if (per_memory := config.get("memory_per_task")) is not None:
        owners = 1 if learner == "ewc" else tasks
        # A memory never holds more than the examples that came.
        kept = owners * min(per_memory, per_task * config["epochs"])
        needed["memory_per_task"] = kept * (FLOAT * example + INT64)
    available = _available(torch.device(config["device"]))
    if sum(needed.values()) > available:
        option = max(needed, key=needed.__getitem__)
        raise InputError(
            f"{flag(option)} {config[option]} needs about {_bytes(needed[option])} of memory, "
            f"and {config['device']} has {_bytes(available)}"
        )


def _available(device: torch.device) -> int:
    """The bytes of memory that a device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # there is none, or it is "max"
            limits.append(int(path.read_text()))
    return min(limits)


def _bytes(size: int) -> str:
    """A number of bytes with three digits and a unit."""
    power = min(5, int(math.log10(max(size, 1))) // 3)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


class TrainingRun:
    """One learner on one stream with one seed; it can be run once.

    Its `stream` and `learner` are on the device, its `schedule` says in which order the tasks are learned, and its
    `config` has the data's name for `data` and a number for `eval_every`.
    """

    def __init__(self, config: RunConfig) -> None:
        """Loads the data, makes the stream and the learner, and seeds torch's global generator.

        Raises InputError where the data cannot be loaded, or are not enough, or the run does not fit into memory, or
        cannot be done by the processes that do it together.
        """
        mine = processes()
        device = torch.device(config["device"])
        self._generator = torch.Generator().manual_seed(config["seed"])
        data = load_data_of(config)
        check_footprint(config, data)
        self.stream = make_stream(config, data, self._generator).to(device)
        self.schedule = make_schedule(self.stream, config["batch_size"], config["epochs"], config["rounds"])
        longest = max(experience.batches for experience in self.schedule.experiences)
        eval_every = config["eval_every"] or math.ceil(longest / EVALUATIONS_PER_EXPERIENCE[self.stream.architecture])
        self.config = config | {"data": self.stream.data, "eval_every": eval_every}
        hyper = {name: config[name] for name in PRESETS[config["stream"], config["learner"]]}
        hyper = share(mine, config["learner"], hyper)
        torch.manual_seed(config["seed"])
        learner = make_learner(config["learner"], StreamInfo.of(self.stream), device, **hyper)
        self.learner: Learner = learner
        if mine.size > 1:
            self.config["processes"] = mine.size
            self.learner = ParallelLearner(learner, mine, self.stream.n_tasks)

    def run(self, *watch: Callable[[Record], None], record: Record | None = None) -> Record:
        """Learns the stream; arguments, result and errors as `learn_stream`."""
        try:
            how: dict[str, Any] = {"eval_every": self.config["eval_every"], "generator": self._generator}
            return learn_stream(self.learner, self.stream, self.schedule, **how, watch=watch, record=record)
        except Diverged as error:
            # The options above their published values, or else all that may have done it.
            preset = PRESETS[self.config["stream"], self.config["learner"]]
            possible = [name for name in ("lr", "margin", "strength") if name in preset]
            larger = [name for name in possible if self.config[name] > preset[name]]
            raise Diverged(f"{error}; try a smaller {' or '.join(map(flag, larger or possible))}") from error
