"""Gradient Episodic Memory, Algorithm 1 of the paper, the same in Python alone, and Averaged GEM."""

from typing import Literal

import torch
from torch import Tensor

import gem_fast
from gem_fast.paper.config import Rate, Real, Whole, by_stream
from gem_fast.paper.errors import extra
from gem_fast.paper.learners.base import SgdConfig, SgdLearner
from gem_fast.paper.learners.stream_info import StreamInfo
from gem_fast.reference import PurePythonGEM


class GemPurePython(SgdLearner):
    """The method as public versions write it, which Table 1 compares with the compiled one.

    It is `gem_fast.reference`, and needs quadprog, which fails at a ridge of 0.
    """

    class Config(SgdConfig):
        """The options of gem_pure_python."""

        lr: Rate = by_stream(rotations=0.1, permutations=0.1, cifar100=0.1, split=0.1)
        memory_per_task: Whole = 256
        """examples of each task kept in the episodic memory"""
        margin: Real = 0.5
        """lower bound of the dual variables v (Eq. 11); larger favours backward transfer"""
        ridge: Real = 1e-3
        """added to the diagonal of the Gramian; 0 is exact"""

    def __init__(self, stream_info: StreamInfo, device: torch.device, config: Config) -> None:
        with extra("the learner gem_pure_python"):
            import quadprog  # noqa: F401
        super().__init__(stream_info, device, config)
        self.memory = gem_fast.EpisodicMemory(per_task=config.memory_per_task)
        self.gem = PurePythonGEM(
            self.model, self.optimizer, self.memory, forward=self.logits, margin=config.margin, ridge=config.ridge
        )

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Takes one projected step on the mini-batch (x, y), and remembers the mini-batch."""
        self.gem.observe(x, y, task)


class Gem(SgdLearner):
    """SGD whose steps may not raise the loss on the memory of any past task (Eq. 7 and 8)."""

    class Config(GemPurePython.Config):
        """The options of gem."""

        memory_policy: Literal["last", "reservoir", "class-balanced", "herding"] = "last"
        """which examples of each task are kept"""
        memory_batch: Whole | None = None
        """examples of each past task drawn anew for each step; None: all that are kept"""
        refresh_every: Whole = 1
        """steps in which each past task's gradient is computed once, in turns"""

    def __init__(self, stream_info: StreamInfo, device: torch.device, config: Config) -> None:
        super().__init__(stream_info, device, config)
        self.gem = gem_fast.GEM(
            self.model,
            self.optimizer,
            memory=gem_fast.MEMORY_POLICIES[config.memory_policy](per_task=config.memory_per_task),
            margin=config.margin,
            ridge=config.ridge,
            memory_batch=config.memory_batch,
            engine=gem_fast.Fused(refresh_every=config.refresh_every),
            descriptors=dict(enumerate(self.descriptors)),
            seed=0 if config.memory_batch is None else int(torch.randint(2**62, ())),
            cuda_graph=device.type == "cuda",
        )

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Takes one projected step on the mini-batch (x, y), and remembers the mini-batch."""
        self.gem.step(x, y, task)


class Agem(SgdLearner):
    """Averaged GEM (Chaudhry et al. 2019): steps may not raise the mean loss on a random batch of the whole memory."""

    class Config(SgdConfig):
        """The options of agem."""

        lr: Rate = by_stream(rotations=0.01, permutations=0.03, cifar100=0.1, split=0.1)
        memory_per_task: Whole = 256
        """examples of each task kept in the episodic memory"""
        memory_batch: Whole = 256
        """examples drawn anew from the memory of all past tasks together for each step"""
        margin: Real = 0.0
        """lower bound of the one dual variable where the constraint is violated; 0 is the published method"""

    def __init__(self, stream_info: StreamInfo, device: torch.device, config: Config) -> None:
        """Makes a new model and hooks its optimizer; the hook's seed comes from torch's global generator."""
        super().__init__(stream_info, device, config)
        memory = gem_fast.EpisodicMemory(per_task=config.memory_per_task)
        seed = int(torch.randint(2**62, ()))
        self.agem = gem_fast.AGEM(
            self.model, self.optimizer, memory=memory, memory_batch=config.memory_batch, margin=config.margin, seed=seed
        )

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Takes one projected step on the mini-batch (x, y), and remembers the mini-batch."""
        self.optimizer.zero_grad()
        self.loss(x, y, task).backward()
        self.agem.observe(x, y, task)
        self.optimizer.step()
