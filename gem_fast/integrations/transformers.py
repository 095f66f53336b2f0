"""GEM in the Trainer of Hugging Face's transformers, for whole models and for PEFT's adapters."""

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gem_fast import GEM, EpisodicMemory, Memory
from gem_fast.batches import Pad, select
from gem_fast.containers import map_tensors
from gem_fast.gradients.interface import random_devices
from gem_fast.gradients.restore import buffers_restored
from gem_fast.integrations import framework
from gem_fast.memory import plain_task
from gem_fast.wrappers import inner_optimizer

with framework("transformers"):
    from transformers import Trainer

STATE_NAME = "gem.pt"
"""The file of a checkpoint's folder that has the memory, with examples of the training data in it."""

_IGNORED = -100  # of labels: these do not count

_Batch = dict[str, Any]
# loss(the model's outputs, labels by their names) -> the mean loss
_LossAtOutputs = Callable[[Any, _Batch], Tensor]


class GEMTrainer(Trainer):
    """A Trainer that keeps examples of each task, and whose steps raise no past task's loss.

    ```python
    trainer = GEMTrainer(model, args, train_dataset=domains[0], processing_class=tokenizer, gem_options={"margin": 0.5})
    for task, domain in enumerate(domains):
        trainer.train_dataset = domain
        trainer.train(task=task)
    ```

    A Trainer made for each task takes the same model, and in `gem_options` the `memory` of the one before. With a
    subclass of Trainer it is the first base class: `class MyGEMTrainer(GEMTrainer, MyTrainer)`.

    The loss on the memory is the one that the Trainer trains with, as the mean over a task's examples (tokens whose
    label is -100 do not count). All past tasks go through one pass where that loss follows from the model's outputs:
    by `compute_loss_func`, label smoothing or the model's own `loss_function`. This is compared with what the Trainer
    computes, on the first mini-batch of each task; any other loss is taken as it is, with one backward per task, which
    the log "gem_fast" says.

    With `max_grad_norm` it is the projected gradient that is clipped: clipping does not turn it, so that it raises no
    past task's loss, and the step is as short as asked for. The margin weighs gradients that are not clipped, as in the
    paper. The logged `grad_norm` is that of the gradient before both.

    Checkpoints have the file gem.pt beside the optimizer's: `train(resume_from_checkpoint=...)` goes on with the same
    bits. It holds examples of the training data, and is part of what `push_to_hub` with `hub_strategy="checkpoint"` or
    "all_checkpoints" uploads.

    Args:
        *args: those of Trainer, or of the next base class.
        gem_options: options of `gem_fast.GEM`. Their defaults: those of GEM, but `seed=args.seed`, and as `memory` an
            `EpisodicMemory(per_task=256)` that pads as `padding(processing_class)` says.
        task_column: the dataset's column that has each example's task, as integers; it does not go to the model. In a
            mini-batch with several tasks, that of the last example is the current one.
        **kwargs: those of Trainer, or of the next base class.

    Attributes:
        memory: the examples that are kept.
        gem: the hook, with `last`, which tells what the last projection did; None before the first step.

    Raises:
        ValueError: there is a `model_init`, which would make a new model in each call of `train`, or `gem_options` has
            a `loss_fn`, `forward` or `pass_task`, which are the Trainer's.
    """

    def __init__(
        self, *args: Any, gem_options: Mapping[str, Any] | None = None, task_column: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.model_init is not None:
            raise ValueError("model_init must be None, got a function that makes a new model in each call of train")
        self._options = {"seed": self.args.seed, **(gem_options or {})}
        if own := sorted({"loss_fn", "forward", "pass_task"} & set(self._options)):
            raise ValueError(
                f"gem_options must leave the loss and the model's call to the Trainer, got {', '.join(own)}"
            )
        memory = self._options.pop("memory", None)
        self.memory: Memory = (
            EpisodicMemory(per_task=256, pad=padding(self.processing_class)) if memory is None else memory
        )
        self.task_column = task_column
        self.gem: GEM | None = None
        self._task: Hashable = None
        self._loss = _MemoryLoss(self)
        self._hooked: Optimizer | None = None
        self._compared: set[Hashable] = set()  # the tasks on whose first mini-batch the loss was

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, task: Hashable = None, **kwargs: Any
    ) -> Any:
        """As `Trainer.train`.

        Args:
            resume_from_checkpoint: as for `Trainer.train`.
            *args: likewise.
            task: the id of the task that the examples of `train_dataset` belong to: a number, a string or a tuple of
                these. None where there is a `task_column`, or for the task of the checkpoint.
            **kwargs: as for `Trainer.train`.

        Raises:
            ValueError: both `task` and `task_column` are given, neither is, or the checkpoint was made in another task.
        """
        if task is not None and self.task_column is not None:
            raise ValueError(f"task must be None, as the column {self.task_column!r} has the tasks, got {task!r:.50}")
        if task is None and self.task_column is None and not resume_from_checkpoint:
            raise ValueError("task must be the id of the task that train_dataset belongs to, got None")
        self._task = None if task is None else plain_task(task)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer.training_step`; the mini-batch is then observed."""
        loss: Tensor = super().training_step(model, self._without_tasks(inputs), *args, **kwargs)
        batch = map_tensors(lambda x: x.to(self.args.device), dict(inputs))
        gem = self._hook(model)
        for task, part in self._by_task(batch):
            if task not in self._compared:
                self._compare_loss(gem, part)
                self._compared.add(task)
            gem.observe(part, self._classes(part), task)
        return loss

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.prediction_step`."""
        return super().prediction_step(model, self._without_tasks(inputs), *args, **kwargs)

    def _without_tasks(self, inputs: Any) -> _Batch:
        return {name: value for name, value in inputs.items() if name != self.task_column}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.task_column is not None and self.task_column not in self._signature_columns:
            self._signature_columns.append(self.task_column)

    def _by_task(self, batch: _Batch) -> Iterator[tuple[Hashable, _Batch]]:
        """The examples of each task in a mini-batch; the task of the last example comes last."""
        if self.task_column is None:
            yield self._task, batch
            return
        column = batch.pop(self.task_column, None)
        if column is None:
            raise ValueError(f"task_column must be a column of train_dataset, got {self.task_column!r:.50}")
        tasks = column.tolist() if isinstance(column, Tensor) else list(column)
        for task in reversed(dict.fromkeys(reversed(tasks))):
            yield task, select(batch, torch.tensor([k for k, other in enumerate(tasks) if other == task]))

    def _classes(self, batch: _Batch) -> Tensor | None:
        """(n,) int64: the examples' classes, for memories that choose by them; None where labels are something else."""
        labels = [batch[name] for name in self.label_names if name in batch]
        is_class = len(labels) == 1 and labels[0].dim() == 1 and not labels[0].is_floating_point()
        return labels[0] if is_class else None

    # ---- the hook ----------------------------------------------------------------------------------------------------

    def _hook(self, model: nn.Module) -> GEM:
        """The hook on the present optimizer."""
        optimizer = inner_optimizer(self.optimizer)
        if self.gem is None or self._hooked is not optimizer:
            options = {"forward": self._loss.forward, "loss_fn": self._loss.loss_fn, **self._options}
            # What DataParallel splits over GPUs, the pass over the memory does not.
            model = self.model if self.args.n_gpu > 1 else model
            self.gem = GEM(model, optimizer, memory=self.memory, pass_task=False, **options)
            self._hooked = optimizer
            optimizer.register_step_pre_hook(self._clip)
        return self.gem

    def _compare_loss(self, gem: GEM, batch: _Batch) -> None:
        """Takes the loss at the model's outputs if it is what the Trainer trains with, on this mini-batch, too."""
        loss = _MemoryLoss.found(self, batch)
        if self._compared and loss != self._loss:
            loss = _MemoryLoss(self)
        if loss != self._loss:
            self._loss = loss
            gem.objective = replace(gem.objective, forward=loss.forward, loss_fn=loss.loss_fn)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # The projected gradient is clipped, in the optimizer's step: here is only what is logged, and unscaled.
        return super()._clip_grad_norm(model) if self._is_plain() else self._get_grad_norm(model)

    def _clip(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.args.max_grad_norm > 0 and not self._is_plain():
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)

    def _is_plain(self) -> bool:
        return self.gem is None or not self.gem.attached

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.gem is None:
            return
        state = self.gem.state_dict()  # on several processes all of them take part
        if self.args.should_save:
            torch.save(state, Path(output_dir) / STATE_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE_NAME
        if not path.is_file():
            raise ValueError(
                f"resume_from_checkpoint must be a checkpoint of a GEMTrainer, got {checkpoint} without a {STATE_NAME}"
            )
        gem = self._hook(self.model_wrapped)
        gem.load_state_dict(torch.load(path, map_location=self.args.device, weights_only=True))
        if self.task_column is None:
            if self._task not in (None, gem.current_task):
                raise ValueError(
                    f"task must be that of the checkpoint, {gem.current_task!r:.50}, got {self._task!r:.50}"
                )
            self._task = gem.current_task


def padding(processing_class: Any) -> Pad:
    """What `pad` of a memory takes for the batches of a tokenizer's data collators.

    Args:
        processing_class: the tokenizer, or a processor that has one; None for the numbers that are usual.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    token = getattr(tokenizer, "pad_token_id", None) or 0
    return {
        "input_ids": token,
        "attention_mask": 0,
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
        "decoder_input_ids": token,
        "decoder_attention_mask": 0,
        "labels": _IGNORED,
    }


@dataclass(frozen=True)
class _MemoryLoss:
    """The loss that a Trainer trains with, on examples of the memory.

    Attributes:
        trainer: the Trainer.
        at_outputs: the name of what computes it from the model's outputs (`_losses_at_outputs`), one task's from one
            task's outputs; None: nothing but `Trainer.compute_loss` is known to.
        with_labels: whether the model must get the labels for these outputs.
    """

    trainer: GEMTrainer
    at_outputs: str | None = None
    with_labels: bool = False

    @classmethod
    def found(cls, trainer: GEMTrainer, batch: _Batch) -> "_MemoryLoss":
        """The loss at the outputs that is what the Trainer trains with on a mini-batch; leaves no trace."""
        model, labels = trainer.model, _labels(trainer, batch)
        devices = random_devices(list(model.parameters()))

        @contextmanager
        def no_trace() -> Iterator[None]:  # and the same random numbers in each block
            with torch.no_grad(), torch.random.fork_rng(devices), buffers_restored(model.modules()):
                yield

        with no_trace():
            trained, outputs = _trained_loss(trainer, model, batch, return_outputs=True)
        for name, loss in _losses_at_outputs(trainer).items():
            # Of a function that is not meant for these outputs, or a model without its labels, anything may come.
            with no_trace(), suppress(Exception):
                if _equal(loss(outputs, labels), trained):
                    with suppress(Exception):
                        if _equal(loss(model(**_without(batch, labels)), labels), trained):
                            return cls(trainer, name)
                    return cls(trainer, name, with_labels=True)
        return cls(trainer)

    def forward(self, model: nn.Module, batch: _Batch) -> dict[str, Any]:
        """What the loss is computed from: outputs and labels, or the loss itself."""
        if self.at_outputs is None:
            return {"loss": _trained_loss(self.trainer, model, batch)}
        labels = _labels(self.trainer, batch)
        return {"outputs": model(**(batch if self.with_labels else _without(batch, labels))), "labels": labels}

    def loss_fn(self, found: dict[str, Any], _: Any) -> Tensor:
        """The mean loss."""
        if self.at_outputs is None:
            loss: Tensor = found["loss"]
        else:
            loss = _losses_at_outputs(self.trainer)[self.at_outputs](found["outputs"], found["labels"])
        return loss


def _trained_loss(trainer: GEMTrainer, model: nn.Module, batch: _Batch, **options: Any) -> Any:
    """What `Trainer.compute_loss` makes of a mini-batch, as if it were all of a step."""
    n = _count(trainer, _labels(trainer, batch))
    result = trainer.compute_loss(model, dict(batch), num_items_in_batch=n, **options)
    args = trainer.args  # over all processes, the mean is taken later
    scale = 1 if n is None or not args.average_tokens_across_devices else trainer.accelerator.num_processes
    return (result[0] / scale, result[1]) if options else result / scale


def _losses_at_outputs(trainer: GEMTrainer) -> dict[str, _LossAtOutputs]:
    """What the Trainer may train with, each by a name of its own."""
    if trainer.compute_loss_func is not None:
        return {"given": lambda outputs, y: trainer.compute_loss_func(outputs, y.get("labels"), _count(trainer, y))}
    if trainer.label_smoother is not None:
        smooth = trainer.label_smoother
        return {
            "smoothed": lambda outputs, y: smooth(outputs, y["labels"], False, _count(trainer, y)),
            "smoothed, next token": lambda outputs, y: smooth(outputs, y["labels"], True, _count(trainer, y)),
        }
    return {
        "own": lambda outputs, y: _own_loss(trainer, outputs, y),
        # of encoders with a decoder, whose outputs are at the labels already
        "own, not shifted": lambda outputs, y: _own_loss(trainer, outputs, y, shift_labels=y["labels"]),
    }


def _own_loss(trainer: GEMTrainer, outputs: Mapping[str, Any], labels: _Batch, **options: Any) -> Tensor:
    """The model's `loss_function`, with those arguments that it takes, as models of the library call it."""
    model = getattr(trainer.model, "get_base_model", lambda: trainer.model)()
    offered = {
        **outputs,
        "pooled_logits": outputs.get("logits"),
        "vocab_size": outputs["logits"].shape[-1] if "logits" in outputs else None,
        "config": model.config,
        "num_items_in_batch": _count(trainer, labels),
        **labels,
        **options,
    }
    names = inspect.signature(model.loss_function).parameters
    loss: Tensor = model.loss_function(**{name: value for name, value in offered.items() if name in names})
    return loss


def _labels(trainer: GEMTrainer, batch: _Batch) -> _Batch:
    return {name: batch[name] for name in trainer.label_names if name in batch}


def _without(batch: _Batch, labels: _Batch) -> _Batch:
    return {name: value for name, value in batch.items() if name not in labels}


def _count(trainer: GEMTrainer, labels: _Batch) -> Tensor | None:
    """What the Trainer divides the sum of the losses by: the number of labels that count; None for a mean."""
    if "labels" not in labels or not (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None):
        return None
    mine = labels["labels"][..., 1:] if trainer._loss_shifts_labels else labels["labels"]
    count: Tensor = mine.ne(_IGNORED).sum()
    return count


def _equal(mine: Tensor, trained: Tensor) -> bool:
    # A part that a model adds to its loss, to balance its experts say, may be small.
    return torch.allclose(mine, trained.to(mine.dtype), rtol=64 * torch.finfo(mine.dtype).eps, atol=0.0, equal_nan=True)
