"""Trains BF16 weights that are sharded over several devices (FSDP2), and resumes on any number of them.

torchrun --nproc-per-node 4 examples/fsdp2.py [--steps N] [--device cpu | cuda] [--checkpoint FOLDER]
"""

import argparse
import os

import fusedamp
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a rank's batch of a step: rows, and the means of their squares."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1000 * step + rank))
    return x, x.square().mean(1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", help="resume from this folder if it exists, and write it at the end")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")  # async_save uses gloo

    model = net().to(device, torch.bfloat16)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    # 10 bytes per parameter, with its gradient: BF16 weights, and 16 bits more that make them FP32 masters.
    storage = {"master_weights": "split", "state_dtype": "bfloat16"}
    optimizer = fusedamp.optim.AdamW(model.parameters(), lr=1e-2, **storage)

    def state() -> dict:
        weights, states = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": states, "done": torch.tensor(done)}

    done, loss = 0, torch.tensor(0.0)
    if options.checkpoint and os.path.exists(options.checkpoint):
        saved = state()
        dcp.load(saved, checkpoint_id=options.checkpoint)  # each rank reads its part, on any number of ranks
        weights, states = saved["model"], saved["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
        done = int(saved["done"])
    while done < options.steps:
        x, y = (tensor.to(device) for tensor in batch(done, dist.get_rank()))
        optimizer.zero_grad()
        loss = (model(x.bfloat16()).float() - y).square().mean()
        loss.backward()
        fusedamp.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done += 1
    if options.checkpoint:  # in a longer run, call it every so often: training may go on until the result
        dcp.async_save(state(), checkpoint_id=options.checkpoint).result()

    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [p.full_tensor().tolist() for p in model.parameters()])
    assert all(weights == everyone[0] for weights in everyone), "ranks hold different weights"
    if dist.get_rank() == 0:
        print(f"step {options.steps}  loss {loss.item():.4f}  ranks {len(everyone)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
