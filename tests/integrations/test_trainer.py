"""The Trainer of transformers with GEM: the same as a loop by hand with one backward per past task."""

import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from utils import trainer_launched
from utils.asserts import assert_same_bits
from utils.language_models import (
    PADDING,
    VOCABULARY,
    bert,
    gpt2,
    inputs,
    llama,
    sequence_classes,
    token_classes,
    token_labels,
    with_lora,
)
from utils.launched import TORCHRUN, run, script

import gem_fast
from gem_fast.integrations.transformers import STATE_NAME, GEMTrainer, padding

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT asks transformers by a name of before.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TASKS, BATCH = 3, 4
MARGIN = 0.5

BERT_AS_IT_IS: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2_AS_IT_IS: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

Row = dict[str, Tensor]
Labels = Callable[[int], Tensor]

sequences = partial(bert, BertForSequenceClassification, **BERT_AS_IT_IS)
tokens = partial(bert, BertForTokenClassification, **BERT_AS_IT_IS)
language = partial(llama, LlamaForCausalLM)


class Rows(Dataset[Row]):
    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> Row:
        return self.rows[k]


def rows_of(labels: Labels, n: int = 3 * BATCH, **more: Any) -> Rows:
    batch = {**inputs(n), "labels": labels(n)}
    return Rows([{name: x[k] for name, x in batch.items()} | more for k in range(n)])


def together(rows: Rows) -> Row:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows.rows]) for name in rows[0]}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def trained_by_hand(model: nn.Module, tasks: list[Rows], loss_fn: Any = None, size: int = BATCH) -> gem_fast.GEM:
    """SGD, with labels in the input and one backward per task."""

    def the_models_own(output: Any, _: None) -> Tensor:
        return output.loss

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    memory = gem_fast.EpisodicMemory(per_task=256)
    loss_fn = loss_fn or the_models_own
    gem = gem_fast.GEM(model, optimizer, loss_fn=loss_fn, memory=memory, margin=MARGIN, engine=gem_fast.Loop())
    model.train()
    for task, rows in enumerate(tasks):
        x = together(rows)
        for start in range(0, len(rows), size):
            batch = {name: value[start : start + size] for name, value in x.items()}
            optimizer.zero_grad()
            y = batch["labels"]
            loss_fn(model(**batch), y).backward()
            gem.observe(batch, y, task)
            optimizer.step()
    return gem


def train(trainer: GEMTrainer, tasks: list[Rows]) -> GEMTrainer:
    for task, rows in enumerate(tasks):
        trainer.train_dataset = rows
        trainer.train(task=task)
    return trainer


def copied(model: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """In float64: two ways to the same are then told from rounding."""
    both = model().double(), model().double()
    both[1].load_state_dict(both[0].state_dict())
    return both


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_close(mine: nn.Module, theirs: nn.Module, before: Tensor) -> None:
    """To rounding, in units of how far training has gone."""
    step = weights(theirs) - before
    assert step.norm() > 0.001
    assert (weights(mine) - weights(theirs)).norm() < 1e-4 * step.norm()


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the log "gem_fast" has said so far."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("gem_fast")
    log.addHandler(handler)
    yield said
    log.removeHandler(handler)


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize(
    ("model", "labels"),
    [
        (sequences, sequence_classes),
        (tokens, token_classes),
        (language, token_labels),
        (partial(gpt2, GPT2ForSequenceClassification, **GPT2_AS_IT_IS), sequence_classes),
    ],
    ids=["sequences", "tokens", "language", "gpt2, sequences"],
)
def test_as_a_loop_by_hand(
    model: Callable[[], nn.Module], labels: Labels, lora: bool, tmp_path: Path, lines: list[str]
) -> None:
    mine, theirs = copied(lambda: with_lora(model(), dropout=0.0) if lora else model())
    before = weights(theirs)
    tasks = [rows_of(labels) for _ in range(TASKS)]
    by_hand = trained_by_hand(theirs, tasks)
    trainer = train(GEMTrainer(mine, arguments(tmp_path), gem_options={"margin": MARGIN}), tasks)
    assert_close(mine, theirs, before)
    assert torch.allclose(trainer.gem.last.v, by_hand.last.v, rtol=1e-3, atol=1e-4)
    assert trainer.gem.last.violations.any() or bool((trainer.gem.last.q >= 0).all())
    assert lines == []  # all past tasks went through one pass


def test_the_trainers_own_count_of_labels(tmp_path: Path, lines: list[str]) -> None:
    """For GPT-2 it counts the first label of each sequence, too, though none of the outputs is for that."""
    mine, theirs = copied(partial(gpt2, GPT2LMHeadModel, **GPT2_AS_IT_IS))
    before = weights(theirs)
    tasks = [rows_of(token_labels) for _ in range(TASKS)]

    def counted(output: Any, y: Tensor) -> Tensor:
        logits = output.logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, y[:, 1:].flatten(), reduction="sum") / y.ne(-100).sum()

    trained_by_hand(theirs, tasks, counted)
    train(GEMTrainer(mine, arguments(tmp_path), gem_options={"margin": MARGIN}), tasks)
    assert_close(mine, theirs, before)
    assert lines == []


