"""Models with torch.utils.checkpoint(use_reentrant=True), through which only `.backward()` gets.

It adds to the `.grad` of all leaves that it comes to, so that there must be others in the parameters' place
(`gem_fast.gradients.copies`).
"""

import weakref

from torch import nn

REASON = (
    "torch.utils.checkpoint runs with use_reentrant=True; with use_reentrant=False one pass can take all past tasks"
)

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_used_by(model: nn.Module) -> bool:
    """Whether a backward through the model has been found to need this."""
    return model in _models


def found_in(model: nn.Module) -> None:
    """Notes that `is_reason_of` an error of the model."""
    _models.add(model)


def is_reason_of(error: Exception) -> bool:
    """Whether torch.autograd.grad failed for this reason; the words are torch's, and those of older versions of it."""
    said = str(error)
    return isinstance(error, RuntimeError) and "heckpoint" in said and ".grad()" in said
