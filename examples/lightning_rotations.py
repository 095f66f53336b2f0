"""Lightning learns rotated digits, one task per epoch, with and without GEM.

pip install 'gem_fast[lightning,demo]'; python examples/lightning_rotations.py
"""

import argparse

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from digits import accuracies, draw, network, rotations
from torch.utils.data import DataLoader, TensorDataset

import gem_fast
from gem_fast.integrations.lightning import GEMCheckpoint


class Rotations(pl.LightningModule):
    """Epoch number k has the digits of task k."""

    def __init__(self, tasks, use_gem):
        super().__init__()
        self.net, self.tasks, self.use_gem = network(), tasks, use_gem
        self.R = []

    def forward(self, x):
        return self.net(x)

    def train_dataloader(self):
        x, y, _, _ = self.tasks[self.current_epoch]
        return DataLoader(TensorDataset(x, y), batch_size=10, shuffle=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        if self.use_gem:
            self.gem = gem_fast.GEM(self, optimizer, memory=gem_fast.EpisodicMemory(per_task=128))
        return optimizer

    def training_step(self, batch, i):
        x, y = batch
        if self.use_gem:
            self.gem.observe(x, y, self.current_epoch)
        return F.cross_entropy(self(x), y)

    def on_train_epoch_end(self):
        self.R.append(accuracies(self.net, self.tasks))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--train", type=int, default=1000, help="training digits of each task")
    parser.add_argument("--out", default="lightning_rotations.png")
    options = parser.parse_args()
    tasks, results = rotations(options.tasks, options.train), {}
    for name, use_gem in (("plain", False), ("GEM", True)):
        module = Rotations(tasks, use_gem)
        trainer = pl.Trainer(
            max_epochs=options.tasks,
            reload_dataloaders_every_n_epochs=1,
            callbacks=[GEMCheckpoint()] if use_gem else [],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module)
        results[name] = module.R
        print(f"{name}: {sum(module.R[-1]) / options.tasks:.3f} of the test digits of all tasks at the end")
    draw(results, options.out)


if __name__ == "__main__":
    main()
