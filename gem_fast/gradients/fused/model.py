"""A model as it stands, and a pass of several tasks' examples through it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gem_fast.batches import versions
from gem_fast.gradients import cpu_mlp
from gem_fast.gradients.fused.losses import LossRoot
from gem_fast.gradients.fused.recorder import CannotFuse, Contribution, Recorder, Rule, recording
from gem_fast.gradients.fused.rules import convolution, once_per_task, replaces_operators, rules_of, with_one_task
from gem_fast.gradients.fused.task_batch import TaskBatch
from gem_fast.gradients.interface import Objective
from gem_fast.gradients.layerwise import group, write_columns
from gem_fast.gradients.rows import by_parameter


class LayerPass(NamedTuple):
    """A pass that left behind each layer's inputs and output gradients."""

    contributions: list[Contribution]

    def depends(self, parameters: Sequence[Parameter]) -> list[bool]:
        """Per parameter, whether any of the tasks' losses depends on it."""
        used = {contribution.parameter for contribution in self.contributions}
        return [parameter in used for parameter in parameters]

    @torch.no_grad()
    def write(self, G: Tensor, parameters: Sequence[Parameter]) -> None:
        """Writes the rows of G (t, p) of the pass's tasks."""
        uses = group(self.contributions, parameters).values()
        for block, mine in zip(by_parameter(G, parameters), uses, strict=True):
            write_columns(mine, block)


