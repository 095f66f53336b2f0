"""The shortcuts for models that are linear layers with ReLU between them, on a CPU.

Everything about them is behind two calls, each of which answers with a `MlpPass` or with None for "not mine":
`whole_pass` before a forward, where the model is an nn.Sequential of such layers and the loss plain cross entropy, and
`recorded_pass` after one, where that is what autograd recorded, however the model is written. docs/architecture.md
has what each gains.
"""

from gem_fast.gradients.cpu_mlp.examples import ExampleGradients, MlpPlan, SamplePlan, alone_pass, step_pass
from gem_fast.gradients.cpu_mlp.passes import MlpPass, recorded_pass, whole_pass
from gem_fast.gradients.cpu_mlp.recognition import has_global_hooks, has_hooks, is_whole, mlp_layers

__all__ = [
    "ExampleGradients",
    "MlpPass",
    "MlpPlan",
    "SamplePlan",
    "alone_pass",
    "has_global_hooks",
    "has_hooks",
    "is_whole",
    "mlp_layers",
    "recorded_pass",
    "step_pass",
    "whole_pass",
]
