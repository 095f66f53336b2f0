"""GEM as an optimizer hook (paper, Algorithm 1): the training loop stays the user's own."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from gem_fast.batches import check_examples
from gem_fast.containers import Nest, Objects
from gem_fast.distributed import Ranks
from gem_fast.gradients import Batch, Constraint, Engine, Fused, Objective, Sample, TaskGradients
from gem_fast.gradients.interface import is_captured
from gem_fast.gradients.sharded_engine import ShardedEngine
from gem_fast.hook import amp, hook_state
from gem_fast.hook.accuracy_watch import AccuracyWatch
from gem_fast.hook.attachment import Attached, Attachment, check_is_free
from gem_fast.hook.checks import check_attachable, check_options, check_parameters, check_solved, trained_parameters
from gem_fast.hook.created import keep_created
from gem_fast.hook.cuda_graph import Graphed, kind_of, obstacle_of
from gem_fast.hook.descriptors import Descriptors
from gem_fast.hook.explain import explain_pass, explain_values
from gem_fast.hook.first_memory import FirstMemoryCheck
from gem_fast.hook.membership import Membership
from gem_fast.hook.one_projection import OneProjection
from gem_fast.hook.step_watch import StepWatch
from gem_fast.hook.training_step import Prepared, TrainingStep
from gem_fast.memory import EpisodicMemory, Memory, plain_task
from gem_fast.memory.base import PolicyMemory
from gem_fast.memory.stored import StoredBatches
from gem_fast.projection import Projection, project_
from gem_fast.sampling import Generators, sample_each
from gem_fast.wrappers import inner_optimizer, task_parameter


class GEM(Attached):
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

    The body of the inner loop in one call is `gem.step(x, y, task)`.

    There is one constraint per task seen so far except the current one (a task may come back later), which is the one
    observed last, or what `current_task` is set to. The pass over the memory leaves no trace: `.grad`, random number
    generators and the train/eval mode are as they were. A `.grad` that is None counts as zeros, and is created where
    the projection has a part for it (the heads of old tasks).

    What is projected is what the optimizer would have read: gradients accumulated over several backward passes (the
    current task is then the one observed last), clipped before the step or unscaled by torch.amp.GradScaler. A step
    pre-hook registered on the optimizer after this one sees the projected gradient, and can clip that instead. Weight
    decay, momentum and the like are the optimizer's own, and come after. The parameters are looked up in each step:
    layers may be frozen and thawed, and parameter groups added, at any time. The pass over the memory runs outside of
    autocast, in the parameters' own dtype, because float16 gradients without a loss scale lose small values; under it
    only where parameters in half precision could not take the memory's inputs otherwise. In a step with a closure, the
    projection comes after the closure.

    What a model keeps from one call to the next outside of buffers, a hidden state say, each pass over the memory uses
    and changes; this is found in the first of them and said in the log "gem_fast". A module that resets it and puts it
    back leaves no trace:

    ```python
    class FromReset(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            kept, self.model.state = self.model.state, None
            try:
                return self.model(x)
            finally:
                self.model.state = kept

    gem = gem_fast.GEM(FromReset(model), optimizer)
    ```

    An optimizer has at most one hook. `detach()` ends it, as does leaving a `with gem_fast.GEM(...) as gem:` block, and
    the hook goes when the optimizer does. Models may train in several threads, each with a hook of its own; as always
    in torch, threads share the global random number generator.

    Args:
        model: called as model(x); as model(**x) where x is a mapping, a Hugging Face batch say, and as model(*x) where
            it is a tuple. A list or a dataclass is one argument.
        optimizer: any torch optimizer whose step calls a closure at most once (not LBFGS); its parameters are the ones
            projected. Of a wrapper, as `accelerate` makes them, the optimizer inside is taken.
        loss_fn: loss_fn(output, target) -> scalar, the mean over the examples. The output may be a nest of tensors; a
            loss that the model computes itself, from labels in x, is `lambda output, y: output.loss`.
        memory: which examples of past tasks are kept; default `EpisodicMemory(per_task=256)`, as in the paper
            (`n_memories` in the published code, `patterns_per_experience` in Avalanche).
        margin: lower bound on every multiplier v_k when a constraint is violated (>= 0); 0.5 as in the paper
            (`memory_strength` in the published code and in Avalanche).
        ridge: added to the Gramian's diagonal; 0 is the exact projection, the published code uses 1e-3 (its `eps`).
        memory_batch: m', the number of examples of each past task that count in a step, a fresh random subset each
            time; default all of them, which is exact.
        engine: what computes G, the past tasks' gradients: "auto", which is `gem_fast.Fused()`; `gem_fast.Fused(...)`
            or `gem_fast.Loop(...)` with options; or an `Engine` of your own.
        pass_task: whether the model is called with the task; or, as a string, the name of the parameter that takes it.
            Default: whether its forward, or that of a model inside of wrappers, has a parameter `task` or
            `task_labels`.
        forward: forward(model, x) -> output, for a model that is to be called in another way; with `pass_task` it is
            called as forward(model, x, task=task).
        descriptors: by task what the model is told about it beside its id, a tensor or a nest of tensors: given here or
            to `observe`. It is the argument `descriptor` of the model's forward, or else stands in the task's place.
            Kept as copies with the parameters' device and floating-point dtype.
        seed: of the generators that draw the subsets, one on each device that the memory has been on; part of the
            hook's state, and the only ones it touches.
        process_group: the processes (torch.distributed) that train replicas of the model; default those of a model that
            is in DistributedDataParallel or sharded by `fully_shard` by the first step. Each then observes its own
            examples, and those of all count (docs/distributed.md).
        check: raise RuntimeError where a projection's status is not `Status.SOLVED`. Reading the status synchronises
            with a GPU; without it the log "gem_fast" says once, some steps later, that there was another one. A NaN or
            an infinity on the CPU raises always.
        cuda_graph: on a GPU, launch the memory pass and the projection as one CUDA graph once a few steps of a kind
            were made, and capture another where a task joins or the model changes. `last` then holds the same tensors
            in each step. Of `step` all is one graph, but for `observe`: then the returned loss and `.grad` are the same
            tensors, too, dropout goes on from other random numbers, and the optimizer must be SGD or have
            capturable=True, without step hooks of the user's. What the model does in Python alone, counting its calls
            say, happens when a graph is captured, and not in the steps that come from it. What cannot be captured stays
            as it is, with one line in the log "gem_fast".

    Attributes:
        last: what the last step's projection did (violations, v, q, status and residual, as tensors on the device: to
            read them is the user's choice to synchronise); None when there was no past task. A step that GradScaler
            skips leaves it as it was.

    Raises:
        TypeError: model is no module, engine no engine, or optimizer neither a torch optimizer nor a wrapper with one
            that can be found.
        ValueError: the model has no parameters, the optimizer holds none of them, they are complex or differ in dtype
            or device, its step needs a closure, margin or ridge is negative, or memory_batch is smaller than 1. In the
            first step with a constraint: the gradient of loss_fn is zero whatever the parameters are.
        RuntimeError: the optimizer has a hook already.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
        memory: Memory | None = None,
        margin: float = 0.5,
        ridge: float = 0.0,
        memory_batch: int | None = None,
        engine: Engine | Literal["auto"] = "auto",
        pass_task: bool | str | None = None,
        forward: Callable[..., Any] | None = None,
        descriptors: Mapping[Hashable, Nest] | None = None,
        seed: int = 0,
        process_group: "torch.distributed.ProcessGroup | None" = None,
        check: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        engine = Fused() if engine == "auto" else engine
        check_options(margin, ridge, memory_batch, engine)
        given, optimizer = optimizer, inner_optimizer(optimizer)
        check_attachable(model, optimizer)
        check_is_free(optimizer)
        self._membership = Membership(model, trained_parameters(optimizer), process_group, engine)
        as_given, model = model, self._membership.model
        takes_task = task_parameter(model) or False if pass_task is None else pass_task
        self.memory: Memory = EpisodicMemory(per_task=256) if memory is None else memory
        self.margin = margin
        self.ridge = ridge
        self.memory_batch = memory_batch
        self.check = check
        self.last: Projection | None = None
        self.objective = Objective(model, loss_fn, takes_task, forward)
        self.generators = Generators(seed)
        self._descriptors = Descriptors(self.objective, descriptors)
        self._engine = engine
        self._accuracy = AccuracyWatch()
        self._graphed: Graphed[tuple[Projection, list[bool]]] | None = None
        if cuda_graph:
            self._graphed = Graphed("the memory pass", in_place=True)
        self._current: Hashable = None
        self._one_projection = OneProjection()
        self._watch = StepWatch()
        self._first_memory = FirstMemoryCheck()
        self._autocast = amp.PassAutocast()
        self._stored = StoredBatches()
        given_objective = Objective(as_given, loss_fn, takes_task, forward)
        self._step = TrainingStep(given_objective, self.objective, engine, self._prepare, cuda_graph=cuda_graph)
        self._attachment = Attachment(optimizer, given, self._before_step, self._after_step)

    @property
    def past_tasks(self) -> list[Hashable]:
        """The tasks whose losses are not to rise: all seen so far except the current one, in the order of `last.v`."""
        tasks = self.memory.tasks if self._sharded is None else self._sharded.agreement.tasks(self.memory.tasks)
        return [task for task in tasks if self._current is None or task != self._current]

    @property
    def current_task(self) -> Hashable:
        """The task whose loss may rise: the one observed last, or what it was set to since.

        Set it when a task begins whose batches are observed later or never, as where the memory is filled at a task's
        end. None: all stored tasks are constraints. Raises TypeError where it is no task's id.
        """
        return self._current

    @current_task.setter
    def current_task(self, task: Hashable) -> None:
        if task is not None:
            task = plain_task(task)
        self._current = task
        self._watch.current_is_set()

    def observe(self, x: Nest, y: Nest, task: Hashable, descriptor: Nest = None) -> None:
        """Stores a mini-batch in the memory and makes `task` the current one.

        Args:
            x: (n, ...) the model's input: a tensor, or any nest of dicts, tuples, lists and dataclasses with tensors in
                it, the first dimension of all of which runs over the same n examples. Where the memory has a
                `collate_fn`, a list of n examples of any kind.
            y: (n, ...) the loss's target, likewise; None where the loss needs only the output.
            task: any hashable id: a number, a string, a tuple of these. Those of NumPy are kept as Python's.
            descriptor: what the model is told about the task, a tensor or a nest of tensors, the same in every call;
                needed once for each task, where the hook has no `descriptors`. The same object as in the call before
                is not compared with it, which would wait for a GPU.

        Raises:
            TypeError: x, y or descriptor holds something else than dense tensors, or the id is None, a tensor or cannot
                be hashed.
            ValueError: x and y differ in length, are empty or do not fit the task's earlier examples; or the
                descriptor is another one than before, or missing, or the model takes none. The memory is then as it
                was.
        """
        # A PolicyMemory checks them itself, and with a collate_fn x is a list.
        if not isinstance(self.memory, PolicyMemory) and getattr(self.memory, "collate_fn", None) is None:
            check_examples(x, y)
        task = plain_task(task)
        self._descriptors.check(task, descriptor)
        self.memory.observe(x, y, task)
        self._descriptors.keep(task, descriptor)
        self._current = task
        self._one_projection.new_step()
        self._watch.observed(self._attachment.optimizer)

    def step(
        self,
        x: Nest,
        y: Nest,
        task: Hashable,
        descriptor: Nest = None,
        *,
        update: bool = True,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """A whole training step with a mini-batch: gradient, `observe`, projection and the optimizer's own step.

        ```python
        for x, y in loader:
            loss = gem.step(x, y, task)
        ```

        The result is, but for rounding, that of `optimizer.zero_grad()`, a forward and backward of the mini-batch under
        the caller's autocast, `observe` and `optimizer.step()`. Where the engine can, the mini-batch goes through the
        model together with the past tasks' examples.

        Args:
            x: as for `observe`; the model is called with it as the class says.
            y: as for `observe`.
            task: as for `observe`.
            descriptor: as for `observe`.
            update: whether the optimizer steps. If not, the gradients are kept, and those of the next call are added.
            scaler: of torch.amp, which scales the loss, skips steps and is updated, as torch's examples do it.

        Returns:
            () the mean loss over the mini-batch before the step, without a history; on its device, so that nothing
            waits.

        Raises:
            TypeError, ValueError: as for `observe`, or the loss is not a scalar.
            RuntimeError: the hook is detached; or, on several processes, the hook has the model inside of
                DistributedDataParallel instead of the wrapper.
        """
        optimizer = self._attachment.to_step()
        self._find_ranks()
        self._membership.check_exchanges(self._step.model)
        self.observe(x, y, task, descriptor)
        collate_fn = getattr(self.memory, "collate_fn", None)
        x = x if collate_fn is None else Objects(list(x), collate_fn)
        current = Batch(self._current, x, y, descriptor=self._descriptors.of(self._current))
        is_plain = update and scaler is None and optimizer is self._attachment.optimizer
        done = None
        if is_plain:
            of_gpus = self.generators.of_gpus
            done = self._step.run_graphed(optimizer, current, self._kind, lambda: self.last, of_gpus)
        if done is None:
            return self._step.run(optimizer, current, update=update, scaler=scaler)
        self.last = done.last
        self._watch.stepped(self._current)
        self._accuracy.ask()
        if self.check and done.last is not None:
            check_solved(done.last)
        return done.loss

    def state_dict(self) -> dict[str, Any]:
        """Memory, descriptors, the current task and what draws subsets: a resumed run goes on with the same bits.

        Tensors and plain Python values, for torch.load(weights_only=True). Model and optimizer have their own states.
        On several processes all of them must call it: each gets the state of all, with the examples of all memories.

        Raises:
            ValueError: a task's id is not a number, a string, None or a tuple of these: no such file could hold it.
        """
        return hook_state.state_of(
            self.memory, self._current, self._engine, self.generators, self._descriptors, self._find_ranks()
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the state that `state_dict` returned.

        It may come from another number of processes: then the examples of all memories are shared out among the
        present ones, whose memories' sizes change so that together they hold as many as before.

        Raises:
            ValueError: the state is not one of such a hook, or does not fit its memory. The hook is then as it was.
        """
        self._current, self.generators, as_many_ranks = hook_state.load(
            state, self.memory, self._engine, self.generators, self._descriptors, self._find_ranks()
        )
        self._watch.loaded()
        self._membership.loaded(as_many_ranks=as_many_ranks)
        self.last = None

    def _find_ranks(self) -> Ranks | None:
        optimizer = self._attachment.optimizer
        if optimizer is not None and not self._membership.is_settled:
            self._membership.find(trained_parameters(optimizer))
        return self._membership.ranks

    # ---- Algorithm 1, from the second gradient on --------------------------------------------------------------------

    def constraints(self) -> tuple[list[Constraint], Sample | None]:
        """What must not rise in the next step: the mean loss on each past task's memory; and which examples count."""
        self._stored_batches()
        stored = self._stored
        if self.memory_batch is None or not stored.constraints:
            return stored.constraints, None
        generator = self.generators.on(stored.device)
        return stored.constraints, sample_each(stored.counts, self.memory_batch, generator, stored.device)

    def _stored_batches(self) -> list[Batch]:
        """The examples of the past tasks; on several processes another one may have all of a task."""
        return self._stored(self.memory, self.past_tasks, self._descriptors.of_each)

    @property
    def _sharded(self) -> ShardedEngine | None:
        return self._membership.sharded

    def _constrained_tasks(self) -> list[list[Hashable]]:
        """Of each constraint the tasks that it is about."""
        return [[task] for task in self.past_tasks]

    def _task_gradients(
        self,
        objective: Objective,
        constraints: Sequence[Constraint],
        parameters: Sequence[Parameter],
        sample: Sample | None,
    ) -> TaskGradients:
        if self._sharded is None:
            return self._engine(objective, constraints, parameters, sample)
        return self._sharded(objective, constraints, parameters, sample, self._constrained_tasks())

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._one_projection.before_step(self._project, optimizer, args, kwargs)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._one_projection.new_step()
        self._step.accumulates = False

    def _prepare(self) -> Prepared | None:
        """What the coming projection is about, where the current mini-batch may be in its pass; else None."""
        optimizer = self._attachment.optimizer
        if self._sharded is not None or optimizer is None:
            return None
        if self._graphed is not None and not self._step.is_graphed:  # the memory pass has a graph of its own
            return None
        parameters = trained_parameters(optimizer)
        if not parameters or amp.is_on(self._step.model, parameters[0].device):
            return None  # autocast holds for the mini-batch alone
        constraints, sample = self.constraints()
        if not constraints:
            return None
        check_parameters(parameters)
        is_unseen = self._attachment.is_first and all(p.grad is None for p in parameters)
        margins = (self.margin, self.ridge) if is_unseen and self._first_memory.is_done else None
        return Prepared(parameters, constraints, sample, margins)

    def _kind(self, parameters: Sequence[Parameter]) -> tuple[Hashable, str | None]:
        """What a CUDA graph stands for, and why there can be none."""
        options = self.margin, self.ridge, self.memory_batch
        kind = kind_of(self.objective.model, self._stored_batches(), parameters, options)
        repeats = self._engine.repeats and self._sharded is None
        return kind, obstacle_of(self.objective.model, parameters, repeats)

    def _project(self, optimizer: Optimizer) -> None:
        if amp.is_skipped(optimizer, wait=self.check):
            return
        if not self._step.is_graphed:  # a graph does not come by here
            self._watch.stepped(self._current)
        prepared = self._step.prepared
        if prepared is not None and prepared.projection is not None:
            self.last = prepared.projection
            return
        parameters = trained_parameters(optimizer)
        self._membership.find(parameters, is_last=True)
        if self._sharded is not None and parameters:
            self._sharded.begin_step(self.memory, self._current, self._descriptors)
        if not parameters or not self.past_tasks:
            self.last = None
            return
        check_parameters(parameters)
        amp.unscale_(optimizer)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]  # g

        def project(grads: list[Tensor]) -> tuple[Projection, list[bool]]:
            _, constraints, sample, _, G, _ = prepared or Prepared(parameters, *self.constraints())
            with amp.disabled(self.objective.model, parameters[0].device):
                if G is None:
                    try:
                        G = self._autocast.run(  # rows g_k (Eq. 5)
                            self._task_gradients, self.objective, constraints, parameters, sample
                        )
                    except (ValueError, RuntimeError) as error:
                        explain_pass(error, self.objective.model, self.memory, constraints, sample, parameters[0])
                        raise
                try:
                    projection = project_(grads, G, self.margin, self.ridge)  # g~ (Eq. 8 and 11)
                except RuntimeError as error:
                    explain_values(error, self.memory, grads)
                    raise
                if not self._first_memory.is_done:
                    with self._autocast.context(constraints, parameters[0]):
                        self._first_memory.check(self.objective, constraints, parameters, sample, projection.q)
            return projection, G.depends

        done = None
        if self._graphed is not None and not self._step.is_graphed:
            kind, obstacle = self._kind(parameters)
            done = self._graphed(
                project,
                grads,
                kind,
                parameters=parameters,
                generators=self.generators.of_gpus,
                obstacle=obstacle,
            )
        self.last, depends = project(grads) if done is None else done
        self._accuracy.projected(self.last, amp.found_inf(optimizer))
        if not is_captured(parameters):
            self._accuracy.ask()
        if self.check:
            try:
                check_solved(self.last)
            except RuntimeError as error:
                explain_values(error, self.memory, grads)
                raise
        keep_created(parameters, grads, depends, self.last)
