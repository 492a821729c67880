"""Trains with FP16 weights on one device: loss scale, clipping, schedule, and resume with the same bits.

python examples/single_gpu.py [--steps N] [--device cpu | cuda] [--checkpoint FILE]
"""

import argparse
import os

import fusedamp
import torch
from torch import nn


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the batch of a step: rows, and the means of their squares."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
    return x, x.square().mean(1, keepdim=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", help="resume from this file if it exists, and write it at the end")
    options = parser.parse_args(arguments)

    model = net().to(options.device, torch.float16)
    # Each optimizer keeps FP32 master weights of FP16 parameters, and saves them.
    optimizer = fusedamp.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    scaler = fusedamp.GradScaler(options.device)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}

    done = 0
    if options.checkpoint and os.path.exists(options.checkpoint):
        saved = torch.load(options.checkpoint, map_location=options.device, weights_only=True)
        done = saved.pop("done")
        for name, state in saved.items():
            parts[name].load_state_dict(state)

    loss = torch.tensor(0.0)
    for step in range(done, options.steps):
        x, y = (tensor.to(options.device) for tensor in batch(step))
        optimizer.zero_grad()
        loss = (model(x.half()).float() - y).square().mean()
        scaler.scale(loss).backward()
        scaler.clip_grad_norm_(optimizer, 1.0)  # the step clips; nothing waits for the device
        scaler.step(optimizer)  # does nothing if a gradient is inf or NaN
        scaler.update()
        schedule.step()

    if options.checkpoint:
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"done": options.steps, **state}, options.checkpoint)
    print(f"step {options.steps}  loss {loss.item():.4f}  scale {scaler.get_scale():.0f}")


if __name__ == "__main__":
    main()
