"""A script that Lightning itself starts again for its second process: python lightning_launched.py FOLDER."""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from gem_fast.integrations.lightning import GEMCheckpoint
from utils.lightning_training import How, Module, loader, trainer, weights


class InParts(Module):
    """Its loader needs the process group, which Lightning makes."""

    def train_dataloader(self) -> DataLoader:
        return loader(ranks=2)


def main(folder: Path) -> None:
    """Trains, and each process leaves its weights."""
    module = InParts(How(), per_task=8)
    training = trainer(strategy="ddp", devices=2, use_distributed_sampler=False, callbacks=[GEMCheckpoint()])
    training.fit(module)
    found = {"weights": weights(module), "violations": module.violations}
    torch.save(found, folder / f"rank{training.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
