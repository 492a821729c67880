"""``python -m fusedamp``: help, version, info, and one-line answers to bad demo options."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fusedamp
import pytest
import torch
from fusedamp.commands import cli
from fusedamp.commands.demo import options


def test_module_entry_point():
    """``python -m fusedamp`` itself runs, in a fresh process."""
    done = subprocess.run([sys.executable, "-m", "fusedamp", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.split() == ["fusedamp", fusedamp.__version__ + ",", "torch", torch.__version__]


@pytest.mark.parametrize(
    "command",
    [["--help"], ["info", "--help"], ["demo", "--help"], ["repro", "--help"], ["numerics", "--help"]],
)
def test_help(command, capsys):
    """Every command explains itself."""
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 0
    assert "usage: python -m fusedamp" in capsys.readouterr().out


def test_cmake_dir(capsys):
    """The folder alone, for `$(python -m fusedamp --cmake-dir)`."""
    assert cli.main(["--cmake-dir"]) == 0
    folder = Path(capsys.readouterr().out.removesuffix("\n"))
    assert folder == Path(fusedamp.__file__).resolve().parent / "cmake"
    assert (folder / "fusedampConfig.cmake").exists()


def test_no_command_shows_all(capsys):
    """What one can do next; the exit code still says that nothing ran."""
    assert cli.main([]) == 2
    out = capsys.readouterr().out
    assert all(command in out for command in ("info", "demo", "repro", "estimate", "numerics", "Start with"))


def test_info_json(capsys):
    """Versions, build and every device, machine-readable."""
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["fusedamp"] == fusedamp.__version__
    assert info["torch"] == torch.__version__
    assert info["cuda"]["torch_built_for"] == torch.version.cuda
    assert info["cpu_target"] in info["build"]["cpu_targets"]
    assert info["devices"][0]["device"] == "cpu"
    assert info["devices"][0]["recommended"] in ("float32", "bfloat16")


def test_info_text(capsys):
    """The same for people."""
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"fusedamp {fusedamp.__version__}, torch {torch.__version__}" in text
    assert "choose " in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere.txt"], "--data nowhere.txt: no such file"),
        (["--data", "small.txt"], "small.txt holds 5 bytes; the GPT needs at least"),
        (["--data", "small.txt", "--task", "digits"], "--task digits reads none"),
        (["--steps", "0"], "--steps is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--lr", "0"], "--lr is 0.0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--init-scale", "-2"], "--init-scale is -2.0"),
        (["--init-scale", "inf"], "--init-scale is inf"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "toaster"], "--device toaster: unknown"),
        (["--device", "meta"], "runs on cpu and cuda only"),
        (["--out", "nowhere/x.png"], "no folder nowhere"),
        (["--numerics", "--dtype", "bf16"], "--numerics watches FP16; --dtype is bf16"),
        (["--out", "picture.jpg"], "the plot is a PNG"),
        (["--out", "small.txt/sub"], "cannot create this folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_demo_options(arguments, words, capsys, monkeypatch, tmp_path):
    """Exit code 2 and one line with the option, its value, and valid values."""
    monkeypatch.setattr(options, "EXTRAS", ())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.txt").write_text("small")
    assert cli.main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fusedamp demo: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


@pytest.mark.parametrize("arguments", [["--dtype", "fp8"], ["--steps", "many"], ["--task", "chess"]])
def test_options_that_argparse_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *arguments])
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_no_cuda_is_said(capsys, monkeypatch):
    """A GPU asked for and not there is an error, no silent CPU run."""
    monkeypatch.setattr(options, "EXTRAS", ())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["demo", "--device", "cuda"]) == 2
    assert "sees no CUDA GPU here; use cpu" in capsys.readouterr().err


def test_missing_extras_are_named(capsys, monkeypatch):
    """Without matplotlib & co. the demo says which, and how to get them."""
    monkeypatch.setattr(options, "EXTRAS", ("json", "no_such_package"))
    assert cli.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "needs no_such_package" in error
    assert 'pip install "fusedamp[demo]"' in error
