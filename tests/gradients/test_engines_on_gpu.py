"""The engines and both forms of G on a GPU: what the CPU gives, without a wait for the device."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from utils.models import Residual
from utils.waiting import waiting_raises

from gem_fast import Batch, Engine, Fused, Loop, Objective, project_

pytestmark = pytest.mark.cuda

ENGINES = {"loop": Loop, "rows": Fused, "layerwise": lambda: Fused(form="layerwise")}
TASKS, EXAMPLES = 5, 6


def model() -> nn.Module:
    """Linear layers by both ways of the layerwise form, and a parameter that goes by blocks of columns."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(12, 40), nn.LayerNorm(40), nn.Tanh(), nn.Linear(40, 200), nn.ReLU(), nn.Linear(200, 3)
    )


def projected(engine: Engine, device: str, dtype: torch.dtype, calls: int = 1) -> tuple[Tensor, Tensor]:
    """g~ and the multipliers, on the CPU; the last call may not wait where there are several."""
    net = model().to(device, dtype)
    torch.manual_seed(2)
    x = torch.randn(TASKS + 1, EXAMPLES, 12, dtype=torch.float64).to(device, dtype)
    y = torch.randint(3, (TASKS + 1, EXAMPLES)).to(device)
    constraints = [[Batch(task, x[task], y[task])] for task in range(TASKS)]
    parameters = list(net.parameters())
    objective = Objective(net, F.cross_entropy)
    g = torch.autograd.grad(-F.cross_entropy(net(x[:TASKS].flatten(0, 1)), y[:TASKS].flatten()), parameters)
    for call in range(calls):
        with waiting_raises(call > 0 and call == calls - 1):
            grads = [part.clone() for part in g]
            result = project_(grads, engine(objective, constraints, parameters), margin=0.1)
    return torch.cat([part.flatten() for part in grads]).cpu(), result.multipliers.cpu()


@pytest.mark.parametrize("name", ENGINES)
def test_a_gpu_projects_as_the_cpu_does(name: str) -> None:
    there, v = projected(ENGINES[name](), "cuda", torch.float64)
    here, expected = projected(Loop(), "cpu", torch.float64)
    assert bool((expected > 0.1).any())
    torch.testing.assert_close(there, here, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(v, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["rows", "layerwise"])
def test_a_later_pass_does_not_wait_for_the_device(name: str) -> None:
    # Passes 1, 2, 4 and 8 are compared with the loop, which waits for the result; the seventh is not.
    projected(ENGINES[name](), "cuda", torch.float32, calls=7)


def test_a_resnet_is_one_pass_with_tf32(caplog: pytest.LogCaptureFixture) -> None:
    """cuDNN takes it by the number of examples: running statistics and gradients differ by more than the loop's own."""
    torch.manual_seed(0)
    net = Residual().cuda()
    objective, parameters = Objective(net, F.cross_entropy), list(net.parameters())
    x, y = torch.randn(TASKS, 32, 3, 8, 8, device="cuda"), torch.randint(3, (TASKS, 32), device="cuda")
    constraints = [[Batch(task, x[task], y[task])] for task in range(TASKS)]
    engine = Fused(form="layerwise")
    with caplog.at_level(logging.WARNING, "gem_fast"):
        for _ in range(9):
            engine(objective, constraints, parameters)
    assert caplog.messages == []
