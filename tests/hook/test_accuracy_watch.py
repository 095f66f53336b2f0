"""What a GPU finds out about projections is said, some steps later, without a wait for it."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from utils.models import mlp
from utils.training import train

from gem_fast import GEM, EpisodicMemory, Status
from gem_fast.hook import accuracy_watch
from gem_fast.hook.accuracy_watch import AccuracyWatch


class LateNumber:
    """Keeps statuses on the CPU; what was sent for is there at the next call."""

    def __init__(self, like: Any) -> None:
        self.largest, self.sent = 0, None

    def is_on(self, device: torch.device) -> bool:
        return True

    def raise_to(self, status: Any) -> None:
        self.largest = max(self.largest, status.value)

    def read(self) -> int | None:
        found, self.sent = self.sent, self.largest
        return found


def on_gpu(status: Status) -> Any:
    """A projection there."""
    return SimpleNamespace(status=SimpleNamespace(device=torch.device("cuda"), is_cuda=True, value=int(status)))


@pytest.mark.parametrize("status", Status)
def test_a_status_is_heard_of_some_steps_later(
    status: Status, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy_watch, "LateNumber", LateNumber)
    watch = AccuracyWatch()
    with caplog.at_level(logging.WARNING, "gem_fast"):
        for step in range(100):
            watch.projected(on_gpu(status if step == 20 else Status.SOLVED))
            watch.ask()
            assert step > 30 or caplog.messages == []
            assert step < 52 or len(caplog.messages) == (status != Status.SOLVED)
    assert len(caplog.messages) == (status != Status.SOLVED)
    assert all(status.name in said and "one of the last 32 steps" in said for said in caplog.messages)


@pytest.mark.cuda
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("by_step", [False, True], ids=["hook", "step"])
def test_what_is_not_finite_on_a_gpu_is_said(by_step: bool, cuda_graph: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = mlp().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=4), cuda_graph=cuda_graph)

    def batch(task: int) -> tuple[Tensor, Tensor, int]:
        return torch.randn(4, 6, device="cuda"), torch.randint(3, (4,), device="cuda"), task

    with caplog.at_level(logging.WARNING, "gem_fast"):
        train(model, optimizer, gem, [batch(0) for _ in range(5)] + [batch(1) for _ in range(30)], by_step=by_step)
        assert caplog.messages == []
        x, _ = gem.memory.examples(0)
        x[0, 0] = torch.nan
        train(model, optimizer, gem, [batch(1) for _ in range(80)], by_step=by_step)
    assert [said for said in caplog.messages if "NON_FINITE" in said] == caplog.messages[-1:]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.cuda
def test_a_step_that_a_scaler_skips_is_no_finding(caplog: pytest.LogCaptureFixture) -> None:
    """The fused step is called with an infinite gradient, and changes nothing."""
    model = mlp().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    gem = GEM(model, optimizer, memory=EpisodicMemory(per_task=4))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    with caplog.at_level(logging.WARNING, "gem_fast"):
        for step in range(80):
            x, y = torch.randn(4, 6, device="cuda"), torch.randint(3, (4,), device="cuda")
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) * (torch.inf if step == 30 else 1.0)
            scaler.scale(loss).backward()
            gem.observe(x, y, int(step > 10))
            scaler.step(optimizer)
            scaler.update()
    assert caplog.messages == []
