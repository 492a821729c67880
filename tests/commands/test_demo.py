"""The demo on small networks and few steps: what it trains, measures, shows and claims."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

pytest.importorskip("rich", reason='the demo needs pip install "fusedamp[demo]"')
pytest.importorskip("matplotlib", reason='the demo needs pip install "fusedamp[demo]"')
pytest.importorskip("sklearn", reason='the demo needs pip install "fusedamp[demo]"')

import fusedamp
import torch
import torch.nn.functional as F
from fusedamp.commands.demo.gradients import gradients_line, weight_gradient_error
from fusedamp.commands.demo.models import GPT, ConvNet, Linear, multiply
from fusedamp.commands.demo.options import DTYPES, DemoError, Options
from fusedamp.commands.demo.report import Outcome, table
from fusedamp.commands.demo.run import run_tasks
from fusedamp.commands.demo.tasks import digits_task, gpt_task
from fusedamp.commands.demo.train import (
    NO_MASTERS,
    REFERENCE,
    Run,
    Variant,
    finetune,
    lost_updates,
    pretrain,
    variants,
)
from fusedamp.energy import Arm, Comparison
from fusedamp.optim.state.formats import Storage
from rich.console import Console


@pytest.fixture(scope="module")
def gpt():
    """The GPT task, in small."""
    task = replace(gpt_task(None), make_model=lambda: GPT(width=16, depth=1, heads=1))
    return replace(task, pretrain_steps=8, steps=4)


@pytest.fixture(scope="module")
def digits():
    """The conv net of the demo; 48 steps are enough to part the curves."""
    return replace(digits_task(), pretrain_steps=40, steps=48)


@pytest.fixture(scope="module")
def outcome(digits):
    options = Options()
    return Outcome(digits, train(digits, options))


def train(task, options):
    *_, runs = finetune(task, pretrain(task, options, lambda: None), options)
    return runs


def run_named(outcome, name):
    return next(run for run in outcome.runs if run.variant.name == name)


def test_the_table_fits_a_terminal_of_80_columns(outcome):
    """Guards against figures cut off: each loss is there in full, in every row."""
    console = Console(width=80, record=True, quiet=False, file=io.StringIO())
    console.print(table(outcome))
    text = console.export_text()
    assert "…" not in text
    for run in outcome.runs:
        row = next(line for line in text.splitlines() if line.lstrip().startswith(run.variant.name + "  "))
        assert f" {run.held_out_loss:.4f} " in row
        assert f" {run.train_loss:.4f} " in row


def test_the_claim_shows_on_digits(outcome):
    """With masters 16 bits match FP32, without they fall behind: the demo's point, on a short run."""
    findings = outcome.findings()
    assert len(findings) == 5
    assert all(finding.held for finding in findings), [finding.text for finding in findings]
    bare = outcome.gap(run_named(outcome, "FP16 fusedamp, no masters"))
    assert bare > 10 * abs(outcome.gap(run_named(outcome, "FP16 fusedamp")))


def test_a_false_claim_is_called_false(outcome):
    """Masters that do not match, and missing masters that do no harm, are findings that did not hold."""
    swapped = [
        replace(r, variant=replace(r.variant, storage=NO_MASTERS if r.variant.masters else Storage()))
        for r in outcome.runs
    ]
    others = [r for r in swapped if r.variant.stack == "fusedamp" and r.variant.dtype != "fp32"]
    judged = Outcome(outcome.task, [outcome.reference, *others])
    judged.spread = outcome.spread
    findings = judged.findings()
    assert findings
    assert not any(finding.held for finding in findings)
    assert all("does not show" in finding.text for finding in findings)


def test_overflows_are_provoked_and_followed(outcome):
    """Scale 2**24 overflows on the digits; both scalers skip alike; no batch is left out."""
    ours, theirs = run_named(outcome, "FP16 fusedamp"), run_named(outcome, "FP16 torch AMP")
    assert len(ours.skipped) >= 3
    assert ours.scales[:4] == theirs.scales[:4] == [2.0**24, 2.0**23, 2.0**22, 2.0**21]
    for run in outcome.runs:
        assert len(run.losses) == outcome.task.steps
        assert len(run.scales) == outcome.task.steps + len(run.skipped)
        assert run.scaler.is_enabled() or not run.skipped


def test_bytes_are_those_of_real_tensors(outcome):
    """Weight, gradient, master and two states; the step counts of 8 tensors are the rest."""
    counts = {"FP32 torch": 16, "FP32 fusedamp": 16, "FP16 torch AMP": 16, "FP16 fusedamp": 2 + 2 + 4 + 8}
    counts |= {"BF16 fusedamp": 16, "BF16 fusedamp, no masters": 12, "FP16 fusedamp, no masters": 2 + 2 + 8}
    for name, expected in counts.items():
        assert run_named(outcome, name).bytes_per_param == pytest.approx(expected, abs=0.01)


