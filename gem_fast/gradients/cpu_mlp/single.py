"""A mini-batch alone through linear layers with ReLU between them: its loss and gradients, without autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gem_fast.gradients.fused.task_batch import TaskBatch


@torch.no_grad()
def single_pass(layers: Sequence[nn.Linear], batch: TaskBatch) -> tuple[dict[Tensor, Tensor], Tensor]:
    """The gradient of each weight and bias, and the mean cross entropy, ().

    Args:
        layers: a model of nothing else (`mlp_layers`).
        batch: that goes the way of `whole_pass` (`is_whole`).
    """
    weights = [layer.weight for layer in layers]
    inputs = [batch.x.flatten(1).contiguous()]
    for layer in layers[:-1]:
        inputs.append(F.linear(inputs[-1], layer.weight, layer.bias).relu_())
    logits = F.linear(inputs[-1], weights[-1], layers[-1].bias)
    loss = F.cross_entropy(logits, batch.y)
    grads = {p: torch.empty_like(p) for layer in layers for p in (layer.weight, layer.bias) if p is not None}
    nothing = logits.new_empty(0)
    weight_rows = [grads[weight].unsqueeze(0) for weight in weights]
    bias_rows = [nothing if layer.bias is None else grads[layer.bias].unsqueeze(0) for layer in layers]
    delta = torch.ops.gem_fast._mlp_backward(
        torch.ops.gem_fast._cross_entropy_gradient(logits, batch.y, batch.tasks.sizes),
        inputs[1:],
        list(weights),
        weight_rows[1:],
        bias_rows,
        batch.tasks.sizes,
    )
    torch.ops.gem_fast._layer_gradient_(weight_rows[0], delta, inputs[0], [], None, batch.tasks.sizes)
    return grads, loss
