"""BERT, GPT-2 and Llama, with and without LoRA: the rows of one pass are those of the loop."""

import contextlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM, BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM
from utils.engines import assert_as_the_loop, trained
from utils.language_models import TASKS, bert, gpt2, inputs, llama, next_token, token_labels, with_lora

from gem_fast import Batch
from gem_fast.gradients.fused.rules import rules_of
from gem_fast.gradients.fused.verifier import _NothingDropped

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PEFT asks transformers by a name of before.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SIZES = (4, 3, 5)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05}


def assert_fused(model: nn.Module, targets: Any, loss_fn: Any, dtype: torch.dtype = torch.float64) -> None:
    """One pass does what the loop does where dropout keeps everything: what it drops, it draws by itself."""
    with _NothingDropped() if model.training else contextlib.nullcontext():
        batches = [[Batch(task, inputs(n), targets(n))] for task, n in enumerate(SIZES)]
        assert_as_the_loop(model.to(dtype), batches, loss_fn, tolerance=TOLERANCES[dtype], small_block=4000)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", ["bert, sequences", "gpt2", "llama"])
def test_equals_the_loop(name: str, lora: bool, training: bool, dtype: torch.dtype) -> None:
    make, kind, targets, loss_fn = TASKS[name]
    model = make(kind)
    assert_fused((with_lora(model) if lora else model).train(training), targets, loss_fn, dtype)


@pytest.mark.parametrize("name", TASKS)
def test_heads(name: str) -> None:
    make, kind, targets, loss_fn = TASKS[name]
    assert_fused(make(kind).train(), targets, loss_fn)


@pytest.mark.parametrize(
    "model",
    [
        partial(gpt2, GPT2LMHeadModel, attn_implementation="eager"),
        partial(gpt2, GPT2LMHeadModel, tie_word_embeddings=False),
        partial(gpt2, GPT2LMHeadModel, use_cache=True),
        partial(gpt2, GPT2LMHeadModel, activation_function="gelu", scale_attn_by_inverse_layer_idx=True),
        partial(llama, LlamaForCausalLM, attn_implementation="eager", attention_bias=True, mlp_bias=True),
        partial(llama, LlamaForCausalLM, tie_word_embeddings=True, use_cache=True),
    ],
    ids=lambda model: ", ".join([model.func.__name__, *model.keywords]),
)
def test_options_of_models(model: partial[nn.Module]) -> None:
    assert_fused(model().train(), token_labels, next_token)


def test_label_smoothing() -> None:
    assert_fused(gpt2(GPT2LMHeadModel).train(), token_labels, partial(next_token, label_smoothing=0.1))


@pytest.mark.parametrize(("make", "kind"), [(gpt2, GPT2LMHeadModel), (llama, LlamaForCausalLM)])
def test_checkpointed_activations(make: Any, kind: Any) -> None:
    model = make(kind)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_fused(model.train(), token_labels, next_token)


@pytest.mark.parametrize(
    ("make", "kind", "targets"),
    [
        (gpt2, GPT2LMHeadModel, ["c_attn", "c_proj", "c_fc"]),
        (gpt2, GPT2LMHeadModel, ["wte"]),
        (llama, LlamaForCausalLM, "all-linear"),
        (llama, LlamaForCausalLM, ["embed_tokens", "q_proj"]),
        (bert, BertForMaskedLM, ["query", "dense"]),
    ],
    ids=["gpt2, blocks", "gpt2, embedding", "llama, all", "llama, embedding", "bert"],
)
def test_lora_of_other_layers(make: Any, kind: Any, targets: Any) -> None:
    assert_fused(with_lora(make(kind), targets).train(), token_labels, next_token)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            lambda: bert(BertForSequenceClassification),
            {"Linear": "linear", "LayerNorm": "normalisation", "Embedding": "embedding"},
        ),
        (
            lambda: gpt2(GPT2LMHeadModel),
            {
                "Conv1D": "conv1d",
                "Linear": "linear",
                "LayerNorm": "normalisation",
                "Embedding": "embedding",
                "NewGELUActivation": "tanh_gelu",
            },
        ),
        (
            lambda: llama(LlamaForCausalLM),
            {"Linear": "linear", "LlamaRMSNorm": "own_rms_norm", "Embedding": "embedding"},
        ),
        (lambda: bert(BertForMaskedLM), {"Linear": "linear", "LayerNorm": "normalisation", "Embedding": "embedding"}),
        (lambda: with_lora(bert(BertForSequenceClassification)), {"Linear": "linear"}),
        (lambda: with_lora(gpt2(GPT2LMHeadModel)), {"Linear": "linear", "NewGELUActivation": "tanh_gelu"}),
        (lambda: with_lora(llama(LlamaForCausalLM)), {"Linear": "linear"}),
        (
            lambda: with_lora(gpt2(GPT2LMHeadModel), ["wte"]),
            {"Embedding": "once_per_task", "NewGELUActivation": "tanh_gelu"},
        ),
    ],
)
def test_which_module_goes_through_which_rule(model: Any, expected: dict[str, str]) -> None:
    made = model()
    found = {(type(module).__name__, rule.__name__) for module, rule in rules_of(made, trained(made))}
    assert found == set(expected.items())
