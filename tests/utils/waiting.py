"""Tests that nothing waits for a GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def waiting_raises(wanted: bool = True) -> Iterator[None]:
    """Every call of torch within the block that would wait for the device raises; not where it is not `wanted`."""
    if not wanted:
        yield
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        # Said once in a process; else an error would leave the mode on for all later tests.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
