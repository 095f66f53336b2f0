"""How much memory a run needs: what cannot fit is refused before anything is allocated."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from gem_fast.paper.data import ImageData
from gem_fast.paper.errors import InputError, flag

FLOAT, INT64 = 4, 8
HIDDEN = 100
# Limits of containers, version 2 and 1.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def check_footprint(config: Mapping[str, Any], data: ImageData) -> None:
    """Raises InputError unless what a run keeps of its data set fits into the memory of its device.

    The estimate counts what grows with an option: the examples, the networks, the episodic memory and the accuracies.
    """
    needed = dict(_parts(config, data))
    available = _available(torch.device(config["device"]))
    if sum(needed.values()) > available:
        option = max(needed, key=needed.__getitem__)
        raise InputError(
            f"{flag(option)} {config[option]} needs about {_text(needed[option])} of memory, "
            f"and {config['device']} has {_text(available)}"
        )


def _parts(config: Mapping[str, Any], data: ImageData) -> Iterator[tuple[str, int]]:
    """Options and the bytes that grow with them."""
    tasks, learner = config["tasks"], config["learner"]
    example = data.train_images[0].numel()
    pixel_stream = config["stream"] in ("rotations", "permutations")
    n_train = len(data.train_labels)
    per_task = min(config["samples_per_task"] or n_train // tasks, n_train)
    # Images as bytes and their labels; a stream of pixels has a map of them for each task.
    stream = tasks * (per_task * (example + INT64) + (example * INT64 if pixel_stream else 0))
    # An input layer, or a gradient of its size, for each task; the networks of `independent` are T times smaller.
    layers = tasks * example * {"multimodal": HIDDEN, "gem_pure_python": HIDDEN, "independent": 1}.get(learner, 0)
    one_hot = FLOAT * tasks**2 if config.get("descriptor") == "one-hot" else 0
    # A row of accuracies after each task and within it.
    yield "tasks", stream + FLOAT * layers + one_hot + 2 * INT64 * config["rounds"] * tasks**2
    if (per_memory := config.get("memory_per_task")) is not None:
        owners = 1 if learner == "ewc" else tasks
        # A memory never holds more than the examples that came.
        yield "memory_per_task", owners * min(per_memory, per_task * config["epochs"]) * (FLOAT * example + INT64)


def _available(device: torch.device) -> int:
    """The bytes of memory that a device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # there is none, or it is "max"
            limits.append(int(path.read_text()))
    return min(limits)


def _text(size: int) -> str:
    """A number of bytes with three digits and a unit."""
    power = min(5, int(math.log10(max(size, 1))) // 3)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"
