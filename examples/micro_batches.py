"""Trains with 8 micro-batches per step: FP32 weights, 16-bit products, gradients added up in FP32.

python examples/micro_batches.py [--dtype bf16 | fp16] [--device cpu | cuda] [--steps N]
"""

import argparse

import fusedamp
import torch
from torch import nn
from torch.nn import functional as F

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MICRO_BATCHES, ROWS, FEATURES, CLASSES = 8, 32, 64, 10


def batches(steps: int, device: str) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Make noisy copies of ten patterns, and their classes."""
    patterns = torch.randn(CLASSES, FEATURES, device=device)

    def micro_batch() -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(CLASSES, (ROWS,), device=device)
        return patterns[y] + 2 * torch.randn(ROWS, FEATURES, device=device), y

    return [[micro_batch() for _ in range(MICRO_BATCHES)] for _ in range(steps)]


def unrounded(model: nn.Module, dtype: torch.dtype) -> float:
    """Return the share of elements of the weight gradients that do not fit into 16 bits."""
    grads = [p.grad for p in model.parameters() if p.dim() == 2]
    return sum(int((g != g.to(dtype).float()).sum()) for g in grads) / sum(g.numel() for g in grads)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no GPU; use --device cpu")
    device, dtype = options.device, DTYPES[options.dtype]
    torch.manual_seed(0)

    model = nn.Sequential(nn.Linear(FEATURES, 256), nn.GELU("tanh"), nn.Linear(256, CLASSES)).to(device)
    model = fusedamp.nn.convert(model)  # every nn.Linear, in place; the same parameters and keys
    optimizer = fusedamp.optim.AdamW(model.parameters(), lr=2e-3)
    # FP16 needs a loss scale; BF16 does not, and a disabled scaler does nothing.
    scaler = fusedamp.GradScaler(device, enabled=dtype is torch.float16)

    share = 0.0
    for step, micro_batches in enumerate(batches(options.steps, device)):
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for index, (x, y) in enumerate(micro_batches):
            with torch.autocast(device, dtype):
                loss = F.cross_entropy(model(x).float(), y) / MICRO_BATCHES
            scaler.scale(loss).backward()  # the first makes .grad; the others add to it inside the product
            total += loss.detach()
            if step == index == 0:
                share = unrounded(model, dtype)
        scaler.clip_grad_norm_(optimizer, 1.0)
        scaler.step(optimizer)
        scaler.update()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step:3}  loss {total.item():.4f}")
    print(
        f"After one micro-batch {share:.0%} of the weight gradients' elements need more than 16 bits; "
        "with nn.Linear none do, because torch rounds them."
    )


if __name__ == "__main__":
    main()