def test_formats_and_optimizers(outcome):
    """The two stacks are what they say: FP32 weights and torch's classes, or 16-bit weights and ours."""
    for run in outcome.runs:
        weights = {p.dtype for p in run.model.parameters()}
        if run.variant.stack == "torch":
            assert weights == {torch.float32}
            assert type(run.scaler) is torch.amp.GradScaler
            assert type(run.optimizer) is torch.optim.AdamW
        else:
            assert weights == {DTYPES[run.variant.dtype]}
            assert type(run.scaler) is fusedamp.GradScaler
            assert type(run.optimizer) is fusedamp.optim.AdamW


def test_same_seed_same_curves(digits):
    """All randomness comes from the seed."""
    task, options = replace(digits, pretrain_steps=3, steps=2), Options(dtypes=("fp16",), seed=3)
    curves = []
    for _ in range(2):
        curves.append([run.losses for run in train(task, options)])
    assert curves[0] == curves[1]
    assert curves[0][0] != curves[0][-1]  # another order of the batches


def test_whole_run_on_the_gpt(gpt, tmp_path, capsys):
    """Runs the whole demo: table, findings, exit code; the plot is a PNG of readable size."""
    picture = tmp_path / "demo.png"
    options = Options(tasks=("gpt",), dtypes=("fp16",), picture=picture, steps=gpt.steps, numerics=True)
    code = run_tasks([gpt], options)
    text = capsys.readouterr().out
    assert code in (0, 1)
    assert (code == 1) == ("The claim did not hold" in text)
    for words in (
        "FP16 torch AMP",
        "FP16 fusedamp, no masters",
        "multiply in FP32",
        "Halfway",
        "fusedamp.nn.convert",
        "demo.png",
        "gpt: numerics of FP16 fusedamp",
        "worst first",
        "Updates lost without masters",
    ):
        assert words in " ".join(text.split())
    assert picture.with_name("numerics-gpt.png").read_bytes().startswith(b"\x89PNG")
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert int.from_bytes(data[16:20], "big") >= 1000


@pytest.mark.parametrize(("name", "eps"), [("FP16 torch AMP", 2.0**-11), ("BF16 torch AMP", 2.0**-8)])
def test_rounding_of_weight_gradients_and_its_end(outcome, name, eps):
    """AMP's gradients are off by up to half a unit of 16 bits; converted, by roundings of FP32 sums."""
    run, batch = run_named(outcome, name), outcome.task.finetune(0, 0)
    weights = run.weights()
    assert eps / 4 < weight_gradient_error(run, batch) < eps
    assert weight_gradient_error(run, batch, converted=True) < 1e-5
    assert type(run.model.head) is Linear
    assert all(map(torch.equal, run.weights(), weights))


def test_without_16_bit_runs_no_line_on_gradients(outcome):
    assert gradients_line([outcome.reference], outcome.task.finetune(0, 0)) == ""


def test_hopeless_training_ends_with_a_message(digits):
    """Weights that are no longer finite end the run with a message, not in an endless loop."""
    model = ConvNet()
    torch.nn.init.constant_(model.head.weight, float("nan"))
    run = Run.start(Variant("fusedamp", "fp16"), model, Options())
    with pytest.raises(DemoError, match=r"overflowed 100 times .* smaller --lr"):
        run.step(digits.finetune(0, 0))


def test_own_text(tmp_path):
    """--data is what the GPT is fine-tuned on and judged by: its last tenth is held out."""
    path = tmp_path / "own.txt"
    path.write_bytes(b"a" * 18_000 + b"b" * 2_000)
    task = gpt_task(path)
    assert "own.txt" in task.story
    assert set(task.finetune(0, 0)[0].unique().tolist()) == {ord("a")}
    assert set(task.held_out[0].unique().tolist()) == {ord("b")}
    assert not torch.equal(task.pretrain(0, 0)[0], task.pretrain(0, 1)[0])


def test_the_policy_is_that_of_our_fp16_runs(digits):
    options = Options(dtypes=("fp16", "bf16"), policy="headroom")
    outcome = Outcome(digits, train(digits, options))
    runs = {run.variant.name: run for run in outcome.runs}
    names = ["FP16 fusedamp, headroom", "FP16 fusedamp, no masters, headroom"]
    assert [name for name in runs if "headroom" in name] == names
    assert all((run.scaler._headroom is not None) == ("headroom" in name) for name, run in runs.items()
               if run.variant.stack == "fusedamp")  # fmt: skip
    run = runs[names[0]]
    assert run.skipped[0] == 0  # the scale starts too large
    assert abs(outcome.gap(run)) < outcome.spread
    console = Console(width=80, record=True)
    console.print(table(outcome))
    text = console.export_text()
    assert "…" not in text
    assert text.count("  headroom ") == 2


