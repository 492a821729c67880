"""Loggers: a CSV file that survives what happens to files, TensorBoard and wandb, and what is accepted."""

import csv
import dataclasses
import io
import logging
import math
import re

import numpy as np
import pytest
import torch
from fusedamp.numerics import bin_edges, loggers
from gradient_records import record, run

COLUMNS = "step,numerics/scale,numerics/skipped,numerics/headroom_bits,numerics/zeros_percent,"
COLUMNS += "numerics/subnormal_percent,numerics/lost_updates_percent,numerics/update_ratio"
SKIPPED = record([[np.inf, 0.0]], step=50, scale=1024.0, skipped=True)
STEPPED = record([[3.0, 0.0]], step=100, scale=512.0, updates=[(1, 1, 0.5, 2.0)])


class Memory:
    def __init__(self):
        self.rows = []

    def log(self, step, values):
        self.rows.append((step, values))


def test_names_of_values():
    memory = Memory()
    loggers.send(memory, SKIPPED)
    loggers.send(memory, STEPPED)
    assert [step for step, _ in memory.rows] == [50, 100]
    assert list(memory.rows[1][1]) == COLUMNS.split(",")[1:]
    assert list(memory.rows[0][1]) == COLUMNS.split(",")[1:6], "no updates: no figures of them"
    assert memory.rows[1][1]["numerics/lost_updates_percent"] == 100
    assert memory.rows[0][1]["numerics/headroom_bits"] == -math.inf


def test_histograms_are_unscaled():
    class Histograms(Memory):
        def add_histogram(self, step, name, edges, counts):
            self.rows.append((step, name, edges, counts))

    memory = Histograms()
    loggers.send(memory, STEPPED)
    step, name, edges, counts = memory.rows[1]
    assert (step, name) == (100, "numerics/gradients")
    assert torch.equal(edges, bin_edges() / 512)
    assert torch.equal(counts, STEPPED.histogram.sum(0))
    at = counts[1:].argmax() + 1
    assert edges[at] <= 3 < edges[at + 1]
    loggers.send(memory, dataclasses.replace(STEPPED, scale=0.0))
    assert len(memory.rows) == 3, "gradients times 0 say nothing about gradients"


# CSV ------------------------------------------------------------


def test_csv(tmp_path):
    """The header once, empty cells for absent figures, and numbers that read back exactly."""
    path = tmp_path / "run.csv"
    log = loggers.csv(path)
    assert not path.exists(), "no file before the first record"
    loggers.send(log, SKIPPED)
    loggers.send(log, STEPPED)
    lines = path.read_text().splitlines()
    assert lines[0] == COLUMNS
    assert lines[1] == "50,1024.0,1.0,-inf,50.0,0.0,,"
    assert len(lines) == 3
    rows = loggers.read_csv(path)
    assert rows == [{"step": 50.0, **SKIPPED.summary()}, {"step": 100.0, **STEPPED.summary()}]


def test_csv_resumes(tmp_path):
    """A second logger appends without a header; steps that start again count on."""
    path = str(tmp_path / "run.csv")
    records, _ = run("healthy", records=4)
    for r in records:
        loggers.send(loggers.csv(path), r)
    log = loggers.csv(path)
    for r in records[:2]:
        loggers.send(log, r)
    text = (tmp_path / "run.csv").read_text()
    assert text.count("step") == 1
    assert [line.split(",")[0] for line in text.splitlines()[1:]] == ["50", "100", "150", "200", "50", "100"]
    assert [row["step"] for row in loggers.read_csv(path)] == [50, 100, 150, 200, 250, 300]
    loggers.send(log, records[0])
    assert loggers.read_csv(path)[-1]["step"] == 350


def test_continued():
    """Steps count on from a start, and several optimizers have names of their own."""
    memory, writer = Memory(), Writer()
    loggers.send(loggers.Continued(memory, 1000), STEPPED)
    loggers.send(loggers.Continued(memory, 0, "optimizer 1"), SKIPPED)
    assert memory.rows[0] == (1100, loggers.values_of(STEPPED))
    assert memory.rows[1][0] == 50
    assert "numerics/optimizer 1/headroom_bits" in memory.rows[1][1]
    loggers.send(loggers.Continued(loggers.tensorboard(writer), 1000, "b"), STEPPED)
    assert writer.scalars[0] == (1100, "numerics/b/scale", 512.0)
    ((name, figures),) = writer.histograms
    assert (name, figures["global_step"]) == ("numerics/b/gradients_log2", 1100)
    with pytest.raises(TypeError, match="logger is a NoneType"):
        loggers.Continued(None, 0)


