"""GEM as an optimizer hook (paper, Algorithm 1): the training loop stays the user's own."""

import contextlib
import inspect
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from gem_fast import amp
from gem_fast.checks import check_attachable, check_no_closure, check_parameters, trained_parameters
from gem_fast.cuda_graph import GraphedPass, kind_of
from gem_fast.gradients import Batch, Constraint, Engine, Fused, Objective, Sample
from gem_fast.memory import EpisodicMemory, Memory, check_examples, check_task
from gem_fast.ops import Status
from gem_fast.projection import Projection, project_
from gem_fast.sampling import Generators, sample_each
from gem_fast.state import check_keys, check_plain_task

_log = logging.getLogger("gem_fast")

# The optimizers that a hook is attached to; an entry goes when its optimizer does.
_hooked: weakref.WeakSet[Optimizer] = weakref.WeakSet()


class GEM:
    """Projects each gradient to the closest one that raises no past task's loss, in the optimizer's step pre-hook.

    ```python
    gem = gem_fast.GEM(model, optimizer, memory=gem_fast.EpisodicMemory(per_task=256))
    for task, loader in enumerate(stream):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            gem.observe(x, y, task)
            optimizer.step()
    ```

    There is one constraint per task seen so far except the current one (a task may come back later). The pass over the
    memory leaves no trace: `.grad`, random number generators and the train/eval mode are as they were. A `.grad` that
    is None counts as zeros, and is created where the projection has a part for it (the heads of old tasks).

    What is projected is what the optimizer would have read: gradients accumulated over several backward passes (the
    current task is then the one observed last), clipped before the step or unscaled by torch.amp.GradScaler. A step
    pre-hook registered on the optimizer after this one sees the projected gradient, and can clip that instead. Weight
    decay, momentum and the like are the optimizer's own, and come after. The parameters are looked up in each step:
    layers may be frozen and thawed, and parameter groups added, at any time. The pass over the memory runs outside of
    autocast, in the parameters' own dtype, because float16 gradients without a loss scale lose small values.

    An optimizer has at most one hook. `detach()` ends it, as does leaving a `with gem_fast.GEM(...) as gem:` block, and
    the hook goes when the optimizer does. Models may train in several threads, each with a hook of its own; as always
    in torch, threads share the global random number generator.

    Args:
        model: called as model(x), or as model(x, task).
        optimizer: any torch optimizer whose step needs no closure (not LBFGS); its parameters are the ones projected.
        loss_fn: loss_fn(output, target) -> scalar, the mean over the examples.
        memory: which examples of past tasks are kept; default `EpisodicMemory(per_task=256)`, as in the paper
            (`n_memories` in the published code, `patterns_per_experience` in Avalanche).
        margin: lower bound on every multiplier v_k when a constraint is violated (>= 0); 0.5 as in the paper
            (`memory_strength` in the published code and in Avalanche).
        ridge: added to the Gramian's diagonal; 0 is the exact projection, the published code uses 1e-3 (its `eps`).
        memory_batch: m', the number of examples of each past task that count in a step, a fresh random subset each
            time; default all of them, which is exact.
        engine: what computes G, the past tasks' gradients: "auto", which is `gem_fast.Fused()`; `gem_fast.Fused(...)`
            or `gem_fast.Loop(...)` with options; or an `Engine` of your own.
        pass_task: whether the model is called as model(x, task). Default: whether its forward has a parameter `task`.
        seed: of the generators that draw the subsets, one on each device that the memory has been on; part of the
            hook's state, and the only ones it touches.
        check: raise RuntimeError where a projection's status is not `Status.SOLVED`. Reading the status synchronises
            with a GPU; a NaN or an infinity on the CPU raises always.
        cuda_graph: on a GPU, launch the memory pass and the projection as one CUDA graph once a few steps of a kind
            were made, and capture another where a task joins or the model changes. `last` then holds the same tensors
            in each step. A pass that cannot be captured stays as it is, with one line in the log "gem_fast".

    Attributes:
        last: what the last step's projection did (violations, v, q, status and residual, as tensors on the device: to
            read them is the user's choice to synchronise); None when there was no past task. A step that GradScaler
            skips leaves it as it was.

    Raises:
        TypeError: model is no module, optimizer no torch optimizer, or engine no engine.
        ValueError: the model has no parameters, the optimizer holds none of them, they differ in dtype or device, its
            step needs a closure, margin or ridge is negative, or memory_batch is smaller than 1.
        RuntimeError: the optimizer has a hook already.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        memory: Memory | None = None,
        margin: float = 0.5,
        ridge: float = 0.0,
        memory_batch: int | None = None,
        engine: Engine | Literal["auto"] = "auto",
        pass_task: bool | None = None,
        seed: int = 0,
        check: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        for name, value in (("margin", margin), ("ridge", ridge)):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if memory_batch is not None and memory_batch < 1:
            raise ValueError(f"memory_batch must be at least 1 example, got {memory_batch}")
        if engine == "auto":
            engine = Fused()
        if not isinstance(engine, Engine):
            raise TypeError(
                'engine must be "auto", gem_fast.Fused(...), gem_fast.Loop(...) or another gem_fast.Engine, '
                f"got {engine!r:.50}"
            )
        check_attachable(model, optimizer)
        if optimizer in _hooked:
            raise RuntimeError(
                "optimizer must have no hook of gem_fast yet, got one that has: it would be projected twice; call "
                "detach() on the first hook"
            )
        if pass_task is None:
            pass_task = _takes_task(model)
        self.memory: Memory = EpisodicMemory(per_task=256) if memory is None else memory
        self.margin = margin
        self.ridge = ridge
        self.memory_batch = memory_batch
        self.check = check
        self.last: Projection | None = None
        self.objective = Objective(model, loss_fn, pass_task)
        self.generators = Generators(seed)
        self._engine = engine
        self._said_inaccurate = False
        self._graphed = GraphedPass() if cuda_graph else None
        self._current: Hashable = None
        # The optimizer owns the hook; a strong reference back would keep both, and the model, until a collection.
        self._optimizer = weakref.ref(optimizer)
        self._attached = True
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        _hooked.add(optimizer)

    @property
    def past_tasks(self) -> list[Hashable]:
        """The tasks whose losses are not to rise: all seen so far except the current one, in the order of `last.v`."""
        return [task for task in self.memory.tasks if task != self._current]

    def observe(self, x: Tensor, y: Tensor, task: Hashable) -> None:
        """Stores a mini-batch in the memory and makes `task` the current one.

        Args:
            x: (n, ...) the model's input.
            y: (n, ...) the loss's target.
            task: any hashable id: a number, a string, a tuple of these.

        Raises:
            TypeError: x or y is not a dense tensor, or the id cannot be hashed or is a tensor.
            ValueError: x and y differ in length, are empty or do not fit the task's earlier examples. The memory is
                then as it was.
        """
        check_examples(x, y)
        check_task(task)
        self.memory.observe(x, y, task)
        self._current = task

    @property
    def attached(self) -> bool:
        """Whether the optimizer's steps are projected: from construction to `detach`."""
        return self._attached and self._optimizer() is not None

    def detach(self) -> None:
        """Takes the hook off the optimizer, whose steps are plain ones from then on; a second call does nothing.

        The optimizer can then have another hook. Leaving a `with` block over the hook detaches it, too.
        """
        optimizer = self._optimizer()
        if self._attached and optimizer is not None:
            self._handle.remove()
            _hooked.discard(optimizer)
        self._attached = False

    def __enter__(self) -> "GEM":
        if not self.attached:
            raise RuntimeError(
                "the hook must be attached to be used in a with block, got a detached one; make a new one"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __reduce__(self) -> NoReturn:
        # Both copy.deepcopy and pickle come here.
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: the copy would be attached to no optimizer; make a "
            "new one on the copied optimizer and give it this one's state_dict()"
        )

    def state_dict(self) -> dict[str, Any]:
        """The memory, the current task and what draws subsets: a resumed run goes on with the same bits.

        Tensors and plain Python values, for torch.load(weights_only=True). Model and optimizer have their own states.

        Raises:
            ValueError: a task's id is not a number, a string, None or a tuple of these: no such file could hold it.
        """
        check_plain_task("task", self._current)
        return {
            "memory": self.memory.state_dict(),
            "current": self._current,
            "engine": self._engine.state_dict(),
            "generator": self.generators.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the state that `state_dict` returned.

        Raises:
            ValueError: the state is not one of such a hook, or does not fit its memory. The hook is then as it was.
        """
        check_keys("state", state, ("memory", "current", "engine", "generator"))
        check_plain_task("current", state["current"])
        generators = self.generators.restored(state["generator"])
        before = self._engine.state_dict()
        self._engine.load_state_dict(state["engine"])
        try:
            self.memory.load_state_dict(state["memory"])
        except ValueError:
            self._engine.load_state_dict(before)
            raise
        self.generators = generators
        self._current = state["current"]
        self.last = None

    # ---- Algorithm 1, from the second gradient on --------------------------------------------------------------------

    def constraints(self) -> tuple[list[Constraint], Sample | None]:
        """What must not rise in the next step: the mean loss on each past task's memory; and which examples count."""
        batches = [Batch(task, *self.memory.examples(task)) for task in self.past_tasks]
        constraints: list[Constraint] = [[batch] for batch in batches]
        if self.memory_batch is None or not batches:
            return constraints, None
        device = batches[0].x.device
        counts = [len(batch.x) for batch in batches]
        return constraints, sample_each(counts, self.memory_batch, self.generators.on(device), device)

    def _say_if_inaccurate(self, projection: Projection) -> None:
        # Once, and not on a GPU, which would have to be waited for.
        if self._said_inaccurate or projection.v.device.type != "cpu" or projection.status != Status.INACCURATE:
            return
        self._said_inaccurate = True
        _log.warning(
            "the past tasks' gradients depend on each other to more digits than float64 has: in this step (status "
            "INACCURATE) the gradient was moved as far as could be relied on, and some past task's loss may rise"
        )

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_no_closure(args, kwargs)
        if amp.is_skipped(optimizer, wait=self.check):
            return
        parameters = trained_parameters(optimizer)
        if not parameters or not self.past_tasks:
            self.last = None
            return
        check_parameters(parameters)
        amp.unscale_(optimizer)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]  # g

        def project(grads: list[Tensor]) -> tuple[Projection, list[bool]]:
            constraints, sample = self.constraints()
            with _no_autocast(parameters[0].device.type):
                with _explained(constraints, parameters[0]):
                    G = self._engine(self.objective, constraints, parameters, sample)  # rows g_k (Eq. 5)
                return project_(grads, G, self.margin, self.ridge), G.depends  # g~ (Eq. 8 and 11)

        if self._graphed is None:
            self.last, depends = project(grads)
        else:
            batches = [Batch(task, *self.memory.examples(task)) for task in self.past_tasks]
            options = self.margin, self.ridge, self.memory_batch
            kind = kind_of(self.objective.model, batches, parameters, options)
            engine, generators = self._engine, self.generators.of_gpus
            self.last, depends = self._graphed(
                project, grads, kind, parameters=parameters, engine=engine, generators=generators
            )
        self._say_if_inaccurate(self.last)
        _keep_created(parameters, grads, depends, self.last)
        if self.check and int(self.last.status) != Status.SOLVED:
            raise RuntimeError(
                f"the projection must be solved, got status {Status(int(self.last.status)).name} with a residual of "
                f"{float(self.last.residual):.1e}"
            )


