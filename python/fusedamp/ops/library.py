"""Loads the op libraries, and tells torch the shapes of what the ops return."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .. import _C

_HERE = Path(__file__).parent.parent


def _load(name: str) -> bool:
    path = _HERE / f"lib{name}.so"
    if path.exists():
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    return path.exists()


if not _load("fusedamp_cpu"):
    raise ImportError(
        f"fusedamp is not built: {_HERE / 'libfusedamp_cpu.so'} is missing. Run `pip install .` (or `pip "
        f"install -e .`) in "
        "its source folder; in a source checkout, don't import it from python/ before that."
    )
# The CUDA object needs the CUDA half of torch itself, GPU or not.
HAS_CUDA_OPS: bool = torch.version.cuda is not None and _load("fusedamp_cuda")


def _check_origins(has_cuda_ops: bool) -> None:
    """Objects of different builds disagree on tables and signatures."""
    wanted = _C.build_info()["origin"]
    for device in ("cpu", "cuda") if has_cuda_ops else ("cpu",):
        try:
            found = getattr(torch.ops.fusedamp, f"_{device}_origin")()
        except (AttributeError, NotImplementedError):
            found = "unknown (an earlier build)"
        if found != wanted:
            raise ImportError(
                f"fusedamp's objects are of different builds: {Path(_C.__file__).name} is {wanted}, "
                f"libfusedamp_{device}.so is {found}. Build all again: `pip install .` (or `pip install "
                "-e .`) in the source folder."
            )


_check_origins(HAS_CUDA_OPS)
if torch.version.cuda is not None and not HAS_CUDA_OPS:
    warnings.warn(
        f"fusedamp was built without CUDA kernels, and torch {torch.__version__} has CUDA: only CPU tensors "
        "work. Install the CUDA toolkit and set CUDA_HOME (or nvcc from pip, five packages: see "
        "CONTRIBUTING.md), then build fusedamp again: `pip install .`.",
        stacklevel=1,
    )

STEP_OPS: tuple[str, ...] = tuple(torch.ops.fusedamp.step_ops().split())  # of csrc/math/optimizers.def


def _need_one_kind(*args: Any, **kwargs: Any) -> None:
    """Tensors without data are also here when they share a call with real ones, which must not pass
    unnoticed."""
    kinds = {t.is_meta for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
    if len(kinds) > 1:
        raise RuntimeError("some tensors are on the meta device and others are not")


def _register_fake(name: str, function: Callable[..., Any]) -> None:
    if not hasattr(torch.ops.fusedamp, name):
        raise ImportError(
            f"fusedamp's compiled files have no op {name}: they are older than its Python files. Build "
            "again: `pip install .` (or `pip install -e .`) in the source folder."
        )
    torch.library.register_fake(f"fusedamp::{name}", function)


_WITHOUT_RESULT = (
    "unscale_",
    "update_scale_",
    "update_scale_headroom_",
    "_recode_",
    "_record_",
    "_check_step",
)
for _name in (*_WITHOUT_RESULT, *STEP_OPS):
    _register_fake(_name, _need_one_kind)


def _nothing_shared(tensors: list[torch.Tensor], written: int) -> tuple[int, int]:
    _need_one_kind(tensors)
    return -1, -1  # there are no addresses to compare


def _grad_stats_shapes(
    grads: list[torch.Tensor], inv_scale: torch.Tensor | None = None, norm_type: float = 2.0
) -> tuple[torch.Tensor, ...]:
    _need_one_kind(grads, inv_scale)
    like = grads[0]
    return (
        like.new_empty((), dtype=torch.float32),
        like.new_empty((), dtype=torch.float64),
        like.new_empty((len(grads),), dtype=torch.float64),
        like.new_empty((len(grads), 3), dtype=torch.int64),
    )


def _grad_numerics_shapes(
    grads: list[torch.Tensor], *numerics: torch.Tensor, inv_scale: torch.Tensor | None = None, **norm: float
) -> tuple[torch.Tensor, ...]:
    _need_one_kind(grads, numerics)
    return _grad_stats_shapes(grads, inv_scale)


def _measured_shape(params: list[torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    _need_one_kind(params, args, kwargs)
    return params[0].new_empty((len(params), 2), dtype=torch.float64)


_register_fake("_find_shared_memory", _nothing_shared)
_register_fake("_measure_", _measured_shape)
_register_fake("grad_stats", _grad_stats_shapes)
_register_fake("grad_numerics", _grad_numerics_shapes)


def cpu_target() -> str:
    """The instruction set that the CPU ops run on: "avx512", "avx2" or "baseline"."""
    return str(torch.ops.fusedamp.cpu_target())
