"""Trains with master weights, optimizer states and the update on the host; the device keeps FP16 weights.

python examples/offload.py [--device cpu | cuda] [--steps N]
"""

import argparse

import fusedamp
import torch
from torch import nn
from torch.nn import functional as F

MICRO_BATCHES, ROWS, FEATURES, CLASSES = 4, 32, 64, 10


def batches(steps: int, device: str) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Make noisy copies of ten patterns, and their classes."""
    patterns = torch.randn(CLASSES, FEATURES, device=device)

    def micro_batch() -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(CLASSES, (ROWS,), device=device)
        return patterns[y] + 2 * torch.randn(ROWS, FEATURES, device=device), y

    return [[micro_batch() for _ in range(MICRO_BATCHES)] for _ in range(steps)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no GPU; use --device cpu")
    device = options.device
    torch.manual_seed(0)

    model = (
        nn.Sequential(nn.Linear(FEATURES, 256), nn.GELU("tanh"), nn.Linear(256, CLASSES)).half().to(device)
    )
    optimizer = fusedamp.optim.Offloaded(
        fusedamp.optim.AdamW,  # any optimizer of fusedamp, with its own arguments
        model.parameters(),
        lr=2e-3,
        master_weights="split",
        state_dtype=torch.bfloat16,
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, options.steps)
    scaler = fusedamp.GradScaler(device, init_scale=2.0**12)

    for step, micro_batches in enumerate(batches(options.steps, device)):
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for index, (x, y) in enumerate(micro_batches):
            loss = F.cross_entropy(model(x.half()).float(), y) / MICRO_BATCHES
            # Only the last backward pass copies gradients to the host, while it runs.
            with optimizer.last_micro_batch(index == MICRO_BATCHES - 1):
                scaler.scale(loss).backward()
            total += loss.detach()
        scaler.clip_grad_norm_(optimizer, 1.0)  # on the device, without writing gradients
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step:3}  loss {total.item():.4f}")

    row = fusedamp.estimate(model, optimizer).rows[0]
    count = sum(p.numel() for p in model.parameters())
    print(f"Bytes per parameter: {row.device / count:.1f} on the device, {row.host / count:.1f} on the host.")


if __name__ == "__main__":
    main()
