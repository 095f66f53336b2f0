"""What is known about a model as it stands: its units, and what verification found out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import nn
from torch.nn import Parameter

from gem_fast.task_gradients.recording import Rule
from gem_fast.task_gradients.rules import convolution, units


class Plan:
    """Serves as long as the model has the same modules in the same modes, and the same parameters are wanted.

    Attributes:
        parameters: those whose gradients make up a row of G, in order.
        wanted: the same as a set.
        units: the modules that go through a rule.
        dims: see `Recorder`.
        verified: the tasks whose passes were verified; None where the model does not take the task.
        bytes_per_example: what a pass keeps in memory for each example.
        given_up: whether the model is left to the loop.
    """

    def __init__(self, modules: list[nn.Module], parameters: Sequence[Parameter]) -> None:
        """Makes a plan for the model modules[0]."""
        self.parameters = list(parameters)
        self.wanted = set(parameters)
        self.units: list[tuple[nn.Module, Rule]] = []
        self.dims: dict[tuple[nn.Module, int], int] = {}
        self.verified: set[Hashable] = set()
        self.bytes_per_example = 1
        self.given_up = False
        self._modules = modules
        self._modes = [module.training for module in modules]
        self._ids = [id(parameter) for parameter in parameters]

    def find_units(self) -> None:
        """Looks up the rules.

        Raises:
            CannotFuse: parameters are the model's own, not a layer's, or a module is compiled.
        """
        self.units = units(self._modules[0])

    def is_faster_task_by_task(self) -> bool:
        """Whether one backward per task is as fast or faster: convolutions on a CPU, as measured (bench/README.md)."""
        on_cpu = self.parameters[0].device.type == "cpu"
        return on_cpu and any(rule is convolution for _, rule in self.units)

    def serves(self, modules: list[nn.Module], parameters: Sequence[Parameter]) -> bool:
        """Whether the plan still holds."""
        return (
            modules == self._modules
            and [module.training for module in modules] == self._modes
            and [id(parameter) for parameter in parameters] == self._ids
        )

    def tasks_per_pass(self, sizes: list[int], memory_bytes: int) -> int:
        """How many tasks with so many examples each may be in memory at a time; at least 1."""
        return max(1, memory_bytes // (self.bytes_per_example * max(sizes)))
