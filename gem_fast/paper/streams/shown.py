"""Test images as a task shows them, without showing them: the first layer's weights are moved instead."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gem_fast.gradients.fused.entries import TaskEntries


class Originals:
    """Images that many tasks show, each through its own map of pixels.

    Attributes:
        images: Shape (pixels, m), float32: pixel by pixel, so that a task's pixels are copied as rows.
        entries: Those that are not zero, image by image; None where there are many, or not on the CPU.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.entries = TaskEntries.of(images.T)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The images times weight' plus bias, shape (m, outputs), for a weight of shape (outputs, pixels)."""
        if self.entries is None:
            return F.linear(self.images.T, weight, bias)
        output: Tensor = torch.ops.gem_fast._sparse_linear(*self.entries.by_rows, None, weight, bias)
        return output


class ShownImages(Tensor):
    """Images through a map of pixels, shape (m, shown pixels), for inference.

    F.linear does not look at them: it moves the columns of its weight to where the originals have the pixels. Any other
    function of torch gets the images.
    """

    _originals: Originals
    _pixel_map: Tensor

    @staticmethod
    def of(originals: Originals, pixel_map: Tensor) -> ShownImages:
        """Shows images; the map, shape (shown pixels,), int64, tells which pixel of the original each pixel is."""
        # Its own contents take no memory, and are never read: nan would tell.
        nothing = originals.images.new_full((), torch.nan).expand(originals.images.shape[1], len(pixel_map))
        shown = nothing.as_subclass(ShownImages)
        shown._originals, shown._pixel_map = originals, pixel_map
        return shown

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a function of torch that is given such images."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear and isinstance(args[0], cls):
                return args[0]._linear(*args[1:], **(kwargs or {}))
            return func(*tree_map_only(cls, cls._images, args), **tree_map_only(cls, cls._images, kwargs or {}))

    def _linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        moved = weight.new_zeros(len(self._originals.images), len(weight))
        return self._originals.linear(moved.index_add_(0, self._pixel_map, weight.T).T, bias)

    def _images(self) -> Tensor:
        return self._originals.images.index_select(0, self._pixel_map).T
