"""Why a pass over the memory failed, in the memory's own words: which task, which example, which dtype."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from gem_fast.containers import Nest, tensors
from gem_fast.gradients import Constraint, Sample
from gem_fast.memory import Memory


def explain_pass(
    error: ValueError | RuntimeError,
    model: nn.Module,
    memory: Memory,
    constraints: Sequence[Constraint],
    sample: Sample | None,
    parameter: Parameter,
) -> None:
    """Raises another error from one of a pass through the model, where the cause is too few examples or their dtype.

    Args:
        error: of the pass.
        model: what the examples go through.
        memory: where they are from.
        constraints: t of them; see `GEM.constraints`.
        sample: which of their examples count.
        parameter: any of the model's.
    """
    if isinstance(error, RuntimeError):
        cause = _misfit(memory, parameter)
    else:
        is_torchs = "more than 1 value per channel" in str(error)
        cause = _one_example(model, constraints, sample) if is_torchs else None
    if cause is not None:
        raise (RuntimeError if isinstance(error, RuntimeError) else ValueError)(cause) from error


def explain_values(error: RuntimeError, memory: Memory, grads: Sequence[Tensor]) -> None:
    """Raises another error from one of the projection, where the memory holds a NaN or an infinity and g none.

    Args:
        error: of the projection.
        memory: the examples of past tasks.
        grads: g, a list of tensors.
    """
    cause = _non_finite(memory) if all(bool(g.isfinite().all()) for g in grads) else None
    if cause is not None:
        raise RuntimeError(cause) from error


def _one_example(model: nn.Module, constraints: Sequence[Constraint], sample: Sample | None) -> str | None:
    if not any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
        return None
    batches = [batch for batches in constraints for batch in batches]
    sizes = [batch.size for batch in batches] if sample is None else [n for n in sample.sizes if n]
    for batch, size in zip(batches, sizes, strict=True):
        if size == 1:
            return (
                "batch normalisation in training mode must get more than 1 example of a task, got 1 from the memory of "
                f"task {batch.task!r}; keep or draw more, or put its layers into evaluation mode"
            )
    return None


def _misfit(memory: Memory, like: Parameter) -> str | None:
    for x in (x for task in memory.tasks for x in _tensors(memory.examples(task)[0])):
        dtype = x.dtype if x.is_floating_point() else like.dtype
        if (dtype, x.device) != (like.dtype, like.device):
            return (
                f"the model must take the memory's examples, {dtype} on {x.device}, got an error from it with "
                f"parameters of {like.dtype} on {like.device}; after model.to(...) call memory.to(...), too"
            )
    return None


def _non_finite(memory: Memory) -> str | None:
    for task in memory.tasks:
        for value in (value for part in memory.examples(task) for value in _tensors(part)):
            bad = ~value.flatten(1).isfinite().all(1) if value.dim() > 1 else ~value.isfinite()
            if bool(bad.any()):
                return (
                    "the memory's examples must be finite, got a NaN or an infinity in example "
                    f"{int(bad.nonzero()[0])} of task {task!r}"
                )
    return None


def _tensors(examples: Nest) -> list[Tensor]:
    return [value for value in tensors(examples) if isinstance(value, Tensor)]
