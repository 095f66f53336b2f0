"""Accelerate: the plain hook before or after `prepare`; its state is one that is registered for checkpointing."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from utils.asserts import assert_same_bits
from utils.models import stream
from utils.ranks import Pool

import gem_fast


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Training:
    """A training by Accelerate, or without it."""

    def __init__(self, accelerator: Accelerator | None, when: str = "after", per_task: int = 8) -> None:
        torch.manual_seed(0)
        self.accelerator = accelerator
        # No model of a shortcut, which would round otherwise where Accelerate has replaced the forward.
        self.model: nn.Module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        memory = gem_fast.EpisodicMemory(per_task=per_task)
        if when == "before":
            self.gem = gem_fast.GEM(self.model, self.optimizer, memory=memory)
        if accelerator is not None:
            self.model, self.optimizer = accelerator.prepare(self.model, self.optimizer)
        if when == "after":
            self.gem = gem_fast.GEM(self.model, self.optimizer, memory=memory)
        if accelerator is not None:
            accelerator.register_for_checkpointing(self.gem)

    def run(
        self,
        tasks: range,
        clip: float | None = None,
        part: slice = slice(None),
        accumulate: int = 1,
        half: bool = False,
    ) -> int:
        """Returns the number of steps with a violation. What is left out with Accelerate is its own affair."""
        violations = 0
        for i, (x, y, task) in enumerate(stream(max(tasks) + 1, n=6)):
            if task not in tasks:
                continue
            x, y = x[part], y[part]
            if self.accelerator is not None:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(F.cross_entropy(self.model(x), y))
                    self.gem.observe(x, y, task)
                    if clip and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            else:
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    output = self.model(x).float()
                (F.cross_entropy(output, y) / accumulate).backward()
                self.gem.observe(x, y, task)
                if (i + 1) % accumulate == 0:
                    if clip:
                        nn.utils.clip_grad_norm_(self.model.parameters(), clip)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            violations += self.gem.last is not None and bool(self.gem.last.violations.any())
        return violations

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (2, 0.5)])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_same_bits_as_a_plain_loop(
    precision: str, accumulate: int, clip: float | None, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)
    training, plain = Training(accelerator, when), Training(None)
    assert training.run(range(3), clip) > 0
    plain.run(range(3), clip, accumulate=accumulate, half=precision == "bf16")
    assert caplog.records == []  # the pass over the memory is a fused one
    assert_same_bits(training.weights(), plain.weights())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_saved_state_goes_on_with_the_same_bits(when: str, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    whole = Training(accelerator, when)
    whole.run(range(2))
    accelerator.save_state(str(tmp_path))
    whole.run(range(2, 4))
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    resumed = Training(accelerator, when)
    accelerator.load_state(str(tmp_path))
    assert resumed.gem.memory.tasks == [0, 1]
    assert resumed.run(range(2, 4)) > 0
    assert_same_bits(resumed.weights(), whole.weights())


def trained_on_two(rank: int, when: str, folder: str) -> tuple[Tensor, Tensor, int]:
    """Trained through; and from a state that is saved in between."""
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # not used: the process group is there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        part = slice(rank, None, 2)
        whole = Training(accelerator, when)
        violations = whole.run(range(2), part=part)
        accelerator.save_state(folder)
        violations += whole.run(range(2, 4), part=part)
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        resumed = Training(accelerator, when)
        accelerator.load_state(folder)
        resumed.run(range(2, 4), part=part)
    return whole.weights(), resumed.weights(), violations


def test_two_processes_are_one_on_the_union_of_their_memories(tmp_path: Path) -> None:
    alone = Training(None, per_task=16)
    violations = alone.run(range(4))
    pool = Pool(2)
    try:
        for when in ("before", "after"):
            for whole, resumed, theirs in pool.run(trained_on_two, when, str(tmp_path / when)):
                assert theirs == violations > 0
                torch.testing.assert_close(whole, alone.weights(), rtol=1e-5, atol=1e-6)
                assert_same_bits(whole, resumed)
    finally:
        pool.stop()
