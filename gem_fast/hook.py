"""GEM as an optimizer hook (paper, Algorithm 1): the training loop stays the user's own."""

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from gem_fast.memory import EpisodicMemory, Memory, check_examples, check_task
from gem_fast.ops import Status
from gem_fast.projection import Projection, project_
from gem_fast.task_gradients import Batch, LoopTaskGradients, TaskGradients


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

    Args:
        model: called as model(x), or as model(x, task).
        optimizer: any torch optimizer whose step takes no closure; its parameters are the ones projected.
        loss_fn: loss_fn(output, target) -> scalar, the mean over the examples.
        memory: which examples of past tasks are kept; default `EpisodicMemory(per_task=256)`, as in the paper.
        margin: lower bound on every multiplier v_k when a constraint is violated (>= 0); 0.5 as in the paper.
        ridge: added to the Gramian's diagonal; 0 is the exact projection, the published code uses 1e-3.
        task_gradients: the engine that computes G; default `LoopTaskGradients(model, loss_fn)`.
        pass_task: whether the model is called as model(x, task). Default: whether its forward has a parameter `task`.
        check: raise RuntimeError where a projection's status is not `Status.SOLVED`. Reading the status synchronises
            with a GPU; a NaN or an infinity on the CPU raises always.

    Attributes:
        last: what the last step's projection did (violations, v, q, status and residual, as tensors on the device: to
            read them is the user's choice to synchronise); None when there was no past task.

    Raises:
        ValueError: the model has no parameters, the optimizer holds none of them, or margin or ridge is negative.
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
        task_gradients: TaskGradients | None = None,
        pass_task: bool | None = None,
        check: bool = False,
    ) -> None:
        for name, value in (("margin", margin), ("ridge", ridge)):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        _check_parameters(model, optimizer)
        if pass_task is None:
            pass_task = _takes_task(model)
        self.memory: Memory = EpisodicMemory(per_task=256) if memory is None else memory
        self.margin = margin
        self.ridge = ridge
        self.check = check
        self.last: Projection | None = None
        self._pass_task = pass_task
        self._task_gradients = task_gradients or LoopTaskGradients(model, loss_fn, pass_task=pass_task)
        self._current: Hashable = None
        self._hook = optimizer.register_step_pre_hook(self._before_step)

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

    def detach(self) -> None:
        """Takes the hook off the optimizer; its steps are plain ones from then on."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """The memory and the current task: what a resumed run needs to go on with the same bits."""
        return {"memory": self.memory.state_dict(), "current": self._current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the state that `state_dict` returned."""
        self.memory.load_state_dict(state["memory"])
        self._current = state["current"]

    # ---- Algorithm 1, from the second gradient on --------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _check_no_closure(args, kwargs)
        past = self.past_tasks
        if not past:
            self.last = None
            return
        parameters = _trained_parameters(optimizer)
        _check_dense(parameters)
        G, reached = self._task_gradients(self._constraints(past), parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        projection = project_(grads, G, self.margin, self.ridge)
        _keep_created(parameters, grads, reached, projection)
        self.last = projection
        if self.check and int(projection.status) != Status.SOLVED:
            raise RuntimeError(
                f"the projection must be solved, got status {Status(int(projection.status)).name} with a residual of "
                f"{float(projection.residual):.1e}"
            )

    def _constraints(self, past: list[Hashable]) -> list[list[Batch]]:
        """The examples behind each row of G: here one row per past task."""
        return [[Batch(task, *self.memory.examples(task))] for task in past]


class AGEM(GEM):
    """Averaged GEM (Chaudhry et al. 2019): one constraint, on the mean loss over a random batch of all past examples.

    With one constraint the projection has a closed form (their Eq. 11): where g . g_ref < 0,
    g~ = g - (g . g_ref / g_ref . g_ref) g_ref.

    Args:
        model: as for `GEM`.
        optimizer: as for `GEM`.
        memory_batch: number of past examples drawn, without replacement, for each step.
        margin: lower bound on the multiplier when the constraint is violated; 0 is the published method.
        seed: of the generator that draws the batches; part of the hook's state, and the only one it touches.
        **options: the other options of `GEM`.

    Raises:
        ValueError: as for `GEM`, or memory_batch is smaller than 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        memory_batch: int = 256,
        margin: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if memory_batch < 1:
            raise ValueError(f"memory_batch must be at least 1 example, got {memory_batch}")
        super().__init__(model, optimizer, margin=margin, **options)
        self.memory_batch = memory_batch
        self._generator = torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """The memory, the current task and the generator's state."""
        return {**super().state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the state that `state_dict` returned."""
        super().load_state_dict(state)
        self._generator.set_state(state["generator"])

    def _constraints(self, past: list[Hashable]) -> list[list[Batch]]:
        examples = [self.memory.examples(task) for task in past]
        counts = torch.tensor([len(x) for x, _ in examples])
        drawn = torch.randperm(int(counts.sum()), generator=self._generator)[: self.memory_batch].sort().values
        batches = []
        for task, (x, y), end, count in zip(past, examples, counts.cumsum(0), counts, strict=True):
            mine = drawn[(drawn >= end - count) & (drawn < end)] - (end - count)
            if len(mine):
                batches.append(Batch(task, x[mine.to(x.device)], y[mine.to(y.device)]))
        if not self._pass_task:
            # One forward for all of them, which for batch normalisation makes them one mini-batch.
            batches = [Batch(None, torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]))]
        return [batches]


def _trained_parameters(optimizer: Optimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _check_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    of_model = {id(p) for p in model.parameters()}
    if not of_model:
        raise ValueError("model must have parameters, got a model without any")
    if not any(id(p) in of_model for p in _trained_parameters(optimizer)):
        raise ValueError("optimizer must hold parameters of the model that require gradients, got none of them")


def _check_dense(parameters: list[Parameter]) -> None:
    for p in parameters:
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise TypeError(
                f"gradients must be dense, got a sparse one (layout {p.grad.layout}) for a parameter of shape "
                f"{tuple(p.shape)}; build its module with sparse=False"
            )


def _takes_task(model: nn.Module) -> bool:
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    return "task" in inspect.signature(inner.forward).parameters


def _check_no_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # args[0] is the optimizer. A closure computes new gradients inside step, after they could have been projected.
    if any(argument is not None for argument in args[1:]) or kwargs.get("closure") is not None:
        raise RuntimeError("optimizer.step must be called without a closure when GEM is attached, got one")


def _keep_created(
    parameters: list[Parameter], grads: list[Tensor], reached: list[bool], projection: Projection
) -> None:
    """Makes gradients that did not exist the parameters' own, where the projection has a part for them."""
    created = [(p, g) for p, g, r in zip(parameters, grads, reached, strict=True) if p.grad is None and r]
    if not created:
        return
    # On a GPU the outcome is not known without waiting for it: the gradient is then created in any case.
    on_cpu = projection.v.device.type == "cpu"
    if on_cpu and not bool(projection.v.any()):
        return
    for parameter, grad in created:
        parameter.grad = grad
