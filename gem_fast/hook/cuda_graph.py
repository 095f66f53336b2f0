"""A memory pass and its projection as a CUDA graph: captured once, then launched as one piece of work in each step."""

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.containers import tensors
from gem_fast.gradients import Batch
from gem_fast.gradients.interface import random_devices
from gem_fast.projection import Projection

_log = logging.getLogger("gem_fast")

Pass = Callable[[list[Tensor]], tuple[Projection, list[bool]]]
"""pass_(grads) projects g in place; returns what that did, and per parameter whether any past task depends on it."""

# Steps of one kind before the next one is captured: in them engines compare, caches fill and libraries load.
EAGER_STEPS = 3


class Graph(Protocol):
    """What a `GraphedPass` needs of a graph; `CudaGraph` is the one that is used."""

    def capture(self, run: Callable[[], Any]) -> Any:
        """Records what `run` launches, without running it on the device; returns what `run` returns."""

    def replay(self) -> None:
        """Launches all of it."""


class CudaGraph:
    """torch's.

    Args:
        generators: those that the work draws from beside torch's own.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)

    def capture(self, run: Callable[[], Any]) -> Any:
        """As `Graph.capture`; other threads may go on using the GPU."""
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        """As `Graph.replay`."""
        self._graph.replay()


class GraphedPass:
    """Runs a step's memory pass and projection eagerly a few times, then from a graph, while steps are of one kind.

    A step is of another kind where a task joins, examples of past tasks change, or the model, its parameters or its
    mode do: the graph goes, and a new one is captured after a few eager steps. A pass that cannot be captured is said
    once in the log "gem_fast", and stays eager. Passes from a graph are not compared with one backward per task again.

    The gradient is copied into the graph's own tensors and back, since a training loop may give `.grad` other memory in
    each step. What the graph returns is the same tensors each time.

    Args:
        new_graph: makes a `Graph` from the generators that draw subsets.
    """

    def __init__(self, new_graph: Callable[[Sequence[torch.Generator]], Graph] = CudaGraph) -> None:
        self._new_graph = new_graph
        self._kind: Hashable = None
        self._steps = 0
        self._given_up = False
        self._graph: Graph | None = None
        self._grads: list[Tensor] = []
        self._result: tuple[Projection, list[bool]] | None = None

    def __call__(
        self,
        run: Pass,
        grads: list[Tensor],
        kind: Hashable,
        *,
        parameters: Sequence[Parameter],
        repeats: bool,
        generators: Sequence[torch.Generator],
    ) -> tuple[Projection, list[bool]]:
        """Does what `run(grads)` does.

        Args:
            run: the pass, the same in every step of the kind.
            grads: g, projected in place.
            kind: see `kind_of`.
            parameters: the tensors' parameters.
            repeats: whether what the pass does is the same in each step of a kind, and on this process alone.
            generators: what the pass draws from beside torch's own.
        """
        on_gpu = parameters[0].device.type == "cuda"
        if self._given_up or (on_gpu and torch.cuda.is_current_stream_capturing()):  # a graph of the user's takes all
            return run(grads)
        if kind != self._kind:
            self._kind, self._steps, self._graph, self._result = kind, 0, None, None
        if self._graph is None:
            if self._steps < EAGER_STEPS:
                self._steps += 1
                return run(grads)
            reason = _obstacle(parameters, repeats) or self._capture(run, grads, generators)
            if reason is not None:
                self._given_up = True
                _log.warning("the memory pass runs without a CUDA graph: %s", reason)
                return run(grads)
        assert self._graph is not None
        assert self._result is not None
        torch._foreach_copy_(self._grads, grads)
        with torch.random.fork_rng(random_devices(parameters)):  # a pass leaves no trace
            self._graph.replay()
        torch._foreach_copy_(grads, self._grads)
        return self._result

    def _capture(self, run: Pass, grads: list[Tensor], generators: Sequence[torch.Generator]) -> str | None:
        """Captures; returns the reason where that fails."""
        graph, self._grads = self._new_graph(generators), [grad.clone() for grad in grads]
        try:
            self._result = graph.capture(lambda: run(self._grads))
        except Exception as error:  # whatever a model does that a capture does not allow
            self._grads, self._result = [], None
            return f"capturing it failed: {type(error).__name__}: {error}"
        self._graph = graph
        return None


def kind_of(model: nn.Module, batches: Sequence[Batch], parameters: Sequence[Parameter], options: Hashable) -> Hashable:
    """What must be the same for a graph to do what the pass would: equal kinds compare equal.

    Args:
        model: the model, whose modules and modes count.
        batches: the memories of the past tasks, whose places and versions count.
        parameters: those that are trained, whose places count, and whether they have a gradient.
        options: whatever else the pass depends on.
    """
    nests = (nest for batch in batches for nest in (batch.x, batch.y) if nest is not None)
    examples = tuple(_place(x) for nest in nests for x in tensors(nest))
    return (
        tuple(batch.task for batch in batches),
        examples,
        tuple((id(p), p.data_ptr(), p.grad is None) for p in parameters),
        tuple((id(module), module.training) for module in model.modules()),
        options,
    )


def _place(x: Any) -> Hashable:
    if not isinstance(x, Tensor):
        return id(x)
    version = None if x.is_inference() else x._version
    return x.data_ptr(), version, tuple(x.shape), x.stride(), x.dtype


def _obstacle(parameters: Sequence[Parameter], repeats: bool) -> str | None:
    """Why a graph is out of the question, before one is tried."""
    device = parameters[0].device
    if device.type == "cpu":
        return f"the parameters are on {device}, and graphs are a GPU's"
    if not repeats:
        return "the engine does something else in each step (refresh_every), or several processes take part"
    return None
