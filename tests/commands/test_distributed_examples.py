"""The examples for one device, for several and for trainers run, learn, and print what they claim."""

import re
import runpy
import subprocess
import sys

import pytest
import torch
from test_examples import EXAMPLES

SHARED = EXAMPLES.parent / "tests" / "shared"
needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="not a source checkout"),
]
TRAINERS = {
    "lightning_module": "lightning",
    "accelerate_loop": "accelerate",
    "hf_trainer": "transformers",
}


def run(name, ranks, *arguments, steps=5):
    """Run an example on ``ranks`` ranks; returns the loss and the rest of the line that it prints."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [
        sys.executable,
        *(launch if ranks else ()),
        str(SHARED / "run_example.py"),
        str(EXAMPLES / f"{name}.py"),
    ]
    command += ["--device", "cpu", "--steps", str(steps), *map(str, arguments)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert made.returncode == 0, made.stderr[-4000:]
    return printed(made.stdout, steps)


def printed(text, steps):
    found = re.search(rf"^step {steps}  loss (\d+\.\d+)(.*)$", text, re.M)
    assert found, text
    return float(found[1]), found[2].strip()


def test_single_gpu_resumes(tmp_path, capsys):
    def run_here(steps, *arguments):
        main = runpy.run_path(str(EXAMPLES / "single_gpu.py"))["main"]
        main(["--device", "cpu", "--steps", str(steps), *map(str, arguments)])
        return printed(capsys.readouterr().out, steps)

    file = tmp_path / "checkpoint.pt"
    straight = run_here(60)
    assert straight[0] < 0.1 < run_here(5, "--checkpoint", file)[0]
    assert run_here(60, "--checkpoint", file) == straight


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("name", ["ddp", "pipeline"])
def test_several_ranks_learn(name):
    loss, text = run(name, 2, steps=40)
    assert loss < 0.1
    assert text == "ranks 2"


@pytest.mark.slow
@needs_gloo
def test_fsdp2_resumes_on_another_number_of_ranks(tmp_path):
    folder = tmp_path / "checkpoint"
    run("fsdp2", 2, "--checkpoint", folder)
    loss, text = run("fsdp2", 1, "--checkpoint", folder, steps=40)
    assert loss < 0.1
    assert text == "ranks 1"


@needs_gloo
@pytest.mark.integration
@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("name", TRAINERS)
def test_trainers(name, ranks):
    pytest.importorskip(TRAINERS[name], reason="pip install fusedamp[integrations] to run it")
    loss, text = run(name, ranks)
    assert loss < 2
    assert text == f"ranks {max(ranks, 1)}"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) < 80
