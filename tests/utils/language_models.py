"""Small language models made from a configuration, with and without LoRA: nothing is downloaded."""

import os
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
)
from transformers.modeling_outputs import ModelOutput

VOCABULARY = 23
LENGTH = 6
PADDING = 0

_SIZES: dict[str, int] = {"vocab_size": VOCABULARY, "max_position_embeddings": 8, "num_labels": 3}
_IDS: dict[str, int] = {"pad_token_id": PADDING, "bos_token_id": 1, "eos_token_id": 2}


def bert(kind: type[PreTrainedModel], **options: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return kind(BertConfig(**{**_SIZES, **sizes, "pad_token_id": PADDING, **options}))


def gpt2(kind: type[PreTrainedModel], **options: Any) -> PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 8}
    return kind(GPT2Config(**{**_SIZES, **_IDS, **sizes, **options}))


def llama(kind: type[PreTrainedModel], **options: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return kind(LlamaConfig(**{**_SIZES, **_IDS, **sizes, "intermediate_size": 48, **options}))


def with_lora(
    model: PreTrainedModel, targets: str | list[str] | None = None, dropout: float = 0.1, **options: Any
) -> nn.Module:
    """PEFT's LoRA of rank 4 around a frozen model, trained a little: the matrices that start from zero do not here."""
    transposed = model.config.model_type == "gpt2"
    config = LoraConfig(r=4, target_modules=targets, lora_dropout=dropout, fan_in_fan_out=transposed, **options)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def inputs(n: int) -> BatchEncoding:
    """Token ids (n, LENGTH), each sequence padded from a length of its own on, and the mask of those that count."""
    ids = torch.randint(3, VOCABULARY, (n, LENGTH))
    mask = torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (n, 1))
    return BatchEncoding({"input_ids": torch.where(mask, ids, PADDING), "attention_mask": mask.long()})


def token_labels(n: int, classes: int = VOCABULARY) -> Tensor:
    """(n, LENGTH) int64, some of them -100: they do not count."""
    return torch.where(torch.rand(n, LENGTH) < 0.3, -100, torch.randint(classes, (n, LENGTH)))


def token_classes(n: int) -> Tensor:
    return token_labels(n, 3)


def per_sequence(output: ModelOutput, y: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, y)


def per_token(output: ModelOutput, y: Tensor) -> Tensor:
    """The mean cross entropy over the tokens that count."""
    return F.cross_entropy(output.logits.flatten(0, 1), y.flatten())


def next_token(output: ModelOutput, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """That of each token given those before it."""
    logits = output.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, y[:, 1:].flatten(), label_smoothing=label_smoothing)


def sequence_classes(n: int) -> Tensor:
    return torch.randint(3, (n,))


Task = tuple[Callable[..., PreTrainedModel], type[PreTrainedModel], Callable[[int], Tensor], Any]

TASKS: dict[str, Task] = {
    "bert, sequences": (bert, BertForSequenceClassification, sequence_classes, per_sequence),
    "bert, tokens": (bert, BertForTokenClassification, token_classes, per_token),
    "bert, masked": (bert, BertForMaskedLM, token_labels, per_token),
    "gpt2": (gpt2, GPT2LMHeadModel, token_labels, next_token),
    "gpt2, sequences": (gpt2, GPT2ForSequenceClassification, sequence_classes, per_sequence),
    "gpt2, tokens": (gpt2, GPT2ForTokenClassification, token_classes, per_token),
    "llama": (llama, LlamaForCausalLM, token_labels, next_token),
    "llama, sequences": (llama, LlamaForSequenceClassification, sequence_classes, per_sequence),
    "llama, tokens": (llama, LlamaForTokenClassification, token_classes, per_token),
}
