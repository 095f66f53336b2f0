"""Linear layers: y = x W' + b."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gem_fast.gradients.fused.entries import LayerInput, SparseEntries
from gem_fast.gradients.fused.recorder import WHOLE, LinearCall, Recorder, TaskWriter, features_of, with_own_history
from gem_fast.gradients.fused.rules.bias import write_bias
from gem_fast.gradients.fused.task_batch import TaskBatch, TaskSizes

# Elements of a weight that is copied into G: one batched product takes half the time of one product per row of G, which
# is what a result that is not contiguous comes to.
_MAX_COPIED = 2**14


def linear(recorder: Recorder, module: nn.Linear, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """dL/dW = sum over the examples (and positions) of dL/dy x', dL/db = that of dL/dy."""
    x, dim = recorder.per_example(module, input)
    batch = recorder.batch
    if batch is not None and batch.entries is not None and _is_memory(x, batch):
        return _sparse_linear(recorder, module, x, batch.entries, batch.positions)
    output = with_own_history(forward(x))
    recorder.linear_calls.append(LinearCall(module.weight, module.bias, x, output, output.grad_fn))
    use_linear(recorder, module, module.weight, module.bias, x, output, dim)
    return output


def conv1d(recorder: Recorder, module: Any, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """Hugging Face's Conv1D, of GPT-2: y = x W + b, a linear layer whose weight (inputs, outputs) is transposed."""
    x, dim = recorder.per_example(module, input)
    output = with_own_history(forward(x))
    inputs = x.detach().transpose(0, dim)

    def rows(some: slice) -> TaskWriter:
        return lambda grad, tasks, out: _write_product(inputs[..., some], grad, tasks, out)

    recorder.use(
        module.weight, output, dim, rows(WHOLE), module=module, reads=x, restrict=rows, inputs=inputs, transposed=True
    )
    recorder.use(module.bias, output, dim, write_bias, module=module, restrict=features_of(write_bias, -1))
    return output


def use_linear(
    recorder: Recorder,
    module: nn.Module,
    weight: Tensor | None,
    bias: Tensor | None,
    input: Tensor,
    output: Tensor,
    dim: int,
    part: slice = WHOLE,
) -> None:
    """Notes output = input weight[part]' + bias[part], with the examples along dimension `dim` of both."""
    x = input.detach().transpose(0, dim)
    write = partial(_write_weight, x)
    recorder.use(
        weight,
        output,
        dim,
        write,
        module=module,
        reads=input,
        part=part,
        restrict=features_of(write, -1),
        inputs=x,
    )
    recorder.use(bias, output, dim, write_bias, module=module, part=part, restrict=features_of(write_bias, -1))


def _sparse_linear(
    recorder: Recorder, module: nn.Linear, x: Tensor, entries: SparseEntries, positions: Tensor | None
) -> Tensor:
    """The same over a memory of mostly zeros: without the products with a zero."""
    output: Tensor = _FromEntries.apply(module.weight, module.bias, entries, positions)
    call = LinearCall(module.weight, module.bias, x, output, output.grad_fn, entries, positions)
    recorder.linear_calls.append(call)
    prepared_for, dense = recorder.tasks.sizes, partial(_write_weight, x)

    def write(grad: Tensor, tasks: TaskSizes, out: Tensor) -> None:
        if tasks.sizes == prepared_for:
            torch.ops.gem_fast._layer_gradient_(out, grad, *LayerInput.of(None, entries, positions), tasks.sizes)
        else:
            dense(grad, tasks, out)

    recorder.use(module.weight, output, 0, write, module=module, reads=x, restrict=features_of(dense, -1), inputs=x)
    recorder.use(module.bias, output, 0, write_bias, module=module, restrict=features_of(write_bias, -1))
    return output


def _is_memory(x: Tensor, batch: TaskBatch) -> bool:
    """Whether a layer's input is the memory's examples as they are, flattened at most."""
    return (
        x.dim() == 2
        and x.data_ptr() == batch.x.data_ptr()
        and x.numel() == batch.x.numel()
        and len(x) == len(batch.x)
        and x.is_contiguous()
        and not x.requires_grad
    )


class _FromEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, entries: SparseEntries, at: Tensor | None) -> Tensor:
        return entries.linear(at, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise AssertionError("the gradients of a recorded layer come from its uses")


def _write_weight(x: Tensor, grad: Tensor, tasks: TaskSizes, out: Tensor) -> None:
    _write_product(grad, x, tasks, out)


def _write_product(left: Tensor, right: Tensor, tasks: TaskSizes, out: Tensor) -> None:
    """out[k] (a, b) = left' right over the examples and positions of task k: left (N, ..., a), right (N, ..., b)."""
    for some, examples, _ in tasks.runs:
        t, rows = some.stop - some.start, out[some]
        factors = [x[examples].reshape(t, -1, x.shape[-1]) for x in (left, right)]
        if t == 1:
            torch.mm(factors[0][0].mT, factors[1][0], out=rows[0])
        elif rows.numel() <= _MAX_COPIED * t:
            rows.copy_(torch.bmm(factors[0].mT, factors[1]))
        else:
            torch.bmm(factors[0].mT, factors[1], out=rows)
