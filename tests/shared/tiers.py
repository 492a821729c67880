"""Which test files run where. `make quick` leaves out what is slow; a second version of torch leaves out what
never meets torch."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

# Marked `once`: they test sources, compilers, machine code and arithmetic, or whole programs.
ONCE = (
    "benchmarks/test_benchmarks.py",
    "benchmarks/test_cpp_benchmark.py",
    "benchmarks/test_evidence.py",
    "benchmarks/test_pages.py",
    "benchmarks/test_scale_policies.py",
    "build/test_build.py",
    "build/test_content_cache.py",
    "build/test_machine_code.py",
    "build/test_matrix.py",
    "build/test_old_driver.py",
    "build/test_old_glibc.py",
    "build/test_progress.py",
    "build/test_release.py",
    "build/test_sdist.py",
    "commands/test_demo.py",
    "commands/test_repro.py",
    "commands/test_repro_parity.py",
    "cpp/test_headers.py",
    "emulation/test_emulation.py",
    "emulation/test_linear_library.py",
    "integration/test_troubleshooting.py",
    "laws/test_house.py",
    "laws/test_rooms.py",
    "laws/test_tiers.py",
    "laws/test_words.py",
    "ops/test_pass_instructions.py",
    "ops/test_storage_math.py",
)

# Marked `slow`, like tests with that mark of their own.
SLOW = (
    "benchmarks/test_evidence.py",
    "build/test_machine_code.py",
    "commands/test_demo.py",
    "commands/test_repro.py",
    "commands/test_repro_parity.py",
    "cpp/test_headers.py",
    "ops/test_ops_targets.py",
    "ops/test_pass_instructions.py",
    "ops/test_storage_math.py",
    "optim/test_storage_memory.py",
)


def marks_of(path: Path) -> list[str]:
    """Return the names of the marks of a test file."""
    name = path.relative_to(TESTS).as_posix() if path.is_relative_to(TESTS) else ""
    return [mark for mark, files in {"once": ONCE, "slow": SLOW}.items() if name in files]
