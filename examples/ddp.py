"""Trains one model on several devices (DistributedDataParallel), with two micro-batches per step.

torchrun --nproc-per-node 2 examples/ddp.py [--steps N] [--device cpu | cuda]
"""

import argparse
import contextlib
import os

import fusedamp
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

MICRO_BATCHES = 2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a rank's micro-batch of a step: rows, and the means of their squares."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1000 * step + rank))
    return x, x.square().mean(1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    model = DistributedDataParallel(net().to(device))
    optimizer = fusedamp.optim.AdamW(model.parameters(), lr=1e-2)
    # All ranks see the same reduced gradients, so they skip the same steps. The group guards against replicas
    # that differ all the same; it costs one reduction of 4 bytes.
    scaler = fusedamp.GradScaler(device.type, process_group=dist.group.WORLD)

    loss = torch.tensor(0.0)
    for step in range(options.steps):
        optimizer.zero_grad()
        for part in range(MICRO_BATCHES):
            x, y = (tensor.to(device) for tensor in batch(MICRO_BATCHES * step + part, rank))
            last = part == MICRO_BATCHES - 1  # gradients are reduced once per step
            with contextlib.nullcontext() if last else model.no_sync():
                with torch.autocast(device.type, torch.float16):
                    loss = (model(x).float() - y).square().mean() / MICRO_BATCHES
                scaler.scale(loss).backward()
        scaler.clip_grad_norm_(optimizer, 1.0)
        scaler.step(optimizer)
        scaler.update()

    everyone = [None] * world
    dist.all_gather_object(everyone, [p.tolist() for p in model.parameters()])
    assert all(weights == everyone[0] for weights in everyone), "ranks hold different weights"
    if rank == 0:
        print(f"step {options.steps}  loss {MICRO_BATCHES * loss.item():.4f}  ranks {world}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
