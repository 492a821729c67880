"""Trains BF16 weights with the Hugging Face Trainer, on one device or, started by torchrun, on several.

torchrun --nproc-per-node 2 examples/hf_trainer.py [--steps N] [--device cpu | cuda]
"""

import argparse
import tempfile

import fusedamp
import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer, TrainingArguments


class Model(nn.Module):
    """The Trainer wants the loss from the model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.net(x.to(self.net[0].weight.dtype))
        return {"loss": (output.float() - labels).square().mean(), "logits": output}


def data(rows: int = 64 * 200) -> list[dict[str, torch.Tensor]]:
    """Make rows, and the means of their squares."""
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "labels": row.square().mean(0, keepdim=True)} for row in x]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    # 8 bytes per parameter, with its gradient: BF16 weights, 16 bits more that make them FP32 masters, and
    # 8-bit states. For FP16, add `trainer.accelerator.scaler = fusedamp.GradScaler("cuda")`.
    storage = {"master_weights": "split", "state_dtype": "int8"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            Model().to(torch.bfloat16),
            TrainingArguments(
                folder,
                use_cpu=options.device == "cpu",
                max_steps=options.steps,
                per_device_train_batch_size=32,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=data(),
            # The Trainer makes the groups, and passes lr among these.
            optimizer_cls_and_kwargs=(fusedamp.optim.AdamW, {"lr": 1e-2, **storage}),
        )
        result = trainer.train()

    everyone = gather_object([[p.tolist() for p in trainer.model.parameters()]])
    assert all(weights == everyone[0] for weights in everyone), "ranks hold different weights"
    if trainer.is_world_process_zero():
        print(f"step {result.global_step}  loss {result.training_loss:.4f}  ranks {trainer.args.world_size}")


if __name__ == "__main__":
    main()