class FusedModel:
    """Serves as long as the model has the same modules in the same states, and the same parameters are wanted.

    Args:
        objective: the model, not a compiled one, and its loss.
        parameters: those whose gradients make up a row of G, in order.
        call_per_task: whether each task's examples go through the model in a call of their own.
    """

    def __init__(self, objective: Objective, parameters: Sequence[Parameter], *, call_per_task: bool = False) -> None:
        self.objective = objective
        self.parameters = list(parameters)
        self.call_per_task = call_per_task
        has_own_call = objective.pass_task or objective.forward is not None
        self.mlp_layers = [] if has_own_call else cpu_mlp.mlp_layers(objective.model)
        self._plan: cpu_mlp.SamplePlan | None = None
        self._whole: tuple[TaskBatch, cpu_mlp.MlpPass | None] | None = None  # the last pass without autograd
        self._wanted = set(parameters)
        self._dims: dict[tuple[nn.Module, int], int | None] = {}
        loss = [objective.loss_fn] if isinstance(objective.loss_fn, nn.Module) else []
        self._modules = [part for module in (objective.model, *loss) for part in module.modules()]
        self._used = list(dict.fromkeys(p for module in (objective.model, *loss) for p in module.parameters()))
        self._watched = list(dict.fromkeys([*parameters, *self._used]))
        self._states = self._present_states()

    @cached_property
    def rules(self) -> list[tuple[nn.Module, Rule]]:
        """The modules that go through a rule.

        Raises:
            CannotFuse: parameters are the model's own, not a layer's, or have hooks, or a module is compiled.
        """
        if any(parameter._backward_hooks for parameter in self.parameters):
            raise CannotFuse("a parameter has a hook, which would see no task's gradient")
        return rules_of(self.objective.model, self._wanted)

    def serves(self, objective: Objective, parameters: Sequence[Parameter]) -> bool:
        """Whether what is known here still holds; asked in each step, so it goes through the modules only once."""
        return (
            (objective is self.objective or objective == self.objective)
            and len(parameters) == len(self.parameters)
            and all(map(is_, parameters, self.parameters))
            and self._present_states() == self._states
        )

    def _present_states(self) -> list[tuple[Any, ...]]:
        """Of the modules that were found and their parameters: what is in them, how they are set, who looks in."""
        return (
            [
                (cpu_mlp.has_global_hooks(),),
            ]
            + [
                (type(m), m.training, cpu_mlp.has_hooks(m), *m._modules.values(), *map(id, m._parameters.values()))
                for m in self._modules
            ]
            + [
                (p.requires_grad, bool(p._backward_hooks), bool(p._post_accumulate_grad_hooks), p.dtype, p.device)
                for p in self._watched
            ]
        )

    def stateful(self) -> list[nn.Module]:
        """The modules whose buffers a pass may change."""
        return [part for module, rule in self.rules if rule is once_per_task for part in module.modules()]

    def is_mlp(self, batch: TaskBatch) -> bool:
        """Whether a batch goes the way of `cpu_mlp.whole_pass`."""
        return cpu_mlp.is_whole(self.mlp_layers, self.objective.model, batch)

    def sample_plan(self, batch: TaskBatch) -> cpu_mlp.SamplePlan | None:
        """What passes of such samples share; None where the batch is no sample, or `is_mlp` does not hold."""
        if batch.positions is None or batch.descriptor is not None:
            return None
        if self._plan is not None and self._plan.serves(batch):
            return self._plan
        self._plan = cpu_mlp.SamplePlan(self.mlp_layers, self.parameters, batch) if self.is_mlp(batch) else None
        return self._plan

    @cached_property
    def mlp_plan(self) -> cpu_mlp.MlpPlan:
        """What passes through `mlp_layers` share."""
        return cpu_mlp.MlpPlan(self.mlp_layers, self.parameters)

    def is_faster_one_by_one(self) -> bool:
        """Whether one backward per task is as fast or faster: convolutions on a CPU, as measured (bench/README.md)."""
        on_cpu = self.parameters[0].device.type == "cpu"
        return on_cpu and any(rule is convolution for _, rule in self.rules)

    def run(
        self, batches: Sequence[TaskBatch], *, shortcuts: bool, verifying: bool = False, learn_dims: bool = False
    ) -> cpu_mlp.MlpPass | LayerPass:
        """One forward per batch, and one backward for all of them.

        Args:
            batches: what goes through; with `call_per_task` one batch per task, else one for all tasks.
            shortcuts: whether the shortcuts of `cpu_mlp` are taken.
            verifying: whether to look for uses of parameters that no rule has noted.
            learn_dims: whether to find out which dimensions run over the examples, see `Recorder`.

        Raises:
            CannotFuse: the model cannot be handled in one pass.
            ValueError: the loss is not a scalar.
        """
        if shortcuts and self.mlp_layers:
            [batch] = batches
            if self._whole is None or self._whole[0] is not batch:
                self._whole = batch, cpu_mlp.whole_pass(self.mlp_layers, self.objective.model, batch)
            if self._whole[1] is not None:
                return self._whole[1]
        recorder = Recorder(self._wanted, self._dims, learn_dims)
        return self._backward(recorder, self._forward(recorder, batches), batches, shortcuts, verifying)

    def run_with_current(self, batch: TaskBatch, *, shortcuts: bool) -> tuple[cpu_mlp.MlpPass | LayerPass, Tensor]:
        """The same for a batch whose last task is the current mini-batch, and the loss of that."""
        recorder = Recorder(self._wanted, self._dims, learn_dims=False)
        [root] = self._forward(recorder, [batch])
        assert root.current is not None
        return self._backward(recorder, [root], [batch], shortcuts, verifying=False), root.current

    def _backward(
        self,
        recorder: Recorder,
        roots: Sequence[LossRoot],
        batches: Sequence[TaskBatch],
        shortcuts: bool,
        verifying: bool,
    ) -> cpu_mlp.MlpPass | LayerPass:
        if shortcuts and not self.call_per_task:
            found = cpu_mlp.recorded_pass(recorder, roots, batches[0])
            if found is not None:
                return found
        recorder.linear_calls.clear()  # and the outputs with them
        starts, known = [root.start for root in roots], [root.known for root in roots]
        # Activations that were not kept (torch.utils.checkpoint) are computed again here, by the same operators.
        with recording(recorder, [(module, rule) for module, rule in self.rules if replaces_operators(rule)]):
            grads = torch.autograd.grad(starts, recorder.edges, known, allow_unused=True, retain_graph=verifying)
        contributions = recorder.contributions(grads)
        if verifying:
            _check_every_use_is_known(contributions, self._wanted, roots)
        return LayerPass(contributions)

    @cached_property
    def has_other_gradients(self) -> bool:
        """Whether a backward of the user's would do more than add the wanted gradients to `.grad`."""
        return any(
            parameter._post_accumulate_grad_hooks or parameter._backward_hooks or parameter not in self._wanted
            for parameter in self._used
            if parameter.requires_grad
        ) or any(map(cpu_mlp.has_hooks, self._modules))

    def _forward(self, recorder: Recorder, batches: Sequence[TaskBatch]) -> list[LossRoot]:
        roots, first = [], 0
        rules = (
            [(module, partial(with_one_task, rule)) for module, rule in self.rules]
            if self.call_per_task
            else self.rules
        )
        with recording(recorder, rules):
            for batch in batches:
                recorder.begin(first, batch)
                before = versions(batch.x)
                output = self.objective.output(batch.x, batch.task, batch.descriptor)
                if versions(batch.x) != before:
                    raise CannotFuse("the model changes its input in place")
                roots.append(LossRoot.of(self.objective, output, batch))
                first += len(batch.tasks)
        return roots


def _check_every_use_is_known(
    contributions: Sequence[Contribution], wanted: set[Parameter], roots: Sequence[LossRoot]
) -> None:
    """Raises CannotFuse where outputs or losses depend on a parameter in more places than rules have noted.

    And where a loss relies on what the model returns for all examples together.

    Such a place may add nothing to the gradients that are compared, and something later: behind weights that start from
    zero, say.
    """
    noted = Counter(contribution.parameter for contribution in contributions if not contribution.is_alias)
    found: Counter[Tensor] = Counter()
    seen, waiting = set(), [root.start.grad_fn for root in roots]
    while waiting:
        node = waiting.pop()
        for after, _ in node.next_functions if node is not None else ():
            variable = getattr(after, "variable", None)
            if variable is not None:
                found[variable] += 1
            elif after is not None and after not in seen:
                seen.add(after)
                waiting.append(after)
    if any(tensor in found for root in roots for tensor in root.shared):
        raise CannotFuse("the loss relies on an output that is not one per example, but of all of them together")
    for parameter, times in found.items():
        if isinstance(parameter, Parameter) and parameter in wanted and times > noted[parameter]:
            raise CannotFuse(f"a parameter of shape {tuple(parameter.shape)} is used outside of its layer")
