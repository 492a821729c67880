"""Results that must be bitwise equal on every machine: exhaustive roundings, and a digest of calls of every
op.

Run as a script it prints the digest: test_ops_targets.py starts it once for each instruction set.
"""

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from cases import kept
from fusedamp import ops, optim
from fusedamp.ops import library
from op_calls import BORDERS, DTYPES, HALVES, VARIANTS, bits, same_numbers, scalar, step_call
from torch import Tensor

STORAGE: list[dict[str, Any]] = [
    dict(master_weights="split"),
    dict(state_dtype=torch.bfloat16),
    dict(master_weights="split", state_dtype="int8"),
    dict(master_weights="none", stochastic_rounding=True),
]


def every_half(dtype: torch.dtype) -> Tensor:
    """All 2^16 values of a 16-bit type."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def float32_samples() -> Tensor:
    """float32 by its upper 16 bits, all of them, with lower bits on, next to and between the ties of both
    16-bit types; and random ones."""
    upper = torch.arange(-(2**15), 2**15).mul(2**16).to(torch.int32)
    lower = [(eighth << 13) + low for eighth in range(8) for low in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF)]
    random = torch.randint(-(2**31), 2**31, (2**20,), generator=torch.Generator().manual_seed(0))
    return torch.cat([*(upper + low for low in lower), random.to(torch.int32)]).view(torch.float32)


def check_widening(dtype: torch.dtype) -> None:
    """Every 16-bit value times 1, a third and 2^-3 (which makes new subnormals), against torch's own
    conversions."""
    for factor in (1.0, 1 / 3, 2.0**-3):
        g = every_half(dtype)
        expected = (g.float() * scalar(factor)).to(dtype)
        ops.unscale_([g], scalar(factor), scalar(0.0))
        assert same_numbers(g, expected), f"{dtype} * {factor}"


def check_narrowing(dtype: torch.dtype) -> None:
    """float32 masters rounded to 16 bits by steps that move nothing, against torch's own conversions.

    A master that rounds otherwise than its weight, which torch rounded, would follow the weight: both are
    compared.
    """
    masters = float32_samples()
    masters = masters[~masters.isinf()]  # decay by 0 makes them NaN
    params, before = masters.to(dtype), masters.clone()
    ops.sgd_([params], [torch.ones(masters.shape)], [], [masters], [scalar(0.0)], lr=0.0)
    assert same_numbers(params, before.to(dtype)), f"float32 to {dtype}"
    finite = ~before.isnan()
    assert torch.equal(bits(masters)[finite], bits(before)[finite]), f"masters of {dtype}"
    payloads = before[before.isnan()]
    for masters in ([], [torch.zeros_like(payloads)]):
        params = torch.zeros(payloads.shape, dtype=dtype)
        ops.sgd_([params], [payloads], [], masters, [scalar(0.0)], lr=1.0)
        assert params.isnan().all(), f"NaN to {dtype}"


def digest() -> dict[str, str]:
    """Hashes of what every op makes of the same input."""
    shapes = [(n,) for n in BORDERS] + [(), (0,), (100_003,)]
    found = {}

    def note(name: str, tensors: list[Tensor]) -> None:
        data = b"".join(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
        found[name] = hashlib.sha256(data).hexdigest()[:16]

    for variant in VARIANTS:
        for masters, dtypes in ((False, DTYPES), (True, HALVES)):
            call = step_call(
                variant, shapes, dtypes, masters=masters, taken=(0, 1, 30), inv_scale=scalar(0.7)
            )
            for _ in range(3):
                call.run()
            note(f"{variant}, masters={masters}", call.tensors())
            call.options |= dict(lr=1e-3, updates=torch.zeros(len(shapes), 4, dtype=torch.float64))
            call.run()
            note(f"updates of {variant}, masters={masters}", [*call.tensors(), call.options["updates"]])
    call = step_call("sgd", shapes, DTYPES)
    call.grads[3][5], call.grads[7][400] = float("inf"), float("nan")
    for norm_type in (2.0, 1.0, 0.0, 3.5, float("inf")):
        note(f"norm {norm_type}", list(ops.grad_stats(call.grads, scalar(0.3), norm_type)))
        note(f"finite norm {norm_type}", list(ops.grad_stats(call.params, scalar(0.3), norm_type)))
        tiny = [p.detach() * 1e-30 for p in call.params]  # squares underflow
        note(f"tiny norm {norm_type}", list(ops.grad_stats(tiny, scalar(0.3), norm_type)))
        counted = [torch.zeros(len(shapes), n).to(t) for n, t in ((3, torch.double), (64, torch.long))]
        for grads in (call.grads, tiny):
            stats = ops.grad_numerics(grads, *counted, torch.ones((), dtype=torch.int32), norm_type=norm_type)
            note(f"numerics {norm_type}, {len(found)}", [*stats, *counted])
    ops.unscale_(call.params, scalar(0.3), scalar(0.0))
    note("unscale_", call.params)
    for name, tensors in stored(shapes):
        note(name, tensors)
    return found


def stored(sizes: list[tuple[int, ...]]) -> Iterator[tuple[str, list[Tensor]]]:
    """Weights and states after three steps in every storage format, of rules with and without norms."""
    for make, storage in itertools.product((optim.AdamW, optim.Lion, optim.LAMB), STORAGE):
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype))
            for size in sizes
            for dtype in HALVES
        ]
        optimizer = make(params, lr=0.01, weight_decay=0.1, rounding_seed=0, **storage)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            optimizer.step()
        states = [value for param in params for _, value in sorted(kept(optimizer.state[param]).items())]
        yield f"{make.__name__}, {storage}", [*(param.detach() for param in params), *states]


def main() -> None:
    torch.set_num_threads(2)
    for dtype in HALVES:
        check_widening(dtype)
        check_narrowing(dtype)
    print(library.cpu_target(), digest())


if __name__ == "__main__":
    main()
