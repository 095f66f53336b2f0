"""Embeddings: y = W[x]."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from gem_fast.task_gradients.pieces import Segments
from gem_fast.task_gradients.recording import CannotFuse, Recorder, examples_first


def embedding(recorder: Recorder, module: nn.Embedding, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """dL/dW[i] = sum of dL/dy over all places where the input is i."""
    for option in ("max_norm", "sparse", "scale_grad_by_freq"):
        if getattr(module, option):
            raise CannotFuse(f"Embedding has the option {option}")
    dim = recorder.examples_dim(module, input)
    output = forward(input)
    write = partial(_write_weight, module, examples_first(input, dim))
    recorder.use(module.weight, output, dim, write, module=module, reads=input)
    return output


def _write_weight(module: nn.Embedding, x: Tensor, grad: Tensor, segments: Segments, out: Tensor) -> None:
    out.zero_()
    for index, mine, row in zip(segments.split(x), segments.split(grad), out, strict=True):
        row.index_add_(0, index.flatten(), mine.reshape(-1, mine.shape[-1]))
        if module.padding_idx is not None:
            row[module.padding_idx].zero_()
