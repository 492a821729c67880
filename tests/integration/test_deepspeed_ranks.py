"""DeepSpeed on 2 gloo ranks with our AdamW as client optimizer, without ZeRO and with its stage 1."""

import tempfile

import pytest
import torch
from fusedamp import optim
from ranks import rank, spawned
from torch import nn
from trainers import LR, STEPS, as_torchrun, close, equal, net, rows, weights

pytest.importorskip("deepspeed", reason="pip install deepspeed to run it")
pytestmark = [pytest.mark.integration, pytest.mark.host, pytest.mark.filterwarnings("ignore")]


def engine_of(cls, stage, half):
    import deepspeed

    as_torchrun()
    model = net()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # stage 1 knows torch's and its own
        "bf16": {"enabled": half},
    }
    optimizer = cls(model.parameters(), lr=LR)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine, first, last):
    x, y = rows(8 * STEPS)
    for step in range(first, last):
        mine = slice(8 * step + 4 * rank(), 8 * step + 4 * rank() + 4)
        loss = nn.functional.mse_loss(engine(x[mine].to(engine.module[0].weight.dtype)).float(), y[mine])
        engine.backward(loss)
        engine.step()
    return weights(engine.module)


def as_torch(stage, half):
    ends = [train(engine_of(cls, stage, half), 0, STEPS) for cls in (optim.AdamW, torch.optim.AdamW)]
    if half:  # FP32 masters of DeepSpeed's, a few bits apart, round to equal or neighboring BF16 weights
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b, rtol=2.0**-7, atol=1e-5)
    else:
        close(*ends)


def resumes(stage, half):
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    engine = engine_of(optim.AdamW, stage, half)
    train(engine, 0, 3)
    engine.save_checkpoint(folder[0])
    straight = train(engine, 3, STEPS)
    again = engine_of(optim.AdamW, stage, half)
    again.load_checkpoint(folder[0])
    equal(train(again, 3, STEPS), straight)


def every_stage():
    """In one process group, as DeepSpeed keeps groups that it has made."""
    for stage, half in ((0, False), (1, False), (1, True)):
        as_torch(stage, half)
        resumes(stage, half)


ranks, test_on_ranks = spawned({2: {"every stage": every_stage}})
