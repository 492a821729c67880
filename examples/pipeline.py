"""Trains FP16 weights as a pipeline: each rank holds other layers, and only the last one has the loss.

torchrun --nproc-per-node 2 examples/pipeline.py [--steps N] [--device cpu | cuda]
"""

import argparse
import os

import fusedamp
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

MICRO_BATCHES = 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the batch of a step: rows, and the means of their squares."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
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
    if world != 2:
        parser.error(f"the net has two stages; expected 2 ranks, got {world}")

    layers = net().to(device, torch.float16)
    model = layers[:2] if rank == 0 else layers[2:]
    optimizer = fusedamp.optim.AdamW(model.parameters(), lr=1e-2)
    # Without the group, a rank would skip by its own layers alone, and the stages would diverge.
    scaler = fusedamp.GradScaler(device.type, process_group=dist.group.WORLD)
    losses: list[torch.Tensor] = []

    def scaled(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return scaler.scale((output.float() - y).square().mean())

    stage = PipelineStage(model, rank, world, device)
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=scaled)
    scale = scaler.get_scale()
    for step in range(options.steps):
        x, y = (tensor.to(device) for tensor in batch(step))
        optimizer.zero_grad()
        losses.clear()
        scale = scaler.get_scale()
        if rank == 0:
            schedule.step(x.half())
        else:
            schedule.step(target=y, losses=losses)
        scaler.clip_grad_norm_(optimizer, 1.0, process_group=dist.group.WORLD)  # the norm over all stages
        scaler.step(optimizer)
        scaler.update()

    everyone = [None] * world
    dist.all_gather_object(everyone, [scaler.get_scale(), optimizer.state[next(model.parameters())]["step"]])
    assert everyone[0] == everyone[1], "stages took different steps"
    if losses:
        loss = torch.stack(losses).mean() / scale
        print(f"step {options.steps}  loss {loss.item():.4f}  ranks {world}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
