"""Lightning: the plain hook is all that training needs, and the callback all that checkpoints need."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from utils.asserts import assert_same_bits
from utils.launched import run, script
from utils.lightning_training import How, Module, loader, new, plain, trainer, weights
from utils.ranks import Pool

import gem_fast
from gem_fast.integrations.lightning import GEMCheckpoint

# What Lightning says about its own use of torch, and about small data sets.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, None), (1, 0.5), (2, 0.5)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_same_bits_as_a_plain_loop(precision: str, accumulate: int, clip: float | None, manual: bool) -> None:
    how = How(precision, accumulate, clip, manual)
    module = Module(how)
    trainer(how).fit(module, loader())
    assert module.violations > 0
    assert_same_bits(weights(module), plain(how))


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("rule", [gem_fast.GEM, gem_fast.AGEM])
def test_the_hook_of_the_whole_module(rule: type[gem_fast.GEM], manual: bool) -> None:
    how = How(manual=manual, rule=rule)
    module = Module(how, hooked="self")
    trainer(how).fit(module, loader())
    assert module.violations > 0
    torch.testing.assert_close(weights(module), plain(how))


class TwoOptimizers(pl.LightningModule):
    """Body and head have an optimizer, and a hook, each; the memory is one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = new()
        self.automatic_optimization = False
        self.violations = 0

    def training_step(self, batch: list[torch.Tensor], i: int) -> None:
        x, y, task = batch
        self.of_body.observe(x, y, int(task[0]))
        self.of_head.current_task = int(task[0])
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(x), y))
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        for gem in (self.of_body, self.of_head):
            self.violations += gem.last is not None and bool(gem.last.violations.any())

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        body = torch.optim.SGD(self.net[0].parameters(), lr=0.1)
        head = torch.optim.Adam(self.net[2].parameters(), lr=0.01)
        memory = gem_fast.EpisodicMemory(per_task=8)
        self.of_body = gem_fast.GEM(self.net, body, memory=memory)
        self.of_head = gem_fast.GEM(self.net, head, memory=memory)
        return [body, head]


def test_several_optimizers() -> None:
    module = TwoOptimizers()
    trainer().fit(module, loader())
    assert module.violations > 5

    model = new()
    body = torch.optim.SGD(model[0].parameters(), lr=0.1)
    head = torch.optim.Adam(model[2].parameters(), lr=0.01)
    memory = gem_fast.EpisodicMemory(per_task=8)
    of_body = gem_fast.GEM(model, body, memory=memory)
    of_head = gem_fast.GEM(model, head, memory=memory)
    for x, y, task in loader():
        of_body.observe(x, y, int(task[0]))
        of_head.current_task = int(task[0])
        for optimizer in (body, head):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert_same_bits(weights(module), weights(model))


def test_a_memory_that_the_module_keeps_lasts_from_one_fit_to_the_next() -> None:
    class OneTask(Module):
        def __init__(self) -> None:
            super().__init__(How())
            self.memory = gem_fast.EpisodicMemory(per_task=8)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.gem = gem_fast.GEM(self.net, optimizer, memory=self.memory)
            return optimizer

    module = OneTask()
    for task in range(3):
        trainer().fit(module, loader(tasks=[task]))
    assert module.memory.tasks == [0, 1, 2]
    assert module.gem.past_tasks == [0, 1]
    assert module.violations > 0


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def interrupted(folder: Path, how: How, before: Module, after: Module, **options: object) -> None:
    """Trains for one epoch, and from its checkpoint, in another module, for a second one."""
    first = trainer(how, callbacks=[GEMCheckpoint()], default_root_dir=folder)
    first.fit(before, loader())
    first.save_checkpoint(folder / "one.ckpt")
    second = trainer(how, epochs=2, callbacks=[GEMCheckpoint()])
    second.fit(after, loader(), ckpt_path=folder / "one.ckpt", **options)


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("rule", [gem_fast.GEM, gem_fast.AGEM])
def test_a_checkpoint_goes_on_with_the_same_bits(
    tmp_path: Path, rule: type[gem_fast.GEM], precision: str, manual: bool
) -> None:
    how = How(precision, manual=manual, rule=rule)
    whole, resumed = Module(how), Module(how)
    trainer(how, epochs=2).fit(whole, loader())
    with torch.no_grad():
        resumed.net[0].bias += 1.0  # the checkpoint has other ones
    interrupted(tmp_path, how, Module(how), resumed, weights_only=True)
    assert resumed.violations > 0
    assert_same_bits(weights(resumed), weights(whole))


def test_each_hook_of_a_module_is_in_the_checkpoint(tmp_path: Path) -> None:
    whole, resumed = TwoOptimizers(), TwoOptimizers()
    trainer(epochs=2).fit(whole, loader())
    interrupted(tmp_path, How(), TwoOptimizers(), resumed)
    assert_same_bits(weights(resumed), weights(whole))


