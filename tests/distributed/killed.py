"""Run by torchrun: trains with a checkpoint; rank 1 is killed once, and the restarted job goes on from there."""

import os
import signal
import sys
from pathlib import Path

import test_rank_states
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from utils.ranks_training import ddp, parameters_of


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    checkpoint, killed = folder / "checkpoint", folder / "killed"
    restarted = killed.exists()
    model, optimizer, gem = test_rank_states.start(ddp)
    states = {"gem": gem}
    if restarted:
        states["model"], states["optimizer"] = get_state_dict(model, optimizer)
        dcp.load(states, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    else:
        test_rank_states.train(model, optimizer, gem, rank, range(13))
        states["model"], states["optimizer"] = get_state_dict(model, optimizer)
        dcp.save(states, checkpoint_id=checkpoint)
        test_rank_states.train(model, optimizer, gem, rank, range(13, 16))
        if rank == 1:
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    test_rank_states.train(model, optimizer, gem, rank, range(13 if restarted else 16, 20))
    torch.save(parameters_of(model), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
