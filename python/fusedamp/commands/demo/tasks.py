"""The two tasks: locally available real data, pre-training and fine-tuning."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fusedamp.commands.demo.models import GPT, ConvNet
from fusedamp.commands.demo.options import DemoError

Batch = tuple[Tensor, Tensor]  # inputs, class of each position or image
CONTEXT = 64
CODE_BYTES = 1_000_000


@dataclass(frozen=True)
class Task:
    """A task; ``pretrain(seed, step)`` and ``finetune(seed, step)`` return a step's batch
    deterministically."""

    name: str
    story: str
    make_model: Callable[[], nn.Module]
    pretrain: Callable[[int, int], Batch]
    finetune: Callable[[int, int], Batch]
    held_out: Batch
    steps: int
    pretrain_steps: int = 150
    pretrain_lr: float = 2e-3


def gpt_task(data: Path | None) -> Task:
    """Build the GPT task: bytes, pre-trained on Python code, fine-tuned on English prose (or the user's
    file)."""
    code, prose = _standard_library_code(), data.read_bytes() if data else language_reference()
    source = data.name if data else "the Python language reference"
    learn, keep = split(as_bytes(prose))
    starts = torch.linspace(0, len(keep) - CONTEXT - 1, 64).long()
    code_bytes = as_bytes(code)
    return Task(
        name="gpt",
        story=f"GPT on bytes, pre-trained on the standard library's code, fine-tuned on {source}",
        make_model=lambda: GPT(context=CONTEXT),
        pretrain=lambda seed, step: _windows(code_bytes, draw(seed, step, len(code) - CONTEXT - 1, 16)),
        finetune=lambda seed, step: _windows(learn, draw(seed, step, len(learn) - CONTEXT - 1, 16)),
        held_out=_windows(keep, starts),
        steps=120,
    )


def digits_task() -> Task:
    """Build the conv net task: scikit-learn's handwritten digits, pre-trained upright, fine-tuned
    mirrored."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels, mirrored = torch.tensor(digits.target), images.flip(-1)
    learn = len(images) * 3 // 4  # ordered by writer: the held-out quarter has other writers

    def batch(pictures: Tensor, seed: int, step: int) -> Batch:
        index = draw(seed, step, learn, 64)
        return pictures[index], labels[index]

    return Task(
        name="digits",
        story="conv net on handwritten digits, pre-trained upright, fine-tuned mirrored",
        make_model=ConvNet,
        pretrain=lambda seed, step: batch(images, seed, step),
        finetune=lambda seed, step: batch(mirrored, seed, step),
        held_out=(mirrored[learn:], labels[learn:]),
        steps=480,
    )


def draw(seed: int, step: int, below: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(below, (count,), generator=generator)


def _windows(text: Tensor, starts: Tensor) -> Batch:
    spans = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return spans[:, :-1], spans[:, 1:]


def as_bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def split(text: Tensor) -> tuple[Tensor, Tensor]:
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def _standard_library_code() -> bytes:
    """Read the first megabyte of the standard library's public top-level modules, in order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    code = b"".join(file.read_bytes() for file in sorted(folder.glob("[a-z]*.py")))[:CODE_BYTES]
    if len(code) < CODE_BYTES:
        raise DemoError(
            f"{folder} holds {len(code)} bytes of Python sources; the GPT is pre-trained on {CODE_BYTES}"
        )
    return code


def language_reference() -> bytes:
    """Read Python's language reference as plain text, which ``help()`` prints on topics."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DemoError("this Python lacks pydoc_data; give a text of your own with --data FILE") from None
    return "\n".join(topics[name] for name in sorted(topics)).encode()
