"""Processes on the CPU that train together over gloo, as torchrun starts them."""

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Pool:
    """Ranks that run one function after another, so that they start once for many tests."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """function(rank, *args) on every rank; returns their results, or raises with the errors of all ranks.

        Ranks that raise, die or take too long are ended, and new ones run the next function.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + timeout
        grace_is_over = False
        while len(answers) < self.size and time.monotonic() < end:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            for pipe in wait(list(waiting), max(0.0, end - time.monotonic())):
                try:
                    answers[waiting[pipe]] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    answers[waiting[pipe]] = (False, "the process died")
            if not grace_is_over and any(not good for good, _ in answers.values()):
                end, grace_is_over = min(end, time.monotonic() + 10), True
        if len(answers) == self.size and all(good for good, _ in answers.values()):
            return [answers[rank][1] for rank in range(self.size)]
        self.stop()
        lines = [f"rank {rank}: {answers.get(rank, (False, 'no answer'))[1]}" for rank in range(self.size)]
        raise AssertionError("\n".join(lines))

    def stop(self) -> None:
        """Ends the processes."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "gem_fast", "utils.ranks"])
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, str(store)), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)


@contextlib.contextmanager
def process_group(rank: int, size: int, store: str) -> Iterator[None]:
    """Joins the other ranks, with one thread."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=30)
    )
    yield
    dist.destroy_process_group()


def _serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    with process_group(rank, size, store):
        while True:
            try:
                message = pipe.recv_bytes()
            except EOFError:
                os._exit(0)  # the tests are over
            try:
                function, args = pickle.loads(message)
                torch.manual_seed(0)
                pipe.send_bytes(pickle.dumps((True, function(rank, *args))))
            except Exception:
                pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