def test_csv_of_other_values(tmp_path):
    """What the first line has beyond the known figures are columns, too, whatever their names."""
    path = tmp_path / "run.csv"
    log = loggers.csv(path)
    values = loggers.values_of(STEPPED)
    log.log(1, values | {'a "loss", in nats': 0.1})
    log.log(2, values)
    with pytest.raises(ValueError, match="has no column b; use another file"):
        log.log(3, values | {"b": 1.0})
    rows = list(csv.DictReader(path.open(newline="")))
    assert [row['a "loss", in nats'] for row in rows] == ["0.1", ""]
    assert [row["step"] for row in loggers.read_csv(path)] == [1, 2]


def test_csv_of_an_empty_file(tmp_path):
    path = tmp_path / "run.csv"
    path.touch()
    loggers.send(loggers.csv(path), STEPPED)
    assert path.read_text().startswith(COLUMNS)


def test_csv_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a file in a folder that exists"):
        loggers.csv(tmp_path / "nowhere" / "run.csv")
    other = tmp_path / "other.csv"
    other.write_text("epoch,loss\n1,2\n")
    with pytest.raises(ValueError, match="the first column is not step; use another file"):
        loggers.csv(other)
    other.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match="the first column is not step"):
        loggers.csv(other)
    cut = tmp_path / "cut.csv"
    cut.write_text(f"{COLUMNS}\n50,1024.0,1.")
    with pytest.raises(ValueError, match="ends within a line"):
        loggers.csv(cut)
    assert cut.read_text().endswith("1.")


def test_csv_writes_a_whole_line_or_none(tmp_path, monkeypatch):
    """A full disk leaves the file as it was."""
    path = tmp_path / "run.csv"
    log = loggers.csv(path)
    loggers.send(log, STEPPED)
    before = path.read_bytes()

    class Full(io.FileIO):
        def write(self, data):
            return super().write(bytes(data)[:10])

    opened = type(path).open
    monkeypatch.setattr(type(path), "open", lambda self, mode, **kw: Full(str(self), mode.replace("b", "")))
    with pytest.raises(OSError, match="wrote 10 of"):
        loggers.send(log, SKIPPED)
    monkeypatch.setattr(type(path), "open", opened)
    assert path.read_bytes() == before
    loggers.send(log, SKIPPED)
    assert path.read_bytes().startswith(before)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "line 1: expected columns step, numerics/scale"),
        ("epoch,loss\n", "line 1: expected columns step"),
        ("step,loss\n", "line 1: expected columns step"),
        (f"{COLUMNS}\n50,1\n", "line 2: 2 cells; expected 8, as in line 1"),
        (f"{COLUMNS}\n50,1,0,1,0,0,,\n100,x,0,1,0,0,,\n", "line 3: numerics/scale is 'x'; expected a number"),
        (f"{COLUMNS}\n,1,0,1,0,0,,\n", "line 2: step is missing"),
        (f"{COLUMNS}\n50,1,0,nan,0,0,,\n", "line 2: headroom_bits is missing"),
        ("step,numerics/scale\n50,1\n", "line 2: skipped is missing"),
        (f"{COLUMNS}\n50,1,0,1,0,0,,\n\xff,1,0,1,0,0,,\n", r"line \d: not a line of text"),
    ],
)
def test_bad_files(tmp_path, lines, words):
    path = tmp_path / "bad.csv"
    path.write_bytes(lines.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, (?:{words})"):
        loggers.read_csv(path)


# TensorBoard and Weights & Biases ------------------------------------------------------------


class Writer:
    def __init__(self):
        self.scalars, self.histograms = [], []

    def add_scalar(self, name, value, global_step):
        self.scalars.append((global_step, name, value))

    def add_histogram_raw(self, name, **figures):
        self.histograms.append((name, figures))


def test_tensorboard():
    writer = Writer()
    loggers.send(loggers.tensorboard(writer), STEPPED)
    assert [(step, name) for step, name, _ in writer.scalars] == [(100, n) for n in COLUMNS.split(",")[1:]]
    ((name, figures),) = writer.histograms
    assert name == "numerics/gradients_log2"
    assert figures == {
        "min": 1.0,
        "max": 2.0,  # 3 is in 2^1 .. 2^2; the zero is not drawn
        "num": 1.0,
        "sum": 1.5,
        "sum_squares": 2.25,
        "bucket_limits": [2.0],
        "bucket_counts": [1.0],
        "global_step": 100,
    }


def test_tensorboard_of_the_outermost_bins():
    writer = Writer()
    r = record([[2.0**-45, 2.0**30, np.inf, 0.0]], dtype=np.float32)
    loggers.send(loggers.tensorboard(writer), r)
    _, figures = writer.histograms[0]
    assert (figures["min"], figures["max"], figures["num"]) == (-41, 21, 2)
    assert len(figures["bucket_limits"]) == len(figures["bucket_counts"]) == 62
    assert figures["sum"] == -40.5 + 20.5


def test_tensorboard_without_a_finite_gradient():
    writer = Writer()
    loggers.send(loggers.tensorboard(writer), record([[0.0, np.inf]], skipped=True))
    assert len(writer.scalars) == 5
    assert not writer.histograms


def test_tensorboards_own_files(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    records, _ = run("overflow")
    with SummaryWriter(tmp_path) as writer:
        log = loggers.tensorboard(writer)
        for r in records:
            loggers.send(log, r)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0, "scalars": 0}).Reload()
    headroom = events.Scalars("numerics/headroom_bits")
    assert [event.step for event in headroom] == [r.step for r in records]
    expected = np.float32([r.summary()["headroom_bits"] for r in records])
    assert np.array_equal(np.float32([event.value for event in headroom]), expected)
    histograms = events.Histograms("numerics/gradients_log2")
    assert [h.step for h in histograms] == [r.step for r in records]
    assert [h.histogram_value.num for h in histograms] == [r.histogram[:, 1:63].sum().item() for r in records]


