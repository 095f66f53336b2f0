"""The subcommand run under torchrun: processes train replicas of one model, each on its part of every mini-batch."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from gem_fast.gem import GEM
from gem_fast.paper.errors import InputError, flag
from gem_fast.paper.learners.base import SgdLearner

# The learners whose loss is a mean over the mini-batch, and whose memory, if any, is that of a gem_fast hook.
PARALLEL_LEARNERS = ("single", "gem", "agem")
# Hyper-parameters that count examples of all processes together.
SHARED = ("memory_per_task", "memory_batch")


class Processes(NamedTuple):
    """How many processes do a run, and the number of this one, from 0; number 0 alone shows and writes anything."""

    size: int = 1
    rank: int = 0


def processes() -> Processes:
    """Those that torchrun has started, as it says in the environment; one where it has not."""
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    return Processes(size, int(os.environ["RANK"])) if size > 1 else Processes()


@contextmanager
def started(device: str) -> Iterator[Processes]:
    """A context in which the processes of a run are connected; nothing for a single one.

    With cuda, process number i of a machine takes GPU number i. The first of them to fail says why. The others, whose
    messages it no longer answers, end with exit code 1 and say nothing. Raises InputError where the device cannot be
    used by several processes, or another one has ended without a word.
    """
    mine = processes()
    if mine.size == 1:
        yield mine
        return
    try:
        if device == "cuda":
            local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local >= count:
                got = f"got {os.environ.get('LOCAL_WORLD_SIZE')}"
                raise InputError(
                    f"--nproc-per-node of torchrun must be at most {count}, the number of GPUs here, {got}"
                )
            torch.cuda.set_device(local)
        elif device != "cpu":
            raise InputError(f"--device must be cpu or cuda under torchrun, got {device!r}")
        backend = {"cpu": "gloo", "cuda": "nccl"}[device]
        dist.init_process_group(backend, store=_store(), rank=mine.rank, world_size=mine.size)
        yield mine
        dist.barrier()  # so that none ends, and takes its store along, while others are at work
    except BaseException as error:
        if not is_first_to_fail():
            raise SystemExit(1) from None
        if isinstance(error, RuntimeError) and ("gloo" in str(error) or isinstance(error, dist.DistError)):
            raise InputError(f"process {mine.rank} of {mine.size} has lost the others, or one of them") from error
        raise
    dist.destroy_process_group()


def is_first_to_fail() -> bool:
    """Whether no other process has failed yet: the first one says why, in time before torchrun ends it."""
    if processes().size == 1:
        return True
    with suppress(RuntimeError):  # the store is gone with the process that kept it
        return bool(_store().add("gem_fast failed", 1) == 1)
    return False


@cache
def _store() -> Any:
    return next(rendezvous("env://"))[0]


def share(mine: Processes, learner: str, hyper: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of one process: its share of the examples that all keep, or draw, together.

    Raises InputError unless the processes can do a run of the learner together.
    """
    if mine.size > 1 and learner not in PARALLEL_LEARNERS:
        got = f"{mine.size} processes of torchrun, which {', '.join(PARALLEL_LEARNERS)} can use"
        raise InputError(f"--learner {learner} trains in one process only, got {got}")
    for name in SHARED:
        if (hyper.get(name) or 0) % mine.size:
            expected = f"a multiple of {mine.size}, the number of processes"
            raise InputError(f"{flag(name)} must be {expected}, got {hyper[name]}")
    return {name: value // mine.size if name in SHARED and value else value for name, value in hyper.items()}


class ParallelLearner(nn.Module):
    """A learner that trains on its part of every mini-batch; all processes together take the step of the whole one.

    Example number n of a task, counted from 0 as the task's examples come, goes to process n mod size: the memories
    that keep the last m / size examples each are then the memory that keeps the last m.
    """

    trains_jointly: ClassVar[bool] = False

    def __init__(self, learner: SgdLearner, mine: Processes, n_tasks: int) -> None:
        """Makes the reductions of a learner, whose model is in DistributedDataParallel, sums weighted by the parts."""
        super().__init__()
        self.learner = learner
        self._mine = mine
        self._seen = [0] * n_tasks
        self._weight = 1.0
        assert isinstance(learner.model, DistributedDataParallel)
        learner.model.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))

    def observe(self, x: Tensor, y: Tensor, task: int) -> None:
        """Trains on this process's part of a mini-batch."""
        part = slice((self._mine.rank - self._seen[task]) % self._mine.size, None, self._mine.size)
        self._seen[task] += len(y)
        self._weight = len(y[part]) / len(y)
        if self._weight:
            self.learner.observe(x[part], y[part], task)
            return
        # A mini-batch smaller than the number of processes: this one takes part in the exchange with weight 0.
        self.learner.optimizer.zero_grad()
        self.learner.loss(x, y, task).backward()
        for hook in self.learner.parts().values():
            if isinstance(hook, GEM):
                hook.current_task = task
        self.learner.optimizer.step()

    def predict(self, x: Tensor, task: int) -> Tensor:
        """The learner's logits."""
        return self.learner.predict(x, task)

    def _reduce(self, bucket: Any) -> Any:
        """The gradient of the mean over the mini-batch: those of the parts' means, weighted by their examples."""
        work = dist.all_reduce(bucket.buffer().mul_(self._weight), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])


Learner = SgdLearner | ParallelLearner
