"""GELU by its approximation with tanh, which GPT-2 composes of eight operators: a pass takes torch's one."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from gem_fast.gradients.fused.recorder import Recorder


def tanh_gelu(recorder: Recorder, module: nn.Module, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """The same to rounding, in less time; the backward keeps one tensor in place of four."""
    return F.gelu(input, approximate="tanh")
