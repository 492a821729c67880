"""Breaks the CUDA kernels in one place at a time and shows that the emulation notices: `python tests/emulation/mutants.py`.

Each defect names the kind of build that must stop it. Exits with 1 where one survives, or where the unbroken kernels fail.
Arguments: words that the names of the wanted defects contain.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from emulated import KINDS, ROOT, Kind, build

ARGUMENTS = ["2", "3000"]  # rounds, largest tensor


@dataclass(frozen=True)
class Defect:
    name: str
    kind: str
    file: str
    good: str
    bad: str


DEFECTS = [
    # wrong results
    Defect("tail dropped", "plain", "element.cuh", "singles = head + (n - tail)", "singles = head"),
    Defect("head dropped", "plain", "element.cuh", "visit(i < head ? i : i - head + tail", "visit(i - head + tail"),
    Defect("stride without width", "plain", "element.cuh", "i += threads * N", "i += threads"),
    Defect("BF16 truncated", "plain", "element.cuh", "__float2bfloat16_rn(x)", "__float2bfloat16_rz(x)"),
    Defect("FP16 read as BF16", "plain", "element.cuh", "if (dtype == DType::bf16) return bf16_to", "return bf16_to"),
    Defect("row found too late", "plain", "chunks.cuh", "first_chunk <= chunk;", "first_chunk < chunk;"),
    Defect("stale row kept", "plain", "chunks.cuh", "first_chunk > chunk)) return", "first_chunk >= chunk)) return"),
    Defect("chunks overlap", "plain", "chunks.cuh", "static_cast<int>(left < kChunk ? left : kChunk)", "static_cast<int>(left)"),
    Defect("half a warp summed", "plain", "chunks.cuh", "int distance = 16;", "int distance = 8;"),
    Defect("shuffle width 16", "plain", "chunks.cuh", "x, distance));", "x, distance, 16));"),
    Defect("every warp in slot 0", "plain", "chunks.cuh", "of_warp[warp] = x;", "of_warp[0] = x;"),
    Defect("overflow tested with == 1", "plain", "chunks.cuh", "!(*found_inf == 0.0f)", "*found_inf == 1.0f"),
    Defect(
        "a skipped step is counted", "plain", "step.cuh", "(overflowed(scalars.found_inf)) return;\n  const int64_t i", "(false) return;\n  const int64_t i"
    ),
    Defect("one tensor's coefficients for all", "plain", "step.cuh", "k = coeffs[r];", "k = coeffs[0];"),
    Defect("master ignores its weight", "plain", "step.cuh", "if (kMaster && narrow<P>", "if (kMaster || narrow<P>"),
    Defect("maximize ignored", "plain", "step.cuh", "grad_scale = -grad_scale", "grad_scale = +grad_scale"),
    Defect("lists of empty tensors not counted", "plain", "step.cuh", "if (rows.empty()) return;", "if (rows.empty() || rows.back().numel == 0) return;"),
    Defect("packets all go to the start", "plain", "engine.cu", "packet, to + sent, count", "packet, to, count"),
    Defect("counter never reset", "plain", "stats.cu", "*finished = 0;", ";"),
    Defect("squares underflow", "plain", "stats.cu", "kSmall = 0x1p-100", "kSmall = 0.0"),
    Defect("maximum drops NaN", "plain", "stats.cu", "float_of(max(bits_of(sum), magnitude))", "float_of(magnitude) > sum ? float_of(magnitude) : sum"),
    Defect("counts overlap", "plain", "stats.cu", "nans} << 16", "nans} << 8"),
    Defect("infinity before unscaling only", "plain", "unscale.cu", "const V stored = widen<V>(grad.v[e], dtype);", "const V stored = 0;"),
    # what CUDA forbids
    Defect("leaves before a barrier", "plain", "stats.cu", "  FUSEDAMP_SHARED(bool, last, 1);", "  if (threadIdx.x >= 40) return;\n  FUSEDAMP_SHARED(bool, last, 1);"),
    Defect("barrier in a branch", "plain", "unscale.cu", "if (__syncthreads_or(bad) &&", "if (bad && __syncthreads_or(bad) &&"),
    Defect("mask of absent lanes", "plain", "chunks.cuh", "for (int distance = 16;", "if (lane < 8) for (int distance = 16;"),
    # outside of tensors
    Defect("tail one too long", "address", "element.cuh", "i < singles; i", "i <= singles; i"),
    Defect("vectors round up", "address", "element.cuh", "(n - head) / N * N", "(n - head + N - 1) / N * N"),
    Defect("misalignment of states ignored", "address", "step.cuh", "together &= elements_to_boundary<kVector>(states[j]) == boundary;", ""),
    Defect("misalignment of gradients ignored", "address", "step.cuh", "bool together = elements_to_boundary<kVector>(grads) == boundary;", "bool together = true;"),
    Defect("boundary of half the size", "address", "element.cuh", "(N - reinterpret_cast<uintptr_t>(list) / sizeof(T) % N) % N", "(N / 2 - reinterpret_cast<uintptr_t>(list) / sizeof(T) % (N / 2 + N % 2)) % (N / 2 + N % 2)"),
    Defect("32-bit offset", "address", "chunks.cuh", "first = (chunk - placed.first_chunk) * kChunk", "first = static_cast<int>((chunk - placed.first_chunk) * kChunk)"),
    Defect("shared memory for two warps", "address", "chunks.cuh", "FUSEDAMP_SHARED(T, of_warp, 32)", "FUSEDAMP_SHARED(T, of_warp, 2)"),
    # races
    Defect("no barrier before shared memory is read", "thread", "chunks.cuh", "of_warp[warp] = x;\n  __syncthreads();", "of_warp[warp] = x;"),
    Defect("no barrier before shared memory is reused", "thread", "chunks.cuh", "  __syncthreads();  // before anybody writes of_warp again\n", ""),
    Defect("flag stored without an atomic", "thread", "unscale.cu", "atomicExch(found_inf, 1.0f)", "(*found_inf = 1.0f)"),
    Defect("ticket without an atomic", "thread", "stats.cu", "atomicAdd(finished, 1u)", "(*finished)++"),
    Defect("no fence before the ticket", "thread", "stats.cu", "__threadfence();  // this block's", "// this block's"),
    Defect("no fence after the ticket", "thread", "stats.cu", "gridDim.x - 1;\n    __threadfence();", "gridDim.x - 1;"),
    Defect("last block read without a barrier", "thread", "stats.cu", "  __syncthreads();\n  if (!last[0]) return;", "  if (!last[0]) return;"),
]  # fmt: skip


def copy_project(root: Path) -> None:
    """Copies what is compiled, with two of the optimizers: one set of kernels more shows nothing new and takes minutes."""
    for part in ("csrc", "tests/emulation"):
        shutil.copytree(ROOT / part, root / part)
    (root / "csrc/engine/cuda/adam.cu").unlink()
    for part in ("math/optimizers.def", "engine/cuda/adamw.cu"):
        source = root / "csrc" / part
        lines = source.read_text().splitlines(keepends=True)
        source.write_text("".join(line for line in lines if "Amsgrad" not in line and "(adam," not in line))


def verdict(kind: Kind, root: Path) -> str:
    """Empty where all tests pass, else what stopped them."""
    binary = build(kind, "test_kernels", root / "build" / kind.name, root)
    try:
        done = kind.run([str(binary), *ARGUMENTS], timeout=300)
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode == 0:
        return ""
    patterns = r"==EMULATION== .*|runtime error: .*|ERROR: AddressSanitizer: \S+|data race|FAIL .*"
    found = re.search(patterns, done.stdout + done.stderr)
    return found.group() if found else f"exit code {done.returncode}"


def main(words: list[str]) -> int:
    wanted = [d for d in DEFECTS if not words or any(word in d.name for word in words)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_project(root)
        for kind in KINDS.values():
            defects = sorted((d for d in wanted if d.kind == kind.name), key=lambda d: d.file)
            if not defects:
                continue
            if kind.compiler() is None:
                print(f"{kind.name}: left out; {kind.missing}")
                continue
            if message := verdict(kind, root):
                print(f"the unbroken kernels fail ({kind.name}): {message}")
                return 1
            for defect in defects:
                source = root / "csrc/engine/cuda" / defect.file
                text = source.read_text()
                if text.count(defect.good) != 1:
                    raise ValueError(
                        f"{defect.name}: its place occurs {text.count(defect.good)} times in {defect.file}"
                    )
                source.write_text(text.replace(defect.good, defect.bad))
                message = verdict(kind, root)
                source.write_text(text)
                print(
                    f"{'caught' if message else 'SURVIVED':8}  {kind.name:7}  {defect.name}: {message[:110]}",
                    flush=True,
                )
                if not message:
                    survivors.append(defect.name)
    print(f"{len(wanted) - len(survivors)} of {len(wanted)} defects caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
