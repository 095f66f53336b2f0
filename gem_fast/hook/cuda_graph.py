"""Work of each step as a CUDA graph: captured once, then launched as one piece."""

import gc
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.containers import tensors
from gem_fast.gradients import Batch
from gem_fast.gradients.interface import is_captured, random_devices

_log = logging.getLogger("gem_fast")

T = TypeVar("T")

# Steps of one kind before the next one is captured: in them engines compare, caches fill and libraries load.
EAGER_STEPS = 3


class Graph(Protocol):
    """What `Graphed` needs of a graph; `CudaGraph` is the one that is used."""

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
        self._generators = list(generators)
        for generator in generators:
            self._graph.register_generator_state(generator)

    def capture(self, run: Callable[[], Any]) -> Any:
        """As `Graph.capture`; other threads may go on using the GPU.

        Raises:
            Exception: what `run` raised, or what torch found out later. Work goes on as if nothing had been captured.
        """
        stream, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        first: Exception | None = None
        try:
            with (
                _without_garbage_collection(),
                torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"),
            ):
                try:
                    return run()
                except Exception as error:  # of which torch does not know when it ends the capture
                    first = error
                    raise
        except Exception as error:
            self._recover(stream, pool)
            raise (first or error) from None

    def _recover(self, stream: torch.cuda.Stream, pool: Any) -> None:
        """Puts back what torch leaves behind where it cannot end a capture."""
        torch.cuda.set_stream(stream)
        # Their states stay in the capture; a copy of a state is outside.
        for generator in [torch.cuda.default_generators[stream.device_index], *self._generators]:
            generator.graphsafe_set_state(generator.clone_state())
        # Else the allocator keeps memory back, as it does during a capture. A name of torch's own, which may go.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)

    def replay(self) -> None:
        """As `Graph.replay`."""
        self._graph.replay()


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Keeps other graphs that nobody uses any more: to let one go while another is captured is an error."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Graphed(Generic[T]):
    """Runs the same work by itself a few times, then from a graph, as long as it is of one kind.

    Work is of another kind where a task joins, examples of past tasks change, or the model, its parameters or its mode
    do: the graph goes, and a new one is captured after a few runs. What cannot be captured is said once in the log
    "gem_fast", and then left to the caller. What comes from a graph is not compared with one backward per task again.

    The tensors that the work is given are copied into the graph's own, since a training loop may have others in each
    step. What the graph returns is the same tensors each time.

    Args:
        what: the work, as the log calls it.
        in_place: whether the work changes the tensors that it is given, and leaves no trace beside that: they are
            copied back, and random number generators are as before.
        new_graph: makes a `Graph` from the generators that draw subsets.
    """

    def __init__(
        self, what: str, *, in_place: bool, new_graph: Callable[[Sequence[torch.Generator]], Graph] = CudaGraph
    ) -> None:
        self._what = what
        self._in_place = in_place
        self._new_graph = new_graph
        self._kind: Hashable = None
        self._runs = 0
        self._given_up = False
        self._graph: Graph | None = None
        self._static: list[Tensor] = []
        self._result: T | None = None

    def __call__(
        self,
        run: Callable[[list[Tensor]], T],
        given: list[Tensor],
        kind: Hashable,
        *,
        parameters: Sequence[Parameter],
        generators: Sequence[torch.Generator],
        obstacle: str | None = None,
    ) -> T | None:
        """Does what `run(given)` does; returns None, with nothing done, where there is to be no graph.

        Args:
            run: the work, the same each time for one kind.
            given: tensors of the same shapes each time for one kind.
            kind: see `kind_of`.
            parameters: those that are trained.
            generators: what the work draws from beside torch's own.
            obstacle: why there can be no graph.
        """
        device = parameters[0].device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if self._given_up or is_captured(parameters):  # a graph of the user's takes all
                return None
            if kind != self._kind:
                self._kind, self._runs, self._graph, self._result = kind, 0, None, None
            if self._graph is None:
                if self._runs < EAGER_STEPS:
                    self._runs += 1
                    return run(given)
                obstacle = obstacle or self._capture(run, given, generators)
                if obstacle is not None:
                    self._given_up = True
                    _log.warning("%s runs without a CUDA graph: %s", self._what, obstacle)
                    return None
            assert self._graph is not None
            torch._foreach_copy_(self._static, given)
            if self._in_place:
                with torch.random.fork_rng(random_devices(parameters)):
                    self._graph.replay()
                torch._foreach_copy_(given, self._static)
            else:
                self._graph.replay()
            return self._result

    def _capture(
        self, run: Callable[[list[Tensor]], T], given: list[Tensor], generators: Sequence[torch.Generator]
    ) -> str | None:
        """Captures; returns the reason where that fails."""
        graph, self._static = self._new_graph(generators), [x.clone() for x in given]
        try:
            self._result = graph.capture(lambda: run(self._static))
        except Exception as error:  # whatever a model does that a capture does not allow
            self._static, self._result = [], None
            first_line = str(error).strip().partition("\n")[0]  # CUDA's go on with advice for debugging
            return f"capturing it failed: {type(error).__name__}: {first_line}"
        self._graph = graph
        return None


def kind_of(model: nn.Module, batches: Sequence[Batch], parameters: Sequence[Parameter], options: Hashable) -> Hashable:
    """What must be the same for a graph to do what the pass would: equal kinds compare equal.

    Args:
        model: the model, whose modules and modes count, and the places of its tensors.
        batches: the memories of the past tasks, whose places and versions count.
        parameters: those that are trained, whose places count, and whether they have a gradient.
        options: whatever else the pass depends on.
    """
    nests = (nest for batch in batches for nest in (batch.x, batch.y, batch.descriptor) if nest is not None)
    examples = tuple(_place(x) for nest in nests for x in tensors(nest))
    return (
        tuple(batch.task for batch in batches),
        examples,
        tuple((id(p), p.data_ptr(), p.grad is None) for p in parameters),
        tuple((id(module), module.training, *map(address_of, _own_tensors(module))) for module in model.modules()),
        options,
    )


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The module's parameters and buffers, those that are not trained, too; not its children's."""
    for tensors_of in (module._parameters, module._buffers):
        yield from (x for x in tensors_of.values() if x is not None)


def address_of(x: Tensor) -> int:
    """Where a tensor's numbers are: another one for another tensor."""
    try:
        address = x.data_ptr()
    except RuntimeError:
        address = 0
    return address or id(x)  # made of others, as some quantised weights are


def _place(x: Any) -> Hashable:
    if not isinstance(x, Tensor):
        return id(x)
    version = None if x.is_inference() else x._version
    return x.data_ptr(), version, tuple(x.shape), x.stride(), x.dtype


def obstacle_of(model: nn.Module, parameters: Sequence[Parameter], repeats: bool) -> str | None:
    """Why a graph is out of the question, before one is tried.

    Args:
        model: the model; what it does on another device than the graph's would be done, and not captured.
        parameters: those that are trained.
        repeats: whether the work is the same in each step of a kind, and on this process alone.
    """
    devices = {p.device for p in parameters} | {x.device for m in model.modules() for x in _own_tensors(m)}
    names = " and ".join(sorted(map(str, devices)))
    if torch.device("cpu") in devices:
        return f"the model is on {names}, and graphs are a GPU's"
    if len(devices) > 1:
        return f"the model is on {names}, and a graph is one GPU's"
    if not repeats:
        return "the engine does something else in each step (refresh_every), or several processes take part"
    return None
