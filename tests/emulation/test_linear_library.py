"""The host code of cuBLASLt (csrc/engine/cuda/lt_*.cpp) without a GPU: products on an emulated library under
the sanitizers, and the ops that call it.

mutants.py shows that it can fail.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from emulated import KINDS, ROOT, build, build_linear_ops

pytestmark = [
    pytest.mark.emulation,
    pytest.mark.slow,
    pytest.mark.timeout(600, func_only=True),  # building, in a fixture, takes the time that it takes
]
ROUNDS = {"plain": 100, "address": 20, "thread": 10}


@pytest.fixture(scope="session")
def binary(request: pytest.FixtureRequest) -> Path:
    name, program = request.param
    if KINDS[name].compiler() is None:
        pytest.skip(KINDS[name].missing)
    return build(KINDS[name], program, ROOT / "build/emulation" / name)


@pytest.mark.parametrize(
    ("name", "binary"), [(n, (n, "test_lt")) for n in KINDS], indirect=["binary"], ids=KINDS
)
def test_products_equal_sums_in_float64(name: str, binary: Path) -> None:
    done = KINDS[name].run([str(binary), str(ROUNDS[name])])
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


SUITE = [
    "tests/ops/test_ops_linear.py",
    "tests/nn/test_nn_values.py",
    "tests/nn/test_nn_accumulation.py",
    "tests/nn/test_nn_engine.py",
]
EPILOGUES = {"none", "bias_grad", "gelu_aux", "gelu_aux_bias", "dgelu", "dgelu_bias_grad"}


@pytest.mark.parametrize("refused", ["none", "all"])
def test_ops_of_tensors(refused: str, tmp_path: Path) -> None:
    """The ops that CUDA has, with their strides, epilogues and routes without the library, pass the CPU's
    tests."""
    if torch.version.cuda is not None:
        pytest.skip("needs a torch without CUDA: its own cuBLASLt would be found")
    torch_folder = Path(torch.__file__).parent
    libraries = map(str, build_linear_ops(torch_folder, ROOT / "build/emulation/ops"))
    command = [sys.executable, "tests/emulation/linear_suite.py", *libraries, refused, "-q", "-x", *SUITE]
    if refused == "all":  # then torch's product is a tensor of its own
        command += ["-k", "not nothing_of_the_weights_shape"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], capture_output=True, text=True, cwd=ROOT, timeout=500
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    uses = [line.split("\t") for line in done.stdout.splitlines() if line.count("\t") == 6]
    ran, not_run = ({use[1] for use in uses if bool(use[6]) == why} for why in (False, True))
    assert ran == (EPILOGUES if refused == "none" else set())
    assert not_run == EPILOGUES or (refused == "none" and {"gelu_aux", "gelu_aux_bias", "dgelu"} <= not_run)
