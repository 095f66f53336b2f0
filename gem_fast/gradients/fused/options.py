"""What is chosen of the fused engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch.nn import Parameter

from gem_fast.gradients.interface import Constraint
from gem_fast.gradients.rows import number_of

Form = Literal["auto", "rows", "layerwise"]


@dataclass(frozen=True)
class Options:
    """See `Fused`."""

    form: Form
    refresh_every: int
    tasks_per_pass: int | None
    activation_bytes: int
    row_bytes: int
    shortcuts: bool

    def __post_init__(self) -> None:
        """Raises ValueError as `Fused` does; `RowGradients` looks at `refresh_every`."""
        if self.form not in ("auto", "rows", "layerwise"):
            raise ValueError(f'form must be "auto", "rows" or "layerwise", got {self.form!r}')
        if self.tasks_per_pass is not None and self.tasks_per_pass < 1:
            raise ValueError(f"tasks_per_pass must be at least 1 task, got {self.tasks_per_pass}")
        for name in ("activation_bytes", "row_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 byte, got {getattr(self, name)}")
        if self.form == "layerwise" and self.refresh_every != 1:
            raise ValueError(
                f'refresh_every must be 1 with form="layerwise", which keeps no rows, got {self.refresh_every}'
            )
        if self.form == "layerwise" and self.tasks_per_pass is not None:
            raise ValueError(
                'tasks_per_pass must be None with form="layerwise", which needs all tasks in one pass, '
                f"got {self.tasks_per_pass}"
            )

    def is_layerwise(self, t: int, parameters: Sequence[Parameter]) -> bool:
        """Whether G of t tasks is kept layer by layer."""
        if self.form != "auto" or self.refresh_every > 1 or self.tasks_per_pass is not None:
            return self.form == "layerwise"
        return t * number_of(parameters) * parameters[0].element_size() > self.row_bytes

    def needs_no_rows(self, constraints: Sequence[Constraint], parameters: Sequence[Parameter]) -> bool:
        """Whether G may be what a sample's products give: all is computed anew in each step, and at once."""
        is_free = self.form == "auto" and self.refresh_every == 1 and self.tasks_per_pass is None
        return is_free and set(map(len, constraints)) == {1} and not self.is_layerwise(len(constraints), parameters)

    def tasks_at_once(self, sizes: list[int], bytes_per_example: int) -> int:
        """How many tasks of at most so many examples go through the model in one pass."""
        return self.tasks_per_pass or max(1, self.activation_bytes // (bytes_per_example * max(sizes)))
