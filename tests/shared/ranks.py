"""Processes that are ranks of one world, for tests of what happens among several."""

import glob
import os
import tempfile
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

needs_gloo = [
    pytest.mark.host,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="needs torch.distributed with gloo",
    ),
]
_kept = []


def rank():
    return torch.distributed.get_rank()


def agreed(value):
    """``value`` if all ranks have an equal one, else an error on each rank."""
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, value)
    assert all(v == everyone[0] for v in everyone), everyone
    return value


def run_scenarios(scenarios, index, world, folder):
    """One rank: every scenario (name to call) in a separate process group; failures are recorded.

    Groups are kept and the process ends without tearing them down: gloo sometimes aborts where it does (its
    thread may drop the last reference to itself).
    """
    torch.set_num_threads(1)
    for name, call in scenarios.items():
        _join(folder / name, index, world)
        try:
            call()
            (folder / f"{name}.done on {index}").touch()
        except BaseException:  # a CheckpointException of torch is not an Exception
            (folder / f"{name}.failed on {index}").write_text(traceback.format_exc())
        _leave()
    os._exit(0)


def _leave():
    _kept.extend(torch.distributed.distributed_c10d._world.pg_map)
    torch.distributed.destroy_process_group()


def _join(path, index, world):
    torch.distributed.init_process_group(
        "gloo", f"file://{path}", timedelta(seconds=60), rank=index, world_size=world
    )


@contextmanager
def resized(size):
    """Make the first ``size`` ranks a world of their own inside the block; yields whether this is one."""
    index, world = rank(), torch.distributed.get_world_size()
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    _leave()
    if index < size:
        _join(f"{folder[0]}/smaller", index, size)
    try:
        yield index < size
    finally:
        if index < size:
            _leave()
        _join(f"{folder[0]}/again", index, world)


def _rank(index, scenarios, world, folder):
    run_scenarios(scenarios, index, world, folder)


def spawned(scenarios):
    """Return a fixture and a test that run ``scenarios`` (world size to name to call), one spawn per size.

    Calls are module-level functions or partials of them. More than 2 ranks are slow. Assign the results to
    ``ranks`` and to a name that starts with ``test``.
    """

    @pytest.fixture(scope="module")
    def ranks(tmp_path_factory):
        folders = {}

        def run(world):
            if world not in folders:
                folders[world] = Path(tmp_path_factory.mktemp(f"ranks{world}"))
                mp.spawn(_rank, (scenarios[world], world, folders[world]), nprocs=world)
            return folders[world]

        return run

    cases = [
        pytest.param(world, name, marks=[pytest.mark.slow] if world > 2 else [])
        for world, calls in scenarios.items()
        for name in calls
    ]

    @pytest.mark.parametrize(("world", "name"), cases)
    def test(ranks, world, name):
        folder = ranks(world)
        failures = [path.read_text() for path in sorted(folder.glob(f"{glob.escape(name)}.failed on *"))]
        assert not failures, "\n".join(failures)
        assert len(list(folder.glob(f"{glob.escape(name)}.done on *"))) == world

    return ranks, test
