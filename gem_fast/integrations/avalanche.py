"""GEM and A-GEM as Avalanche's plugins and strategies, with Avalanche's names and arguments.

```diff
-from avalanche.training import GEM
+from gem_fast.integrations.avalanche import GEM
```
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import gem_fast
from gem_fast.integrations import framework

with framework("avalanche"):
    from avalanche import training
    from avalanche.models.utils import is_multi_task_module
    from avalanche.training.plugins import SupervisedPlugin
    from avalanche.training.templates import SupervisedTemplate

__all__ = ["AGEM", "GEM", "AGEMPlugin", "GEMPlugin"]


class _HookPlugin(SupervisedPlugin):
    """Attaches a hook of gem_fast to the strategy's optimizer, and fills its memory when an experience ends.

    As in Avalanche each training on an experience counts as one task, an experience that comes back as another one.

    Attributes:
        hook: the hook; None before the first training. `hook.last` says what the last step's projection did.
    """

    def __init__(self, patterns_per_experience: int) -> None:
        super().__init__()
        self.patterns_per_experience = int(patterns_per_experience)
        self.hook: gem_fast.GEM | None = None
        self._attached_to: tuple[object, ...] = ()
        self._state: dict[str, Any] | None = None  # of the hook, where there is none yet

    def _new_hook(self, model: nn.Module, optimizer: Optimizer, **options: Any) -> gem_fast.GEM:
        raise NotImplementedError

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Says which task is the current one; in the first training, or with another model, attaches the hook."""
        wanted = (strategy.model, strategy.optimizer, strategy._criterion)
        if self.hook is None or any(a is not b for a, b in zip(wanted, self._attached_to, strict=True)):
            if self.hook is not None:
                self._state = self.hook.state_dict()
                self.hook.detach()
            with_labels = is_multi_task_module(strategy.model)
            self.hook = self._new_hook(
                strategy.model,
                strategy.optimizer,
                loss_fn=strategy._criterion,
                memory=gem_fast.EpisodicMemory(per_task=self.patterns_per_experience),
                # One forward per task, whose examples bring their labels: the hook's own task is the experience.
                pass_task=with_labels,
                forward=_call_with_labels if with_labels else None,
            )
            self._attached_to = wanted
            if self._state is not None:
                self.hook.load_state_dict(self._state)
                self._state = None
        self.hook.current_task = strategy.clock.train_exp_counter

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Keeps a random sample of the experience's examples: with the same seed, that of Avalanche's GEMPlugin."""
        assert self.hook is not None
        dataset = strategy.experience.dataset
        collate = getattr(dataset, "collate_fn", None)
        loader = DataLoader(dataset, batch_size=self.patterns_per_experience, collate_fn=collate, shuffle=True)
        batch = [part.to(strategy.device) for part in next(iter(loader))]
        x, y = batch[:2]
        if is_multi_task_module(strategy.model):
            x = (x, batch[-1])  # the task labels
        self.hook.observe(x, y, strategy.clock.train_exp_counter)

    def __getstate__(self) -> dict[str, Any]:
        # For Avalanche's checkpoints, and copies: the hook is made anew on the copied optimizer.
        state = self._state if self.hook is None else self.hook.state_dict()
        return {**self.__dict__, "hook": None, "_attached_to": (), "_state": state}


def _call_with_labels(model: nn.Module, x: tuple[torch.Tensor, torch.Tensor], task: int) -> Any:
    return model(*x)


class GEMPlugin(_HookPlugin):
    """`avalanche.training.plugins.GEMPlugin` with gem_fast's hook: the gradient is projected as the optimizer steps.

    Args:
        patterns_per_experience: number of examples kept of each experience, a random sample taken when it ends.
        memory_strength: lower bound on every multiplier when a constraint is violated, `margin` of `gem_fast.GEM`; 0.5
            in the paper's experiments.
        options: more options of `gem_fast.GEM`: `memory_batch`, `engine`, `ridge`, ...

    Raises:
        As `gem_fast.GEM`, in the first training.
    """

    def __init__(self, patterns_per_experience: int, memory_strength: float, **options: Any) -> None:
        super().__init__(patterns_per_experience)
        self.memory_strength = memory_strength
        self.options = options

    def _new_hook(self, model: nn.Module, optimizer: Optimizer, **options: Any) -> gem_fast.GEM:
        return gem_fast.GEM(model, optimizer, margin=self.memory_strength, **options, **self.options)


class AGEMPlugin(_HookPlugin):
    """`avalanche.training.plugins.AGEMPlugin` with gem_fast's hook: the gradient is projected as the optimizer steps.

    Args:
        patterns_per_experience: number of examples kept of each experience, a random sample taken when it ends.
        sample_size: number of them that are drawn for each step, of all past experiences together.
        options: more options of `gem_fast.AGEM`: `margin`, `seed`, ...

    Raises:
        As `gem_fast.AGEM`, in the first training.
    """

    def __init__(self, patterns_per_experience: int, sample_size: int, **options: Any) -> None:
        super().__init__(patterns_per_experience)
        self.sample_size = int(sample_size)
        self.options = options

    def _new_hook(self, model: nn.Module, optimizer: Optimizer, **options: Any) -> gem_fast.GEM:
        return gem_fast.AGEM(model, optimizer, memory_batch=self.sample_size, **options, **self.options)


class _Template(SupervisedTemplate):
    """Avalanche's template with one more plugin, and as its GEM and AGEM set it up."""

    def __init__(
        self,
        *,
        plugin: _HookPlugin,
        criterion: Any,
        eval_mb_size: int | None = None,
        plugins: list[SupervisedPlugin] | None = None,
        **options: Any,
    ) -> None:
        plugins = [*(plugins or []), plugin]
        super().__init__(criterion=criterion, eval_mb_size=eval_mb_size, plugins=plugins, **options)


def _signature_of(strategy: type[SupervisedTemplate], init: Callable[..., None]) -> None:
    """Shows another strategy's signature, from which Avalanche takes the order of arguments given by position."""
    vars(init)["__signature__"] = inspect.signature(strategy.__init__)


class GEM(_Template):
    """`avalanche.training.GEM` with `GEMPlugin`.

    Args:
        patterns_per_exp: number of examples kept of each experience.
        memory_strength: lower bound on every multiplier when a constraint is violated.
        options: all other arguments, as in Avalanche: `model`, `optimizer`, `criterion`, `train_mb_size`, ...
    """

    def __init__(self, *, patterns_per_exp: int, memory_strength: float = 0.5, **options: Any) -> None:
        super().__init__(plugin=GEMPlugin(patterns_per_exp, memory_strength), **options)

    _signature_of(training.GEM, __init__)


class AGEM(_Template):
    """`avalanche.training.AGEM` with `AGEMPlugin`.

    Args:
        patterns_per_exp: number of examples kept of each experience.
        sample_size: number of them that are drawn for each step, of all past experiences together.
        options: all other arguments, as in Avalanche: `model`, `optimizer`, `criterion`, `train_mb_size`, ...
    """

    def __init__(self, *, patterns_per_exp: int, sample_size: int = 64, **options: Any) -> None:
        super().__init__(plugin=AGEMPlugin(patterns_per_exp, sample_size), **options)

    _signature_of(training.AGEM, __init__)
