"""Processes that are ranks of one world, for tests of what happens among several."""

import os
import traceback
from datetime import timedelta

import torch

_kept = []


def run_scenarios(scenarios, rank, world, folder):
    """One rank: every scenario (name to call) in a separate process group; failures are recorded.

    Groups are kept and the process ends without tearing them down: gloo sometimes aborts where it does (its
    thread may drop the last reference to itself).
    """
    torch.set_num_threads(1)
    for name, call in scenarios.items():
        torch.distributed.init_process_group(
            "gloo", f"file://{folder / name}", timedelta(seconds=60), rank=rank, world_size=world
        )
        try:
            call()
        except Exception:
            (folder / f"{name}.failed on {rank}").write_text(traceback.format_exc())
        _kept.extend(torch.distributed.distributed_c10d._world.pg_map)
        torch.distributed.destroy_process_group()
    os._exit(0)
