"""Lightning: the hook needs no adapter there; its state needs a place in Lightning's checkpoints."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from gem_fast import GEM
from gem_fast.integrations import framework

_log = logging.getLogger("gem_fast")


def _callback() -> type:
    """A callback of pytorch_lightning, and of the same library under the name of lightning where that is installed."""
    classes = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            classes.append(importlib.import_module(package).Callback)
        except ModuleNotFoundError as error:
            missing = error
    if not classes:
        with framework("lightning"):
            raise missing
    return type("Callback", tuple(classes), {})


if TYPE_CHECKING:
    Callback = object
else:
    Callback = _callback()


class GEMCheckpoint(Callback):
    """Puts the state of a LightningModule's hooks, memories included, into the Trainer's checkpoints.

    ```python
    class Digits(LightningModule):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.gem = gem_fast.GEM(self, optimizer)
            return optimizer

    trainer = Trainer(callbacks=[GEMCheckpoint()])
    trainer.fit(module, loader, ckpt_path="last")
    ```

    The hooks are the module's attributes of type `GEM` or `AGEM`, each under its name. Training that goes on from
    `ckpt_path` has the same bits as one that was not interrupted. The state is taken up when training starts, after
    configure_optimizers has made the hooks. On several processes a checkpoint has the memories of all, and can be taken
    up by another number of them.

    Raises:
        RuntimeError: when training starts, the module has no hook, or others than the checkpoint.
    """

    def __init__(self) -> None:
        self._states: dict[str, Any] | None = None

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Forgets the states of a checkpoint that training was not started from."""
        self._states = None

    def on_save_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Adds the states; on several processes, on all of them."""
        checkpoint["gem_fast"] = {name: hook.state_dict() for name, hook in _hooks(pl_module).items()}

    def on_load_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Keeps the states until there are hooks."""
        self._states = checkpoint.get("gem_fast")
        if self._states is None and trainer.training:
            _log.warning("the checkpoint has no state of a hook, so training goes on with the memory as it is")

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Gives the hooks the states of the checkpoint."""
        hooks = _hooks(pl_module)
        if not hooks:
            raise RuntimeError(
                "the LightningModule must have a hook, self.gem = gem_fast.GEM(...) in configure_optimizers, got none"
            )
        if self._states is None:
            return
        if self._states.keys() != hooks.keys():
            raise RuntimeError(f"the module's hooks must be the checkpoint's {[*self._states]}, got {[*hooks]}")
        for name, hook in hooks.items():
            hook.load_state_dict(self._states[name])
        self._states = None


def _hooks(module: nn.Module) -> dict[str, GEM]:
    return {name: value for name, value in vars(module).items() if isinstance(value, GEM)}
