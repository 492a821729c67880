"""``python -m fusedamp repro`` at small size: training, stalled values, claims."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("rich", reason='the experiments need pip install "fusedamp[demo]"')
pytest.importorskip("matplotlib", reason='the experiments need pip install "fusedamp[demo]"')

import torch
from fusedamp import optim
from fusedamp.commands import cli
from fusedamp.commands.repro import options as repro_options
from fusedamp.commands.repro.compressed import compressed
from fusedamp.commands.repro.experiment import Result, Setup, Text, setups, train
from fusedamp.commands.repro.options import Options
from fusedamp.commands.repro.report import Sweep, stall_findings
from fusedamp.commands.repro.run import run
from fusedamp.commands.repro.stalls import Stall, stalls

TINY = Options(steps=12, batch=64, width=16, factors=(0, -14), stall_steps=200)


@pytest.fixture(scope="module")
def text():
    return Text()


@pytest.fixture(scope="module")
def stopped():
    return list(stalls(5000))


def test_text_is_split_and_drawn_by_seed(text):
    """Guards the comparison: the same batches for all runs, none of them from the held-out part."""
    one, other = text.batch(3, 5, 32), text.batch(3, 5, 32)
    assert all(map(torch.equal, one, other))
    assert not torch.equal(one[0], text.batch(4, 5, 32)[0])
    assert one[0].shape == (32, 12)
    assert len(text.learn) > 100_000
    assert text.held_out[0].shape == (4096, 12)


def test_runs_differ_in_what_their_names_say(text):
    """Guards the sweep: FP16 weights with masters, the loss multiplied by the factor, nothing else."""
    sweep, weights = setups(TINY)
    orders = ["FP32", "FP32, batches 2", "FP32, batches 3"]
    results = {setup.name: train(setup, text, TINY, lambda: None) for setup in sweep}
    assert [s.name for s in sweep] == [*orders, "FP16, factor 2^0", "FP16, factor 2^-14"]
    first = {name: result.curve[0][1] for name, result in results.items()}
    assert len({first[name] for name in orders}) == 3
    assert first["FP32"] == pytest.approx(first["FP16, factor 2^0"], abs=1e-2)
    assert first["FP16, factor 2^0"] == first["FP16, factor 2^-14"]
    assert results["FP32"].held_out == pytest.approx(results["FP16, factor 2^0"].held_out, abs=1e-2)
    assert results["FP16, factor 2^-14"].vanished > results["FP16, factor 2^0"].vanished
    assert {s.options.get("master_weights") for s in weights} == {None, "fp32", "split", "none"}
    assert {s.dtype for s in weights} == {"fp32", "fp16", "bf16"}


def test_small_factors_lose_their_gradients(text):
    """Guards the experiment's point on a short run: at 2^-14 most gradients are 0, at 1 almost none."""
    options = replace(TINY, batch=512)
    factors = {s.factor: train(s, text, options, lambda: None) for s in setups(options)[0][3:]}
    assert factors[0].vanished < 0.1
    assert factors[-14].vanished > 0.5


def test_every_mode_of_ours_arrives(stopped):
    """Guards the claims: each mode that keeps the missing bits ends where FP32 does."""
    findings = stall_findings(stopped)
    assert len(findings) >= 4
    assert all(finding.held for finding in findings), [f.text for f in findings if not f.held]


def test_compressed_modes_arrive():
    """Guards the claims of coarse formats: no drift of rounded weights, averages that fall, a flat error."""
    found = list(compressed(1000))
    assert len({stall.story for stall in found}) == 3
    assert all(stall.ours and stall.arrived for stall in found), [s for s in found if not s.arrived]


def test_the_others_stop_where_they_are_known_to(stopped):
    """Guards what is shown of torch: weights that stay, an average at a quarter, a scale of 0."""
    got = {(s.story.split()[0], s.who): s.got for s in stopped}
    for dtype in ("FP16", "BF16"):
        assert got["1000", f"torch, fused, {dtype} weight"] == 1.0
        assert got["1000", f'fusedamp, {dtype} weight, master_weights="none"'] == 1.0
    assert got["second", "torch, fused, BF16 state"] == pytest.approx(0.25, abs=0.02)
    assert got["second", "torch, fused, FP32 state"] == pytest.approx(1 - 0.999**5000, abs=1e-3)
    assert got["loss", "torch: is it above 0?"] == 0.0


def result(name: str, held_out: float, **options) -> Result:
    factor, dtype = options.pop("factor", None), "fp32" if name.startswith("FP32") else "fp16"
    return Result(Setup(name, optim.SGD, options, dtype, factor), [(0, 5.0), (9, held_out)], held_out)


@pytest.mark.parametrize(
    ("run_", "claims", "held"),
    [
        (result("factor 1", 1.71, factor=0), "matches", True),
        (result("factor 1", 1.90, factor=0), "matches", False),
        (result("factor 1", float("nan"), factor=0), "matches", False),
        (result("too small", 5.0, factor=-12), "behind", True),
        (result("too small", float("nan"), factor=-12), "behind", True),
        (result("too small", 1.71, factor=-12), "behind", False),
        (result("between", 1.8, factor=-4), None, None),
        (result("masters", 1.69, master_weights="fp32"), "matches", True),
        (result("bare", 2.5, master_weights="none"), "behind", True),
        (result("bare", 1.70, master_weights="none"), "behind", False),
    ],
)
def test_findings(run_, claims, held):
    """Guards the verdicts: runs that match, runs that fall behind, and a report of claims that were not
    confirmed."""
    sweep = Sweep("", [result("FP32", 1.70), result("FP32, 2", 1.75), result("FP32, 3", 1.68), run_])
    findings = sweep.findings()
    if claims is None:
        assert not findings
    else:
        assert [finding.held for finding in findings] == [held]
        assert claims in findings[0].text
        assert ("does not show" in findings[0].text) == (not held)


def test_a_stall_of_ours_is_a_failed_claim():
    stall = Stall("story", "fusedamp", wanted=0.993, got=0.5, ours=True, tolerance=0.01)
    assert [finding.held for finding in stall_findings([stall])] == [False]
    assert not stall_findings([replace(stall, ours=False)])


def test_whole_run(tmp_path, capsys):
    """Runs all experiments: tables, findings, exit code; the plot is a PNG of readable size."""
    picture = tmp_path / "repro.png"
    code = run(replace(TINY, picture=picture))
    words = " ".join(capsys.readouterr().out.split())
    assert code in (0, 1)
    assert ("NO " in words) == (code == 1)
    for expected in (
        "Loss factors",
        "FP16, factor 2^-14",
        "BF16, no masters",
        "Stalled values",
        "repro.png",
    ):
        assert expected in words
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") >= 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--threads", "0"], "--threads is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--out", "nowhere/x.png"], "no folder nowhere"),
        (["--out", "picture.jpg"], "the plot is a PNG"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(arguments, words, capsys, monkeypatch, tmp_path):
    """Exit code 2 and one line with valid values."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["repro", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fusedamp repro: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_missing_extras_are_named(capsys, monkeypatch):
    monkeypatch.setattr(repro_options, "EXTRAS", ("rich", "no_such_package"))
    assert cli.main(["repro"]) == 2
    assert 'need no_such_package, not installed here: pip install "fusedamp[demo]"' in capsys.readouterr().err