def test_a_scale_that_comes_down_in_time_is_no_skip(digits):
    options = Options(init_scale=2.0**14)
    run = Run.start(Variant("fusedamp", "fp16", policy="headroom"), pretrain(digits, options, int), options)
    run.step(digits.finetune(0, 0))
    assert run.scaler.get_scale() < 2.0**14
    assert (run.skipped, len(run.losses)) == ([], 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_multiply_rounds_like_tensor_cores(dtype):
    """Result and gradients are the FP32 ones of the rounded operands, rounded once; also under autocast."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = multiply(F.linear, x, w)
    assert y.dtype == dtype
    seed = torch.randn(5, 3).to(dtype)
    y.backward(seed)
    xr, wr = (t.detach().to(dtype).float() for t in (x, w))
    assert torch.equal(y, (xr @ wr.T).to(dtype))
    assert torch.equal(x.grad, (seed.float() @ wr).to(dtype).float())
    assert torch.equal(w.grad, (seed.float().T @ xr).to(dtype).float())
    layer = Linear(7, 3).to(dtype)
    assert layer(xr.to(dtype)).dtype == dtype


def test_lost_updates_counts_what_rounding_eats():
    """Around 1, FP16 moves above 2**-11, BF16 above 2**-8; unmoved weights do not count."""
    before = [torch.ones(4)]
    after = [torch.tensor([1.0, 1 + 2.0**-12, 1 + 2.0**-10, 1 + 2.0**-7])]
    assert lost_updates(before, after, torch.float16) == pytest.approx(1 / 3)
    assert lost_updates(before, after, torch.bfloat16) == pytest.approx(2 / 3)


def test_variants_follow_the_wanted_format():
    """FP32 is always there, as the reference and as the spread."""
    names = [variant.name for variant in variants(("bf16",))]
    assert names[:4] == ["FP32 torch", "BF16 torch AMP", "BF16 fusedamp", "BF16 fusedamp, no masters"]
    assert names[4:] == [f"FP32 torch, batch order {k}" for k in (2, 3, 4)]
    headroom = [variant.name for variant in variants(("fp16", "bf16"), "headroom")]
    assert headroom[1:3] == ["FP16 torch AMP", "FP16 fusedamp, headroom"]
    assert headroom[4:6] == names[1:3]
    assert variants(("fp32",))[:2] == [REFERENCE, Variant("fusedamp", "fp32")]


def demo_with_energy(gpt, tmp_path, capsys):
    options = Options(tasks=("gpt",), dtypes=("fp16",), picture=tmp_path / "plot.png", energy=True)
    code = run_tasks([gpt], options)
    assert code == run_tasks([gpt], replace(options, energy=False))
    return capsys.readouterr().out


def test_energy_without_a_counter_says_so(gpt, tmp_path, capsys, monkeypatch):
    """The exit code stays that of the claim."""
    monkeypatch.setenv("FUSEDAMP_POWERCAP", str(tmp_path / "none"))
    text = demo_with_energy(gpt, tmp_path, capsys)
    assert "gpt: energy was not measured: [energy] " in text
    assert "has no CPU package" in text


def test_energy_compares_with_fp32(gpt, tmp_path, capsys, monkeypatch):
    """The arms are steps that train, of FP32 with torch and of those with master weights."""

    def compared(arms, samples, seconds, rounds, devices):
        assert (list(arms), samples) == (["FP32 torch", "FP16 fusedamp"], 16)
        assert (seconds, rounds, devices) == (2.0, 5, [torch.device("cpu")])
        for arm in arms.values():
            steps = len(arm.func.__self__.losses)
            arm()
            assert len(arm.func.__self__.losses) == steps + 1
        made = {
            name: Arm((j,) * 3, (0.01,) * 3, (80.0,) * 3, {})
            for name, j in zip(arms, (2.0, 1.0), strict=True)
        }
        return Comparison(made, ("package-0",), None)

    monkeypatch.setattr("fusedamp.commands.demo.energy.compare", compared)
    text = demo_with_energy(gpt, tmp_path, capsys)
    assert "gpt, 16 samples per step. Energy of package-0: medians of 3 rounds" in text
    assert "FP16 fusedamp needs less energy: FP32 torch / FP16 fusedamp is 2 (quartiles 2 to 2)" in text
    assert "On a CPU, 16-bit layers multiply in FP32" in text
