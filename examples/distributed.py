"""Two processes learn rotated digits together, with and without GEM: each observes its own part of every mini-batch.

pip install 'gem_fast[demo]'; torchrun --nproc-per-node=2 examples/distributed.py
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import accuracies, draw, network, rotations
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import gem_fast


def learn(tasks, use_gem):
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if use_gem:
        memory = gem_fast.EpisodicMemory(per_task=128 // dist.get_world_size())  # of each process
        gem = gem_fast.GEM(model, optimizer, memory=memory)
    R = []
    for task, (train_x, train_y, _, _) in enumerate(tasks):
        data = TensorDataset(train_x, train_y)
        for x, y in DataLoader(data, 10 // dist.get_world_size(), sampler=DistributedSampler(data)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if use_gem:
                gem.observe(x, y, task)
            optimizer.step()
        R.append(accuracies(model.module, tasks))
    return R


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--train", type=int, default=1000, help="training digits of each task")
    parser.add_argument("--out", default="distributed.png")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    tasks, results = rotations(options.tasks, options.train), {}
    for name, use_gem in (("plain", False), ("GEM", True)):
        results[name] = learn(tasks, use_gem)
        if dist.get_rank() == 0:
            print(f"{name}: {sum(results[name][-1]) / options.tasks:.3f} of the test digits of all tasks at the end")
    if dist.get_rank() == 0:
        draw(results, options.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
