"""From the gradients at the layers' outputs to rows of G."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import Parameter

from gem_fast.task_gradients.recording import WHOLE, Recorder, Use, examples_first


def write_rows(
    recorder: Recorder, grads: Sequence[Tensor | None], parameters: Sequence[Parameter], G: Tensor, rows: slice
) -> list[bool]:
    """Writes the rows of G that a pass was for.

    Args:
        recorder: what was noted during the pass.
        grads: the gradient at each of its edges; None where no loss depends on it.
        parameters: in the order in which they make up a row.
        G: (t, p).
        rows: those of the pass, overwritten.

    Returns:
        Per parameter, whether any of these rows depends on it.

    Raises:
        CannotFuse: an input was changed in place since.
    """
    recorder.check_unchanged()
    uses: dict[Parameter, list[Use]] = {parameter: [] for parameter in parameters}
    for use in recorder.uses:
        if grads[use.edge] is not None:
            uses[use.parameter].append(use)
    start = 0
    for parameter, mine in uses.items():
        block = G[:, start : start + parameter.numel()].unflatten(1, parameter.shape or (1,))
        start += parameter.numel()
        write_block(block, rows, mine, grads)
    return [bool(mine) for mine in uses.values()]


def write_block(block: Tensor, rows: slice, uses: list[Use], grads: Sequence[Tensor | None]) -> None:
    """Writes a parameter's columns: straight from its uses where each row has one, else their sum.

    Args:
        block: (t, ...) and then the parameter's shape.
        rows: those of its rows that are overwritten.
        uses: the uses of the parameter in these rows.
        grads: as for `write_rows`.
    """
    used = [row for use in uses for row in use.rows]
    once = len(set(used)) == len(used) and all(use.part == WHOLE for use in uses)
    if not once or len(used) < rows.stop - rows.start:
        block[rows].zero_()
    for use in uses:
        target = block[use.first : use.first + len(use.segments.sizes)][:, use.part]
        if once:
            write(use, grads, target)
        else:
            addend = target.new_empty(target.shape)
            write(use, grads, addend)
            target += addend


def write(use: Use, grads: Sequence[Tensor | None], out: Tensor) -> None:
    """out[k] = the part of the parameter's gradient that this use contributes to the task of segment k."""
    grad = grads[use.edge]
    assert grad is not None
    use.write(grad if use.dim is None else examples_first(grad, use.dim), use.segments, out)