def test_the_callback_is_one_of_lightning_too(tmp_path: Path) -> None:
    """The package lightning has the same library under another name, and takes no callback of the other's class."""
    import lightning.pytorch

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }

    class OfLightning(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = new()

        def training_step(self, batch: list[torch.Tensor], i: int) -> torch.Tensor:
            x, y, task = batch
            self.gem.observe(x, y, int(task[0]))
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.gem = gem_fast.GEM(self.net, optimizer, memory=gem_fast.EpisodicMemory(per_task=8))
            return optimizer

    def trained(epochs: int, ckpt_path: Path | None = None) -> tuple[torch.Tensor, lightning.pytorch.Trainer]:
        module = OfLightning()
        training = lightning.pytorch.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[GEMCheckpoint()], **quiet)
        training.fit(module, loader(), ckpt_path=ckpt_path)
        return weights(module), training

    whole, _ = trained(2)
    _, training = trained(1)
    training.save_checkpoint(tmp_path / "one.ckpt")
    assert_same_bits(trained(2, tmp_path / "one.ckpt")[0], whole)


def test_other_hooks_than_the_checkpoints_are_an_error(tmp_path: Path) -> None:
    class Renamed(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = super().configure_optimizers()
            self.hook = self.__dict__.pop("gem")
            return optimizer

    with pytest.raises(RuntimeError, match=r"hooks must be the checkpoint's \['gem'\], got \['hook'\]"):
        interrupted(tmp_path, How(), Module(How()), Renamed(How()))


def test_a_module_without_a_hook_is_an_error() -> None:
    class Plain(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(RuntimeError, match=r"the LightningModule must have a hook, self\.gem = "):
        trainer(callbacks=[GEMCheckpoint()]).fit(Plain(How()), loader())


def test_a_checkpoint_without_a_state_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = trainer()
    first.fit(Module(How()), loader())
    first.save_checkpoint(tmp_path / "plain.ckpt")
    module = Module(How())
    with caplog.at_level(logging.WARNING, "gem_fast"):
        trainer(epochs=2, callbacks=[GEMCheckpoint()]).fit(module, loader(), ckpt_path=tmp_path / "plain.ckpt")
    assert [r.getMessage() for r in caplog.records if r.name == "gem_fast"] == [
        "the checkpoint has no state of a hook, so training goes on with the memory as it is"
    ]


def test_testing_from_a_checkpoint_leaves_no_state_for_the_next_training(tmp_path: Path) -> None:
    class Tested(Module):
        def test_step(self, batch: list[torch.Tensor], i: int) -> None:
            self(batch[0])

    first = trainer(callbacks=[GEMCheckpoint()])
    first.fit(Tested(How()), loader())
    first.save_checkpoint(tmp_path / "one.ckpt")
    both = trainer(callbacks=[GEMCheckpoint()])
    module = Tested(How())
    both.test(module, loader(), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    both.fit(module, loader(tasks=[0]))
    assert module.gem.memory.tasks == [0]


@pytest.fixture
def two() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.stop()


# ---- several processes -----------------------------------------------------------------------------------------------


def on_two(how: How, epochs: int = 1, ckpt_path: str | None = None) -> tuple[Module, pl.Trainer]:
    """Trained on this rank of two, whose process group is there already."""
    module = Module(how, per_task=8)
    options = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False, "callbacks": [GEMCheckpoint()]}
    training = trainer(how, epochs, **options)
    training.fit(module, loader(ranks=2), ckpt_path=ckpt_path)
    return module, training


def trained_on_two(rank: int, how: How, folder: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """After two epochs, and the same with a checkpoint between them."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, _ = on_two(how, epochs=2)
        _, training = on_two(how)
        training.save_checkpoint(f"{folder}/one.ckpt")
        again, _ = on_two(how, epochs=2, ckpt_path=f"{folder}/one.ckpt")
    return weights(whole), weights(again), whole.violations


@pytest.mark.parametrize("manual", [False, True])
def test_two_processes_are_one_on_the_union_of_their_memories(two: Pool, manual: bool, tmp_path: Path) -> None:
    how = How(manual=manual)
    results = two.run(trained_on_two, how, str(tmp_path))
    alone = Module(how, per_task=16)
    trainer(how, epochs=2).fit(alone, loader())
    for whole, again, violations in results:
        assert_same_bits(whole, results[0][0])
        assert_same_bits(whole, again)
        assert violations == alone.violations > 0
    torch.testing.assert_close(whole, weights(alone), rtol=1e-5, atol=1e-6)

    # What two processes saved, one takes up: its memory grows to that of both.
    resumed = Module(how, per_task=8)
    trainer(how, epochs=2, callbacks=[GEMCheckpoint()]).fit(resumed, loader(), ckpt_path=tmp_path / "one.ckpt")
    torch.testing.assert_close(weights(resumed), weights(alone), rtol=1e-5, atol=1e-6)


def test_the_processes_that_lightning_starts(tmp_path: Path) -> None:
    """With strategy="ddp" it runs the script once more; both together are one on the union of their memories."""
    run([sys.executable, script("lightning_launched"), str(tmp_path)])
    alone = Module(How(), per_task=16)
    trainer().fit(alone, loader())
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert_same_bits(first["weights"], second["weights"])
    assert first["violations"] == second["violations"] == alone.violations > 0
    torch.testing.assert_close(first["weights"], weights(alone), rtol=1e-5, atol=1e-6)
