"""Trains a sharded BF16 net under torchrun, with a checkpoint per step; rank 1 may be killed once.

torchrun --nproc-per-node 2 --max-restarts 1 elastic_run.py FOLDER STEPS [STEP AT WHICH RANK 1 IS KILLED]
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fusedamp import GradScaler, optim
from sharded_net import network, sharded
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def main(folder, steps, killed_at=None):
    torch.set_num_threads(1)
    rank, world, life = (int(os.environ[k]) for k in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"))
    # With torchrun's own store, gloo connects to addresses of the first life.
    dist.init_process_group("gloo", f"file://{folder}/store of life {life}", rank=rank, world_size=world)
    net = sharded()
    optimizer = optim.AdamW(
        net.parameters(), lr=0.1, master_weights="split", state_dtype="bfloat16", rounding_seed=3
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    def state(done):
        model, states = get_state_dict(net, optimizer)
        others = {"schedule": schedule.state_dict(), "scaler": scaler.state_dict(), "done": done}
        return {"model": model, "optimizer": states, **others}

    done = 0
    if saved := sorted(Path(folder).glob("*/.metadata")):  # written last: the checkpoint is complete
        loaded = state(done)
        dcp.load(loaded, checkpoint_id=saved[-1].parent)
        set_state_dict(net, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        schedule.load_state_dict(loaded["schedule"])
        scaler.load_state_dict(loaded["scaler"])
        done = loaded["done"]
    for step in range(done, steps):
        if life == 0 and step == killed_at and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank))
        loss = net(x.bfloat16()).float().square().sum()
        scaler.scale(loss * (float("inf") if step == 2 else 1.0)).backward()  # one step is skipped
        scaler.clip_grad_norm_(optimizer, 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        dcp.save(state(step + 1), checkpoint_id=Path(folder) / f"{step + 1:03}")
        dist.barrier()
    whole = network()
    whole.load_state_dict({name: p.full_tensor() for name, p in net.state_dict().items()})
    everything = {"model": whole.state_dict(), "scaler": scaler.state_dict()}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            everything[f"{index}.{key}"] = value.full_tensor() if hasattr(value, "full_tensor") else value
    if rank == 0:
        torch.save(everything | {"life": life}, Path(folder) / "end.pt")
    dist.barrier()
    os._exit(0)  # gloo sometimes aborts where a group is torn down


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
