"""A step of GEM on a language model, GPT-2 with 6 layers of 384 units, whole and with LoRA: its time and peak memory.

cd bench && python bench_transformers.py                  measures, writes results/transformers.json, prints the tables
cd bench && python bench_transformers.py --print          prints the tables again
cd bench && python bench_transformers.py --quick          a tiny model, two rounds: whether all of it runs

There are 10 past tasks with 8 sequences of 64 tokens each, and 8 more sequences in the current mini-batch. Training
mode, with GPT-2's own dropout. The vocabulary has 1024 tokens: of GPT-2's 50,257 the last layer alone would take two
thirds of all products, which are the same for every method.

"all at once" is a plain step over the sequences of the past tasks and of the mini-batch together: its peak is that of a
plain step and of all activations.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from conftest import THREADS
from interleave import now
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from training import DEVICE
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import ModelOutput

import gem_fast

RESULTS = Path(__file__).parent / "results" / "transformers.json"
KINDS = ("lora", "whole")
ENGINES = {
    "rows": lambda: gem_fast.Fused(form="rows"),
    "layerwise": lambda: gem_fast.Fused(form="layerwise"),
    "loop": gem_fast.Loop,
}
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "9"))
METHODS = ("plain", "all at once", *ENGINES)
MEGABYTE = 10**6

SIZES = {"layers": 6, "units": 384, "heads": 6, "vocabulary": 1024, "tasks": 10, "sequences": 8, "tokens": 64}
QUICK = {"layers": 2, "units": 32, "heads": 2, "vocabulary": 64, "tasks": 3, "sequences": 2, "tokens": 16}

Sizes = dict[str, int]


def new_model(kind: str, sizes: Sizes) -> nn.Module:
    """The model with random weights, or frozen with LoRA of rank 4 in its attention, PEFT's choice for GPT-2."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=sizes["vocabulary"],
        n_embd=sizes["units"],
        n_layer=sizes["layers"],
        n_head=sizes["heads"],
        n_positions=sizes["tokens"],
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=4, fan_in_fan_out=True))
    return model.to(DEVICE).train()


def sequences(task: int, n: int, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    """Of each task's n sequences, every token is followed by the one that the task's own permutation gives."""
    after = torch.randperm(sizes["vocabulary"], generator=torch.Generator().manual_seed(task))
    tokens = [torch.randint(sizes["vocabulary"], (n,), generator=generator)]
    while len(tokens) < sizes["tokens"]:
        tokens.append(after[tokens[-1]])
    ids = torch.stack(tokens, 1).to(DEVICE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def next_token(output: ModelOutput, ids: Tensor) -> Tensor:
    """The mean cross entropy of each token given those before it."""
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def new_step(kind: str, method: str, sizes: Sizes) -> Callable[[], object]:
    """One training step with all past tasks in the memory, as a call."""
    model = new_model(kind, sizes)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    t, n = sizes["tasks"], sizes["sequences"]
    past = [sequences(task, n, sizes, generator) for task in range(t)]
    x = sequences(t, n, sizes, generator)
    hook = None
    if method in ENGINES:
        memory = gem_fast.EpisodicMemory(per_task=n)
        hook = gem_fast.GEM(model, optimizer, loss_fn=next_token, memory=memory, engine=ENGINES[method]())
        for task, batch in enumerate(past):
            hook.observe(batch, batch["input_ids"], task)
    elif method == "all at once":
        x = {name: torch.cat([x[name], *(batch[name] for batch in past)]) for name in x}

    def step() -> None:
        optimizer.zero_grad()
        next_token(model(**x), x["input_ids"]).backward()
        if hook is not None:
            hook.observe(x, x["input_ids"], t)
        optimizer.step()

    return step


# ---- time ------------------------------------------------------------------------------------------------------------


def time_all(kind: str, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """The median seconds of each method's step, in turn, and of the loop's divided by it, round by round."""
    steps = {method: new_step(kind, method, sizes) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for step in [*steps.values()] * 2:
        step()  # compared with the loop, as are steps 4 and 8: few enough for a median of 3 rounds, or of 9
    for _ in range(rounds):
        for method, step in steps.items():
            start = now()
            step()
            seconds[method].append(now() - start)
    faster = {
        method: statistics.median([loop / mine for loop, mine in zip(seconds["loop"], times, strict=True)])
        for method, times in seconds.items()
    }
    return {
        "seconds": {method: statistics.median(times) for method, times in seconds.items()},
        "times_as_fast_as_loop": faster,
    }


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory_here(kind: str, method: str, sizes: Sizes) -> int:
    """The peak of three steps in bytes, beyond what the libraries take before there is a model."""
    new_step("whole", "plain", QUICK)()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = _bytes("VmRSS")
    step = new_step(kind, method, sizes)
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else _bytes("VmHWM") - before


def memory_of(kind: str, method: str, quick: bool) -> int:
    """The same in a process of its own, whose peak is no other's."""
    command = [sys.executable, __file__, "--one", kind, method, *(["--quick"] if quick else [])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _bytes(name: str) -> int:
    """What the kernel says of this process; its getrusage would also count the process that started this one."""
    [kilobytes] = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


# ---- all of it -------------------------------------------------------------------------------------------------------


def measure(quick: bool) -> dict[str, Any]:
    sizes, rounds = (QUICK, 2) if quick else (SIZES, ROUNDS)
    result: dict[str, Any] = {"sizes": sizes, "device": DEVICE.type, "dtype": "float32", "threads": THREADS}
    for kind in KINDS:
        parameters = [p for p in new_model(kind, sizes).parameters() if p.requires_grad]
        result[kind] = {
            "trained_parameters": sum(p.numel() for p in parameters),
            **time_all(kind, sizes, rounds),
            "peak_bytes": {method: memory_of(kind, method, quick) for method in METHODS},
        }
    return {**result, "gem_fast": gem_fast.build_info()}


def show(result: dict[str, Any]) -> None:
    """Prints a table per kind of model."""
    for kind in KINDS:
        seconds, faster, peaks = (result[kind][key] for key in ("seconds", "times_as_fast_as_loop", "peak_bytes"))
        title = "LoRA" if kind == "lora" else "whole model"
        print(f"\n| {title}: step | ms | x plain | times as fast as the loop | peak MB | x all at once |")
        print("|---" * 6 + "|")
        for method in METHODS:
            print(
                f"| {method} | {seconds[method] * 1e3:.0f} | {seconds[method] / seconds['plain']:.1f} "
                f"| {faster[method]:.2f} | {peaks[method] / MEGABYTE:.0f} "
                f"| {peaks[method] / peaks['all at once']:.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the tables of results/transformers.json again")
    parser.add_argument("--quick", action="store_true", help="a tiny model, and nothing is written")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "METHOD"), help="print the peak bytes of one method")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.one:
        print(memory_here(*options.one, QUICK if options.quick else SIZES))
    elif options.print:
        show(json.loads(RESULTS.read_text()))
    else:
        result = measure(options.quick)
        if not options.quick:
            RESULTS.write_text(json.dumps(result, indent=2) + "\n")
        show(result)


if __name__ == "__main__":
    main()
