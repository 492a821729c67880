"""Placement of states in memory: guards a step's speed, which no result shows."""

import gc
import itertools
import re
from pathlib import Path

import pytest
import torch
from fusedamp import optim
from fusedamp.optim.state.encoded import plain
from fusedamp.tensors.layout import round_robin

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_makers_take_turns():
    """The same states of neighbors are made one after the other, however many states each has."""
    made = []

    def maker(name, kinds):
        for kind in kinds:
            made.append(name + kind)
            yield

    round_robin([maker("a", "xyz"), maker("b", "x"), maker("c", "xy")])
    assert made == ["ax", "bx", "cx", "ay", "cy", "az"]


@pytest.mark.parametrize("source", ["step", "checkpoint"])
def test_states_of_one_kind_are_made_together(source, monkeypatch):
    """Both for states created by a first step and for states from a checkpoint."""
    params = [torch.nn.Parameter(torch.randn(300).bfloat16()) for _ in range(4)]
    optimizer = optim.AdamW(params)
    for param in params:
        param.grad = torch.randn(300).bfloat16()
    order = []
    original = torch.empty_like

    def watched(tensor, **options):
        new = original(tensor, **options)
        if new.device.type == "cpu" and new.numel() == 300:
            order.append(new.data_ptr())
        return new

    if source == "checkpoint":
        optimizer.step()
        saved = optimizer.state_dict()
        monkeypatch.setattr(torch, "empty_like", watched)
        optimizer.load_state_dict(saved)
    else:
        monkeypatch.setattr(torch, "empty_like", watched)
        optimizer.step()
    kinds = {
        optimizer.state[param][name].data_ptr(): name
        for param in params
        for name in ("exp_avg", "exp_avg_sq", "master")
    }
    made = [kinds[address] for address in order if address in kinds]
    runs = [(name, len(list(run))) for name, run in itertools.groupby(made)]
    assert sorted(runs) == [("exp_avg", 4), ("exp_avg_sq", 4), ("master", 4)]


@pytest.mark.skipif(not PAGES.exists(), reason="no transparent huge pages in this kernel")
@pytest.mark.parametrize(
    "options", [{}, {"state_dtype": "int8", "master_weights": "split"}], ids=["fp32", "compressed"]
)
def test_large_states_ask_for_huge_pages(options):
    """Linux marks memory for which they were asked with "hg"."""
    param = torch.nn.Parameter(torch.zeros(9 << 20, dtype=torch.bfloat16))
    param.grad = torch.zeros_like(param)
    optimizer = optim.AdamW([param], **options)
    optimizer.step()
    gc.collect()
    advised = []
    for area in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M):
        if re.search(r"^VmFlags:.* hg", area, flags=re.M):
            first, last = area.split()[0].split("-")
            advised.append(range(int(first, 16), int(last, 16)))
    for name in ("exp_avg", "exp_avg_sq", "master"):
        state = plain(optimizer.state[param][name])
        middle = state.data_ptr() + state.nbytes // 2
        assert any(middle in area for area in advised), name
