"""How an op is called: its complaints as Python's errors, and version counters that move."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, library


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """Calls the op. Its own complaints ("[op_] params[3] is ...") become ValueErrors without C++ line
    numbers, with the error as their cause; errors of torch and of the device stay what they are.

    An error names the op, or the one that a private op is told to check for (``op``).
    """
    speaker = kwargs.get("op", name.removeprefix("_packed_"))
    first = args[0][0] if isinstance(args[0], (list, tuple)) and args[0] else args[0]
    if isinstance(first, Tensor) and first.is_meta:
        checks.explain(speaker, name, RuntimeError(), args, kwargs, "")
    try:
        return getattr(torch.ops.fusedamp, name).default(*args, **kwargs)
    except RuntimeError as error:
        if (complaint := checks.complaint(speaker, error)) is not None:
            raise complaint from error
        checks.explain(speaker, name, error, args, kwargs, "yes" if library.HAS_CUDA_OPS else "no")


def bump(*lists: Sequence[Tensor]) -> None:
    """A custom op does not move the version counters of what it wrote; autograd must notice all the same."""
    for tensors in lists:
        if len(tensors):
            torch.autograd.graph.increment_version(tensors)
