"""A compressed step needs no temporary memory: no FP32 copies of states, masters or gradients."""

import ctypes
import gc
from pathlib import Path

import pytest
import torch
from fusedamp import optim

NUMEL = 2**23  # an FP32 copy is 32 MiB
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MODES = [
    dict(master_weights="fp32", state_dtype=torch.float32),
    dict(master_weights="split", state_dtype=torch.bfloat16),
    dict(master_weights="split", state_dtype="int8"),
    dict(master_weights="none", state_dtype="int8", stochastic_rounding=True),
]


def resident_bytes(name: str) -> int:
    """VmRSS is what the process holds now, VmHWM the most that it held since `RESET` was written to."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def peak_growth(action) -> int:
    """By how many bytes the process was larger at its largest while ``action`` ran than before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before, and is still resident, would hide a copy
    RESET.write_text("5")
    before = resident_bytes("VmRSS")
    action()
    return resident_bytes("VmHWM") - before


@pytest.fixture(autouse=True)
def _measurable():
    try:
        RESET.write_text("5")
    except OSError as error:
        pytest.skip(f"the peak of resident memory cannot be reset here: {error}")


def test_copies_are_seen():
    """Guards the measurement: a temporary copy that is gone afterwards counts."""
    state = torch.ones(NUMEL, dtype=torch.bfloat16)
    grown = peak_growth(lambda: state.float().add_(1).bfloat16())
    assert grown >= 0.9 * 4 * NUMEL  # a few pages of it may have been resident before


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: " ".join(map(str, mode.values())))
@pytest.mark.parametrize("make", [optim.AdamW, optim.Lion, optim.LAMB], ids=lambda make: make.__name__)
def test_a_step_makes_no_copies(make, mode):
    """Guards peak memory, which states that are widened into FP32 lists raise: less than 2 % of one copy."""
    for numel in (2**18, NUMEL):  # the first loads code and starts threads
        param = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16))
        param.grad = torch.ones_like(param)
        optimizer = make([param], **mode)
        optimizer.step()  # which makes the states
        grown = [peak_growth(optimizer.step) for _ in range(3)]  # checked, remembered, replayed
    assert max(grown) < 4 * NUMEL // 50


QUANTIZED = {"master_weights": "none", "state_dtype": "int8"}


@pytest.mark.parametrize("make", [optim.AdamW, optim.Adagrad], ids=lambda make: make.__name__)
def test_a_first_step_makes_8_bit_states_as_such(make):
    """Guards the largest tensor of a model: temporary FP32 states would be 8 times as large; less than 1 byte
    per element in addition to the states.
    """

    def first(numel):
        param = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16))
        param.grad = torch.ones_like(param)
        make([param], **QUANTIZED).step()

    first(2**18)
    states = 2 if make is optim.AdamW else 1
    param_and_grad = 4 * NUMEL
    assert peak_growth(lambda: first(NUMEL)) < param_and_grad + states * NUMEL * 33 / 32 + 0.9 * NUMEL


@pytest.mark.parametrize("target", ["int8", "float32"])
def test_loading_quantizes_piece_by_piece(target):
    """FP32 states into 8 bits, and back: less than 1 byte per element in addition to the result."""
    source, other = {"int8": ("float32", "int8"), "float32": ("int8", "float32")}[target]
    saved = {}
    for numel in (2**18, NUMEL):
        param = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16))
        param.grad = torch.ones_like(param)
        optimizer = optim.AdamW([param], **(QUANTIZED | {"state_dtype": source}))
        optimizer.step()
        saved = optimizer.state_dict()
        taker = optim.AdamW([param], **(QUANTIZED | {"state_dtype": other}))
        grown = peak_growth(lambda taker=taker, saved=saved: taker.load_state_dict(saved))
    made = 2 * NUMEL * (33 / 32 if target == "int8" else 4)
    assert grown < made + 0.9 * NUMEL
