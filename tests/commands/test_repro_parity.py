"""``python -m fusedamp repro --parity`` in small: what is compared, what the table says, and the claims."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("rich", reason='the experiments need pip install "fusedamp[demo]"')
pytest.importorskip("matplotlib", reason='the experiments need pip install "fusedamp[demo]"')

import torch
from fusedamp.commands import cli
from fusedamp.commands.demo.models import GPT
from fusedamp.commands.demo.tasks import gpt_task
from fusedamp.commands.demo.train import EXTRA_ORDERS, Variant
from fusedamp.commands.repro import parity
from fusedamp.commands.repro.options import PARITY_STEPS, Options
from fusedamp.optim.state.formats import Storage
from rich.progress import Progress

SPLIT = Variant("fusedamp", "fp16", Storage(master_weights="split", state_dtype="int8"))
BARE = Variant("fusedamp", "bf16", Storage(master_weights="none", state_dtype="float32"))
RANDOM = Variant("fusedamp", "bf16", Storage(master_weights="none", stochastic_rounding=True))


@pytest.fixture(scope="module")
def tiny():
    """The demo's GPT, in small."""
    task = replace(gpt_task(None), make_model=lambda: GPT(width=16, depth=1, heads=1))
    return replace(task, pretrain_steps=4, steps=2)


@pytest.fixture(scope="module")
def compared(tiny):
    options = Options(steps=2, seeds=2)
    with Progress(disable=True) as progress:
        return parity.compare(tiny, options, progress)


def test_every_format_is_compared():
    """Guards the table: dtypes x masters x states, and weights rounded stochastically; each once."""
    modes = parity.modes()
    names = [mode.name for mode in modes]
    assert len(set(names)) == len(names) == 3 + 2 * 4 * 3
    assert {mode.storage.get("state_dtype") for mode in modes} == {"float32", "bfloat16", "int8"}
    assert SPLIT in modes
    assert BARE in modes
    for dtype in ("fp16", "bf16"):
        kept = {
            (m.storage["master_weights"], m.storage.get("stochastic_rounding"))
            for m in modes
            if m.dtype == dtype
        }
        assert kept == {("fp32", None), ("split", None), ("none", None), ("none", True)}


def test_each_mode_has_a_gap_for_each_seed(compared):
    """Guards the pairing: one figure per seed, seeds that differ, bytes as estimated."""
    modes, spreads = compared
    assert len(spreads) == 2
    assert all(spread > 0 for spread in spreads)
    assert spreads[0] != spreads[1]
    assert [mode.variant for mode in modes] == parity.modes()
    for mode in modes:
        assert len(mode.gaps) == len(mode.within) == 2
        assert mode.within == [abs(gap) <= spread for gap, spread in zip(mode.gaps, spreads, strict=True)]
    found = {mode.variant.name: mode for mode in modes}
    exact = found["FP32 fusedamp"]
    assert all(abs(gap) < 1e-5 for gap in exact.gaps)  # FP32 against FP32, after two steps
    assert all(exact.within)
    assert exact.bytes_per_param == pytest.approx(16, abs=0.1)
    assert found[SPLIT.name].bytes_per_param == pytest.approx(8.06, abs=0.1)
    assert found[SPLIT.name].gaps != exact.gaps


def mode(variant, gaps, within):
    return parity.Mode(variant, gaps, within, 8.0625)


@pytest.mark.parametrize(
    ("found", "held", "words"),
    [
        (mode(SPLIT, [0.001, -0.002], [True, True]), True, "8-bit states matches FP32 (mean gap -0.0005)"),
        (mode(SPLIT, [0.001, 0.1], [True, False]), False, 'does not show "matches FP32"'),
        (mode(SPLIT, [0.001, float("nan")], [True, False]), False, 'does not show "matches FP32"'),
        (mode(BARE, [0.1, 0.2], [False, False]), True, "no masters falls behind FP32 (mean gap +0.1500)"),
        (mode(BARE, [0.1, 0.001], [False, True]), False, 'does not show "falls behind FP32"'),
        (mode(BARE, [0.1, -0.2], [False, False]), False, 'does not show "falls behind FP32"'),
        (mode(BARE, [0.1, float("nan")], [False, False]), True, "falls behind FP32"),
    ],
    ids=range(7),
)
def test_findings(found, held, words):
    """Guards the verdicts: every seed counts, and better than FP32 is not behind it."""
    finding = found.finding()
    assert finding.held == held
    assert words in finding.text


def test_rows():
    row = mode(SPLIT, [0.00124, -0.002], [True, False]).row
    assert row == "| FP16, split masters, 8-bit states | 8.1 | -0.0004 | -0.0020 to +0.0012 | 1 of 2 |"
    assert mode(RANDOM, [0.0], [True]).row.startswith("| BF16, no masters, stochastic rounding | ")


def test_whole_run(tiny, tmp_path, monkeypatch, capsys):
    """Runs the command: one row per mode, a finding per claim, the exit code."""
    monkeypatch.setattr(parity, "gpt_task", lambda data: tiny)
    before = torch.get_num_threads()
    code = cli.main(
        ["repro", "--parity", "--seeds", "1", "--steps", "2", "--threads", "1", "--out", str(tmp_path)]
    )
    torch.set_num_threads(before)
    printed = capsys.readouterr().out
    words = " ".join(printed.split())
    assert code == int("NO " in words)
    assert code == 1  # after two steps weights without masters do not fall behind yet
    table = (tmp_path / "parity.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith(("| FP32", "| FP16", "| BF16"))]
    assert len(rows) == len(parity.modes())
    assert "2 steps, 1 seed;" in table
    assert f"over {EXTRA_ORDERS} other batch orders" in table
    claims = printed.count("yes ") + printed.count("NO  ")
    assert claims == sum(not m.storage.get("stochastic_rounding") for m in parity.modes())
    assert "parity.md" in words


def test_options(capsys, tmp_path):
    """Guards defaults and errors: fewer steps than the experiments', seeds from 1."""
    assert cli.main(["repro", "--parity", "--seeds", "0"]) == 2
    assert "--seeds is 0; it must be at least 1" in capsys.readouterr().err
    assert cli.main(["repro", "--parity", "--out", str(tmp_path / "no" / "x.png")]) == 2
    assert PARITY_STEPS == 120
