"""What is known about a model as it stands: its units, and what verification found out."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.task_gradients.chain import is_watched, layers_of
from gem_fast.task_gradients.recording import CannotFuse, Rule
from gem_fast.task_gradients.rows import Blocks
from gem_fast.task_gradients.rules import convolution, units
from gem_fast.task_gradients.rules.segmented import segmented


class Plan:
    """Serves as long as the model has the same modules in the same states, and the same parameters are wanted.

    Attributes:
        parameters: those whose gradients make up a row of G, in order.
        wanted: the same as a set.
        units: the modules that go through a rule.
        layers: those of a model that is a chain and nothing else, see `chain`; else empty.
        dims: see `Recorder`.
        verified: the tasks whose passes were verified (None where the model does not take the task), each with the
            number of tasks in the pass, 1 or 2, and whether it went through `layers`.
        blocks: cuts G by parameters.
        bytes_per_example: what a pass keeps in memory for each example.
        ambiguous: whether the last pass met an input that could be read in two ways, see `Recorder`.
        is_chain: whether the last pass went through a chain of linear layers, see `chain`.
        given_up: whether the model is left to the loop.
    """

    def __init__(self, modules: list[nn.Module], parameters: Sequence[Parameter]) -> None:
        """Makes a plan for the model modules[0]."""
        self.parameters = list(parameters)
        self.wanted = set(parameters)
        self.units: list[tuple[nn.Module, Rule]] = []
        self.layers = layers_of(modules[0])
        self.dims: dict[tuple[nn.Module, int], int] = {}
        self.verified: set[tuple[Hashable, int, bool]] = set()
        self.bytes_per_example = 1
        self.ambiguous = False
        self.is_chain = False
        self.given_up = False
        self._modules = modules
        self._states = _states(modules)
        self._ids = [id(parameter) for parameter in parameters]
        self._hooked = _hooked(parameters)
        self.blocks = Blocks()

    def find_units(self) -> None:
        """Looks up the rules, once.

        Raises:
            CannotFuse: parameters are the model's own, not a layer's, or have hooks, or a module is compiled.
        """
        if self.units:
            return
        if any(self._hooked):
            raise CannotFuse("a parameter has a hook, which would see no task's gradient")
        self.units = units(self._modules[0])

    def statistics(self) -> list[Tensor]:
        """The buffers that a pass may change."""
        return [buffer for module, rule in self.units if rule is segmented for buffer in module.buffers()]

    def is_faster_task_by_task(self) -> bool:
        """Whether one backward per task is as fast or faster: convolutions on a CPU, as measured (bench/README.md)."""
        on_cpu = self.parameters[0].device.type == "cpu"
        return on_cpu and any(rule is convolution for _, rule in self.units)

    def serves(self, modules: list[nn.Module], parameters: Sequence[Parameter]) -> bool:
        """Whether the plan still holds."""
        return (
            modules == self._modules
            and _states(modules) == self._states
            and [id(parameter) for parameter in parameters] == self._ids
            and _hooked(parameters) == self._hooked
        )

    def tasks_per_pass(self, sizes: list[int], memory_bytes: int) -> int:
        """How many tasks with so many examples each may be in memory at a time; at least 1."""
        return max(1, memory_bytes // (self.bytes_per_example * max(sizes)))


def _states(modules: list[nn.Module]) -> list[tuple[bool, bool]]:
    return [(module.training, is_watched(module)) for module in modules]


def _hooked(parameters: Sequence[Parameter]) -> list[bool]:
    return [bool(parameter._backward_hooks) for parameter in parameters]
