"""What learners that train one network with SGD have in common: predictions, and a state that a file can hold."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gem_fast.state import check_keys

__all__ = ["SgdLearner"]


class SgdLearner(nn.Module):
    """A model and its optimizer; what else has a state of its own is listed by `parts`.

    state_dict() holds all of it, the model's tensors by name and the rest as `_extra_state`.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        """Takes over the training of a model.

        Args:
            model: Maps inputs to logits.
            lr: Learning rate of SGD.
        """
        super().__init__()
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def predict(self, x: Tensor, task: int) -> Tensor:
        """Logits of the network, the same for every task."""
        logits: Tensor = self.model(x)
        return logits

    def parts(self) -> dict[str, Any]:
        """What has a state_dict and a load_state_dict, by name."""
        return {"optimizer": self.optimizer}

    def get_extra_state(self) -> dict[str, Any]:
        """The states of all parts; torch calls it from state_dict."""
        return {name: part.state_dict() for name, part in self.parts().items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Gives the parts their states; torch calls it from load_state_dict."""
        parts = self.parts()
        check_keys("_extra_state", state, tuple(parts))
        # torch takes up any values, an lr of "fast" as well, and fails in the next step.
        mine, theirs = self.optimizer.state_dict()["param_groups"], state["optimizer"]["param_groups"]
        if mine != theirs:
            raise ValueError("the optimizer's options must be those of this learner, got others")
        for name, part in parts.items():
            part.load_state_dict(state[name])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes up the state that `state_dict` returned, all of it or nothing.

        Args:
            state_dict: The state, perhaps from a stranger's file.
            strict: As for torch.nn.Module.
            assign: As for torch.nn.Module.

        Returns:
            As for torch.nn.Module.

        Raises:
            ValueError: The state is not one of such a learner, which is then as it was.
        """
        before = copy.deepcopy(self.state_dict())
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except Exception as error:  # torch raises many kinds for what a file can hold; the message says what it was
            super().load_state_dict(before)
            reason = " ".join(str(error).split())
            raise ValueError(
                f"state_dict must be of a {type(self).__name__} learner like this one: {reason}"
            ) from error