def _takes_task(model: nn.Module) -> bool:
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    return "task" in inspect.signature(inner.forward).parameters


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    # In float16 without a loss scale, small gradients would become zeros and their constraints be lost.
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _explained(constraints: Sequence[Constraint], parameter: Parameter) -> Iterator[None]:
    """Names the memory's dtype or device as the cause, where it is another one than the model's and a pass failed."""
    try:
        yield
    except RuntimeError as error:
        for batch in (batch for batches in constraints for batch in batches):
            dtype = batch.x.dtype if batch.x.is_floating_point() else parameter.dtype
            if (dtype, batch.x.device) != (parameter.dtype, parameter.device):
                raise RuntimeError(
                    f"the model must take the memory's examples, {dtype} on {batch.x.device}, got an error from it "
                    f"with parameters of {parameter.dtype} on {parameter.device}; after model.to(...) call "
                    "memory.to(...), too"
                ) from error
        raise


def _keep_created(
    parameters: list[Parameter], grads: list[Tensor], depends: list[bool], projection: Projection
) -> None:
    """Makes gradients that did not exist the parameters' own, where the projection has a part for them."""
    created = [(p, g) for p, g, used in zip(parameters, grads, depends, strict=True) if p.grad is None and used]
    if not created:
        return
    # On a GPU the outcome is not known without waiting for it: the gradient is then created in any case.
    on_cpu = projection.v.device.type == "cpu"
    if on_cpu and not bool(projection.v.any()):
        return
    for parameter, grad in created:
        parameter.grad = grad
