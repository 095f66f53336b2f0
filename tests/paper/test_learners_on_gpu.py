"""GEM's learner on a GPU: whole steps as one CUDA graph, for the networks of the paper."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gem_fast.paper.learners import PRESETS, make_learner
from gem_fast.paper.learners.base import SgdLearner
from gem_fast.paper.learners.gem import Gem
from gem_fast.paper.learners.stream_info import StreamInfo

pytestmark = pytest.mark.cuda

TASKS, STEPS, BATCH = 3, 8, 10
STREAMS = {
    "rotations": StreamInfo(TASKS, (range(10),) * TASKS, 10, (784,), "mlp"),
    "cifar100": StreamInfo(TASKS, (range(5), range(5, 10), range(10, 15)), 15, (3, 32, 32), "resnet18"),
}


def trained(stream: str, device: str, **options: int) -> SgdLearner:
    torch.manual_seed(0)
    info = STREAMS[stream]
    hyper = PRESETS[stream, "gem"] | options | {"lr": 0.01}
    learner = make_learner("gem", info, torch.device(device), **hyper)
    generator = torch.Generator().manual_seed(1)
    for task in range(TASKS):
        for _ in range(STEPS):
            x = torch.rand(BATCH, *info.input_shape, generator=generator)
            y = torch.randint(len(info.outputs[task]), (BATCH,), generator=generator)
            learner.observe(x.to(device), y.to(device), task)
    return learner


@pytest.mark.parametrize("options", [{}, {"memory_batch": 4}], ids=["exact", "sampled"])
@pytest.mark.parametrize("stream", STREAMS)
def test_steps_come_from_a_graph(stream: str, options: dict[str, int], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gem_fast"):
        learner = trained(stream, "cuda", **options)
    assert caplog.messages == []
    assert isinstance(learner, Gem)
    assert learner.gem._step.graphed is not None
    assert learner.gem._step.graphed._graph is not None
    assert all(bool(p.isfinite().all()) for p in learner.parameters())


def test_a_gpu_learns_as_the_cpu_does() -> None:
    def losses(learner: SgdLearner) -> Tensor:
        device = learner.device
        x, y = torch.rand(40, 784, generator=torch.Generator().manual_seed(2)).to(device), torch.arange(40).to(device)
        return torch.stack([F.cross_entropy(learner.logits(x, task), y % 10) for task in range(TASKS)]).cpu()

    torch.testing.assert_close(
        losses(trained("rotations", "cuda")), losses(trained("rotations", "cpu")), rtol=1e-3, atol=1e-4
    )