def test_label_smoothing(tmp_path: Path, lines: list[str]) -> None:
    mine, theirs = copied(language)
    before = weights(theirs)
    tasks = [rows_of(token_labels) for _ in range(TASKS)]

    def smoothed(output: Any, y: Tensor) -> Tensor:
        logits = output.logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, y[:, 1:].flatten(), label_smoothing=0.1)

    trained_by_hand(theirs, tasks, smoothed)
    train(GEMTrainer(mine, arguments(tmp_path, label_smoothing_factor=0.1), gem_options={"margin": MARGIN}), tasks)
    assert_close(mine, theirs, before)
    assert lines == []


def test_a_loss_that_is_given(tmp_path: Path, lines: list[str]) -> None:
    mine, theirs = copied(sequences)
    before = weights(theirs)
    tasks = [rows_of(sequence_classes) for _ in range(TASKS)]

    def summed(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        return 2 * F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    trained_by_hand(theirs, tasks, lambda output, y: 2 * F.cross_entropy(output.logits, y))
    trainer = GEMTrainer(mine, arguments(tmp_path), compute_loss_func=summed, gem_options={"margin": MARGIN})
    train(trainer, tasks)
    assert_close(mine, theirs, before)
    assert lines == []


class Penalised(Trainer):
    """Its loss does not follow from the outputs for the examples alone."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss + 0.01 * model.classifier.weight.square().sum()
        return (loss, outputs) if return_outputs else loss


class GEMPenalised(GEMTrainer, Penalised):
    pass


def test_the_loss_of_a_subclass(tmp_path: Path, lines: list[str]) -> None:
    mine, theirs = copied(sequences)
    before = weights(theirs)
    tasks = [rows_of(sequence_classes) for _ in range(TASKS)]
    trained_by_hand(
        theirs, tasks, lambda output, y: output.loss + 0.01 * theirs.get_submodule("classifier").weight.square().sum()
    )
    train(GEMPenalised(mine, arguments(tmp_path), gem_options={"margin": MARGIN}), tasks)
    assert_close(mine, theirs, before)
    [line] = lines
    assert line.startswith("one backward per past task")


def test_a_loss_that_becomes_another_one(tmp_path: Path) -> None:
    class Late(Penalised):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
            if self.train_dataset is tasks[0]:
                return Trainer.compute_loss(self, model, inputs, return_outputs, **options)
            return super().compute_loss(model, inputs, return_outputs, **options)

    class GEMLate(GEMTrainer, Late):
        pass

    tasks = [rows_of(sequence_classes) for _ in range(TASKS)]
    model = sequences()
    trainer = train(GEMLate(model, arguments(tmp_path), gem_options={"margin": MARGIN}), tasks)
    batch = together(tasks[0])
    expected = trainer.compute_loss(model, dict(batch))
    [[first], _], _ = trainer.gem.constraints()
    assert torch.allclose(trainer.gem.objective.loss(first), expected)
    assert not torch.allclose(model(**batch).loss, expected)


def mixtral() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 2, "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, max_position_embeddings=8, **sizes, **experts))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=PADDING, **sizes))


class Positions:
    """The start and the end of an answer."""

    @staticmethod
    def rows(n: int) -> Rows:
        batch = {**inputs(n), "start_positions": torch.randint(3, (n,)), "end_positions": torch.randint(3, 6, (n,))}
        return Rows([{name: x[k] for name, x in batch.items()} for k in range(n)])


@pytest.mark.parametrize(
    ("model", "rows", "with_labels", "loss"),
    [
        (sequences, partial(rows_of, sequence_classes), False, "own"),
        (partial(sequences, num_labels=1), partial(rows_of, torch.rand), False, "own"),
        (partial(bert, BertForQuestionAnswering, **{**BERT_AS_IT_IS, "num_labels": 2}), Positions.rows, False, "own"),
        (t5, partial(rows_of, token_labels), True, "own, not shifted"),
        (mixtral, partial(rows_of, token_labels), False, None),
    ],
    ids=["classes", "regression", "answers", "decoder", "balanced experts"],
)
def test_the_loss_on_the_memory_is_the_models(
    model: Any, rows: Any, with_labels: bool, loss: str | None, tmp_path: Path
) -> None:
    made, tasks = model(), [rows(BATCH), rows(BATCH)]
    trainer = train(GEMTrainer(made, arguments(tmp_path)), tasks)
    assert (trainer._loss.at_outputs, trainer._loss.with_labels) == (loss, with_labels)
    [[[first]], _] = trainer.gem.constraints()
    assert torch.allclose(trainer.gem.objective.loss(first), made(**together(tasks[0])).loss)


# ---- what the Trainer does between the backward and the step ---------------------------------------------------------


def test_accumulated_gradients(tmp_path: Path) -> None:
    """The mean is over all labels that count in the mini-batches of a step, as if they were one."""
    mine, theirs = copied(language)
    before = weights(theirs)
    tasks = [rows_of(token_labels, 4 * BATCH) for _ in range(TASKS)]
    trained_by_hand(theirs, tasks, size=2 * BATCH)
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    train(GEMTrainer(mine, args, gem_options={"margin": MARGIN}), tasks)
    assert_close(mine, theirs, before)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_the_first_task_is_learned_as_without(optim: str, tmp_path: Path) -> None:
    """To the bit, clipping included: observing and comparing leave no trace. What is evaluated is not observed."""
    mine, theirs = copied(partial(bert, BertForSequenceClassification))  # with dropout
    rows = rows_of(sequence_classes)
    options: dict[str, Any] = {"max_grad_norm": 0.1, "optim": optim, "train_sampling_strategy": "random"}
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, **options)
    Trainer(theirs, args, train_dataset=rows, eval_dataset=rows).train()
    trainer = GEMTrainer(mine, args, train_dataset=rows, eval_dataset=rows)
    trainer.train(task=0)
    assert_same_bits(weights(mine), weights(theirs))
    assert len(trainer.memory) == len(rows)


def test_the_projected_gradient_is_clipped(tmp_path: Path) -> None:
    model, limit = sequences(), 0.01
    tasks = [rows_of(sequence_classes, BATCH) for _ in range(TASKS)]
    trainer = GEMTrainer(model, arguments(tmp_path, max_grad_norm=limit), gem_options={"margin": 2.0})
    train(trainer, tasks[:-1])
    before = weights(model)
    trainer.train_dataset = tasks[-1]
    trainer.train(task=TASKS - 1)
    step = (before - weights(model)).double() / 0.1
    assert abs(float(step.norm()) - limit) < 1e-3 * limit
    # As long as the gradient and the margin's part of it are not clipped, they are the paper's.
    torch.nn.utils.vector_to_parameters(before, model.parameters())
    constraints, _ = trainer.gem.constraints()
    G = gem_fast.Loop()(trainer.gem.objective, constraints, list(model.parameters())).G.double()
    loss = model(**together(tasks[-1])).loss
    g = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(model.parameters()))]).double()
    expected = g + G.T @ trainer.gem.last.v
    assert torch.allclose(step / limit, expected / expected.norm(), atol=1e-3)


def test_bfloat16(tmp_path: Path, lines: list[str]) -> None:
    """The pass over the memory runs in float32, outside of the autocast that Accelerate enters in the forward."""
    tasks = [rows_of(token_labels) for _ in range(TASKS)]
    trainer = train(GEMTrainer(language(), arguments(tmp_path, bf16=True)), tasks)
    assert lines == []
    [first, _], _ = trainer.gem.constraints()
    loop = gem_fast.Loop()(trainer.gem.objective, [first], list(trainer.model.parameters())).G
    with torch.autocast("cpu", enabled=False):
        trainer.model.forward = trainer.model._original_forward
        expected = torch.autograd.grad(trainer.model(**together(tasks[0])).loss, list(trainer.model.parameters()))
    assert loop.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in expected)
    assert gem_fast.Status(int(trainer.gem.last.status)) == gem_fast.Status.SOLVED


def test_batches_of_several_lengths_from_a_process(tmp_path: Path, lines: list[str]) -> None:
    """Padded to the longest of each mini-batch; the memory pads on with what does not count."""

    def collate(rows: list[Row]) -> Row:
        longest = int(max(row["attention_mask"].sum() for row in rows))
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {name: x[:, :longest].contiguous() for name, x in batch.items()}

    mine, theirs = copied(tokens)
    before = weights(theirs)
    tasks = [rows_of(token_classes) for _ in range(TASKS)]
    for rows in tasks:
        for row in rows.rows:
            row["labels"][row["attention_mask"] == 0] = -100
    trained_by_hand(theirs, tasks)  # all padded to the same length: that changes nothing
    trainer = GEMTrainer(
        mine, arguments(tmp_path, dataloader_num_workers=1), data_collator=collate, gem_options={"margin": MARGIN}
    )
    train(trainer, tasks)
    assert_close(mine, theirs, before)
    assert lines == []


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_the_task_comes_from_a_column(tmp_path: Path) -> None:
    rows = Rows([row for task in (7, 3) for row in rows_of(sequence_classes, BATCH, domain=task).rows])
    rows.rows[BATCH]["domain"] = 7  # a mini-batch of two tasks
    args = arguments(tmp_path, remove_unused_columns=False)
    trainer = GEMTrainer(sequences(), args, train_dataset=rows, eval_dataset=rows, task_column="domain")
    trainer.train()
    assert trainer.memory.tasks == [7, 3]
    assert [len(trainer.memory.examples(task)[0]["input_ids"]) for task in (7, 3)] == [BATCH + 1, BATCH - 1]
    assert set(trainer.memory.examples(7)[0]) == {"input_ids", "attention_mask", "labels"}
    assert trainer.gem.current_task == 3
    assert trainer.gem.past_tasks == [7]
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_column_is_kept_though_the_model_does_not_take_it(tmp_path: Path) -> None:
    trainer = GEMTrainer(sequences(), arguments(tmp_path), task_column="domain")
    trainer._set_signature_columns_if_needed()
    assert "domain" in trainer._signature_columns


def test_a_trainer_for_each_task(tmp_path: Path) -> None:
    mine, theirs = copied(sequences)
    tasks = [rows_of(sequence_classes) for _ in range(TASKS)]
    train(GEMTrainer(theirs, arguments(tmp_path)), tasks)
    memory = gem_fast.EpisodicMemory(per_task=256)
    for task, rows in enumerate(tasks):
        trainer = GEMTrainer(mine, arguments(tmp_path), train_dataset=rows, gem_options={"memory": memory})
        trainer.train(task=task)
    assert_same_bits(weights(mine), weights(theirs))


def test_a_memory_that_chooses_by_class(tmp_path: Path) -> None:
    memory = gem_fast.ClassBalancedMemory(per_task=6)
    rows = rows_of(lambda n: torch.arange(n) % 3)
    trainer = GEMTrainer(sequences(), arguments(tmp_path), train_dataset=rows, gem_options={"memory": memory})
    trainer.train(task="first")
    assert memory.examples("first")[1].bincount().tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("options", "task", "message"),
    [
        ({}, None, "task must be the id of the task that train_dataset belongs to, got None"),
        ({"task_column": "domain"}, 1, "task must be None, as the column 'domain' has the tasks, got 1"),
        ({"task_column": "domain"}, None, "task_column must be a column of train_dataset, got 'domain'"),
    ],
)
def test_refused_tasks(options: Any, task: Any, message: str, tmp_path: Path) -> None:
    rows = rows_of(sequence_classes, BATCH)
    trainer = GEMTrainer(sequences(), arguments(tmp_path), train_dataset=rows, **options)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        trainer.train(task=task)


def test_refused_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_init must be None, got a function"):
        GEMTrainer(None, arguments(tmp_path), model_init=lambda: sequences())
    with pytest.raises(ValueError, match=r"must leave the loss and the model's call to the Trainer, got loss_fn$"):
        GEMTrainer(sequences(), arguments(tmp_path), gem_options={"loss_fn": F.cross_entropy})


# ---- checkpoints -----------------------------------------------------------------------------------------------------

SAVING: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 2,
    "optim": "adamw_torch",
    "max_grad_norm": 1.0,
    "train_sampling_strategy": "random",
}


def resumable(folder: Path, rows: Rows, model: nn.Module, memory: Any = None) -> GEMTrainer:
    memory = gem_fast.ReservoirMemory(per_task=8) if memory is None else memory
    options = {"memory": memory, "memory_batch": 4, "margin": MARGIN}
    return GEMTrainer(model, arguments(folder, **SAVING), train_dataset=rows, gem_options=options)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_a_resumed_run_has_the_same_bits(lora: bool, tmp_path: Path) -> None:
    def new_model() -> nn.Module:
        torch.manual_seed(1)
        model = bert(BertForSequenceClassification)  # with dropout
        return with_lora(model) if lora else model

    tasks = [rows_of(sequence_classes) for _ in range(TASKS)]
    model = new_model()
    memory = gem_fast.ReservoirMemory(per_task=8)
    for task, rows in enumerate(tasks):
        trainer = resumable(tmp_path / str(task), rows, model, memory)
        trainer.train(task=task)
    state = trainer.gem.state_dict()

    folder = tmp_path / str(TASKS - 1) / "checkpoint-2"
    torch.manual_seed(99)
    resumed = resumable(tmp_path / "resumed", tasks[-1], new_model())
    resumed.train(resume_from_checkpoint=str(folder))
    assert resumed.state.global_step == trainer.state.global_step == 3
    assert_same_bits(weights(resumed.model), weights(trainer.model))
    again = resumed.gem.state_dict()
    assert again["current"] == state["current"] == TASKS - 1
    assert_same_bits(again["generator"]["cpu"], state["generator"]["cpu"])
    assert again["engine"]["schedule"] == state["engine"]["schedule"]
    for mine, theirs in zip(again["memory"]["tasks"], state["memory"]["tasks"], strict=True):
        assert mine["task"] == theirs["task"]
        for name, x in theirs["x"].items():
            assert_same_bits(mine["x"][name], x)


def test_refused_checkpoints(tmp_path: Path) -> None:
    rows = rows_of(sequence_classes)
    resumable(tmp_path, rows, sequences()).train(task="a")
    folder = tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match="task must be that of the checkpoint, 'a', got 'b'"):
        resumable(tmp_path, rows, sequences()).train(resume_from_checkpoint=str(folder), task="b")
    (folder / STATE_NAME).unlink()
    with pytest.raises(
        ValueError, match=r"must be a checkpoint of a GEMTrainer, got .*checkpoint-2 without a gem\.pt$"
    ):
        resumable(tmp_path, rows, sequences()).train(resume_from_checkpoint=str(folder))


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def test_only_what_is_trained_changes_and_counts(tmp_path: Path, lines: list[str]) -> None:
    """The adapter and `modules_to_save`; rows of G have no entry for a frozen parameter."""
    model = with_lora(sequences(), modules_to_save=["classifier"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in trained)
    trainer = train(GEMTrainer(model, arguments(tmp_path)), [rows_of(sequence_classes) for _ in range(TASKS)])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained
    assert trainer.gem._engine.rows.G.shape[1] == sum(before[name].numel() for name in trained)
    assert lines == []


def test_adapters_that_are_switched_off_in_between(tmp_path: Path) -> None:
    """As a loss against the model without its adapter does."""

    class Regularised(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
            with torch.no_grad(), model.disable_adapter():
                base = model(**inputs).logits
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
            loss = loss + (outputs.logits - base).square().mean()
            return (loss, outputs) if return_outputs else loss

    class GEMRegularised(GEMTrainer, Regularised):
        pass

    mine, theirs = copied(lambda: with_lora(sequences(), dropout=0.0))
    before = weights(theirs)
    tasks = [rows_of(sequence_classes) for _ in range(TASKS)]

    class WithBase(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = theirs

        def forward(self, **batch: Tensor) -> Any:
            with torch.no_grad(), theirs.disable_adapter():
                base = theirs(**batch).logits
            outputs = theirs(**batch)
            outputs.loss = outputs.loss + (outputs.logits - base).square().mean()
            return outputs

    trained_by_hand(WithBase(), tasks)
    train(GEMRegularised(mine, arguments(tmp_path), gem_options={"margin": MARGIN}), tasks)
    assert_close(mine, theirs, before)


def test_padding() -> None:
    class Tokenizer:
        pad_token_id, pad_token_type_id = 3, 2

    class Processor:
        tokenizer = Tokenizer()

    for given in (Tokenizer(), Processor()):
        pad = padding(given)
        assert (pad["input_ids"], pad["token_type_ids"], pad["attention_mask"], pad["labels"]) == (3, 2, 0, -100)
    assert padding(None)["input_ids"] == PADDING


# ---- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_are_one_on_the_union_of_their_memories(tmp_path: Path) -> None:
    run([*TORCHRUN, script("trainer_launched"), str(tmp_path / "two")])
    alone = trainer_launched.trained(tmp_path / "one", processes=1)
    ranks = [torch.load(tmp_path / "two" / f"rank{rank}.pt") for rank in range(2)]
    for found in ranks:
        assert_same_bits(found["weights"], ranks[0]["weights"])
        assert_same_bits(found["resumed"], found["weights"])
        assert found["violated"] == alone["violated"]
        torch.testing.assert_close(found["weights"], alone["weights"], rtol=1e-5, atol=1e-6)
    assert any(alone["violated"])
