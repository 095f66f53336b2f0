"""GEMTrainer in the processes that torchrun starts, and from a checkpoint: torchrun ... trainer_launched.py FOLDER."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertForSequenceClassification, TrainingArguments

from gem_fast.integrations.transformers import GEMTrainer
from utils.language_models import bert, inputs, sequence_classes

TASKS, STEPS, BATCH = 3, 4, 4

new_model = partial(bert, BertForSequenceClassification, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def task_rows(task: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(task)
    n = STEPS * BATCH
    batch = {**inputs(n), "labels": sequence_classes(n)}
    return [{name: x[k] for name, x in batch.items()} for k in range(n)]


def new_trainer(folder: Path, processes: int) -> GEMTrainer:
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH // processes,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=STEPS - 1,
        average_tokens_across_devices=False,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    torch.manual_seed(0)
    return GEMTrainer(new_model().double(), arguments)


def trained(folder: Path, processes: int) -> dict[str, Any]:
    """What came of all tasks, and of the last one's end from its checkpoint."""
    trainer, violated = new_trainer(folder, processes), []
    for task in range(TASKS):
        trainer.train_dataset = task_rows(task)
        trainer.train(task=task)
        violated += [] if trainer.gem.last is None else trainer.gem.last.violations.tolist()
    resumed = new_trainer(folder / "resumed", processes)
    resumed.train_dataset = task_rows(TASKS - 1)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS - 1}"))
    return {"weights": weights(trainer), "resumed": weights(resumed), "violated": violated}


def weights(trainer: GEMTrainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


if __name__ == "__main__":
    found = trained(Path(sys.argv[1]), processes=2)
    torch.save(found, Path(sys.argv[1]) / f"rank{torch.distributed.get_rank()}.pt")