class Run:
    def __init__(self):
        self.metrics, self.rows = [], []

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, data):
        self.rows.append(data)


def test_wandb():
    run_of_wandb = Run()
    log = loggers.wandb(run_of_wandb)
    assert run_of_wandb.metrics == [("numerics/step", None), ("numerics/*", "numerics/step")]
    loggers.send(log, SKIPPED)
    loggers.send(log, STEPPED)
    assert run_of_wandb.rows[1] == {"numerics/step": 100, **loggers.values_of(STEPPED)}
    assert len(run_of_wandb.rows) == 2


def test_wandbs_own_run(tmp_path, monkeypatch):
    """All rows arrive, although the run is at a later step, and the user's own rows stay."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for folder in ("DIR", "CONFIG_DIR", "CACHE_DIR", "DATA_DIR", "ARTIFACT_DIR"):
        monkeypatch.setenv(f"WANDB_{folder}", str(tmp_path))
    records, _ = run("healthy", records=4)
    with wandb.init(mode="offline", project="test", dir=str(tmp_path)) as theirs:
        log = loggers.wandb(theirs)
        for step in range(1000, 1004):
            theirs.log({"loss": 1.0}, step=step)
            loggers.send(log, records[step - 1000])
        summary = dict(theirs.summary)
    assert summary["numerics/step"] == 200
    assert summary["numerics/update_ratio"] == records[-1].summary()["update_ratio"]
    assert summary["loss"] == 1.0


def test_adapters_refuse():
    with pytest.raises(TypeError, match=r"\[loggers.tensorboard\] writer is a Run, without add_scalar"):
        loggers.tensorboard(Run())
    with pytest.raises(TypeError, match=r"\[loggers.wandb\] run is a Writer, without log; expected what"):
        loggers.wandb(Writer())


# What log_to takes ------------------------------------------------------------


@pytest.mark.parametrize("good", [Memory(), loggers.tensorboard(Writer()), loggers.wandb(Run())])
def test_accepted(good):
    assert loggers.need_logger(good) is good


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (None, "a NoneType; expected an object with log"),
        (Memory, "the class Memory; expected an object with log"),
        (logging.getLogger("fusedamp"), r"a Logger; expected an object with log\(step, values\)"),
        (Run(), r"a Run; expected fusedamp.numerics.loggers.wandb\(run\)"),
        (Writer(), r"a Writer; expected fusedamp.numerics.loggers.tensorboard\(writer\)"),
        ("run.csv", r"a str; expected fusedamp.numerics.loggers.csv\(path\)"),
    ],
)
def test_refused(bad, words):
    with pytest.raises(TypeError, match=r"\[log_to\] logger is " + words):
        loggers.need_logger(bad)
