"""Every optimizer in every format of weights, masters and states: it works, or it is refused in words."""

import itertools
import re

import pytest
import storage_reference
import torch
from cases import CASES, bits, kept, make_params, nonnegative_states, set_grads
from fusedamp import optim
from fusedamp.ops import recode
from fusedamp.ops.inputs import AmpInputs, DeviceInputs
from fusedamp.optim.core.options import STORAGE
from on_device import HERE, SUMS, fetched

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32, torch.float64, torch.complex64)
MODES = [
    dict(master_weights=master, state_dtype=state, stochastic_rounding=random)
    for master, state, random in itertools.product(*STORAGE.values(), (False, True))
]
OVERFLOW = AmpInputs({HERE: DeviceInputs(found_inf=torch.tensor(1.0))})


def refusal(case, dtype, mode) -> str | None:
    """Return the expected error message, or None if the mode must work."""
    master, state, random = mode.values()
    if random and master != "none":
        return "a weight with a master is rounded to nearest"
    if case.ours in (optim.Adafactor, optim.Muon):
        if random or master == "split" or state != "float32":
            return rf"expected FP32 masters and states, the only formats of {case.ours.__name__}.*optim.AdamW"
        return "expected real parameters. Give it to another" if dtype.is_complex else None
    if state != "float32":
        if case.options.get("centered"):
            return "as the difference of two rounded states may lose the variance. Pass centered=False"
        if dtype in (torch.float64, torch.complex64) and set(case.states) - set(case.scalars):
            return r"expected float16, bfloat16 or float32\. Put it into a group of its own"
    if dtype.is_complex and (random or master == "split"):
        return "expected a real parameter for split masters and stochastic rounding"
    return None


def start(case, dtype, **mode):
    options = dict(case.options)
    if options.get("initial_accumulator_value"):
        options["initial_accumulator_value"] = 0.25  # which every format holds exactly
    params = make_params(dtype)
    set_grads(params, 0)
    return params, case.ours(params, **options, **mode)


def everything(optimizer, params):
    tensors = [
        t for param in params for t in (param, param.grad, *kept(optimizer.state.get(param, {})).values())
    ]
    return [bits(t) for t in fetched(tensors)]


def on_host(optimizer, params):
    """Each parameter with its state."""
    states = [kept(optimizer.state.get(param, {})) for param in params]
    copies = iter(
        fetched(t for param, state in zip(params, states, strict=True) for t in (param, *state.values()))
    )
    return [(next(copies), {name: next(copies) for name in state}) for state in states]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_mode_works_or_is_refused(case, dtype):
    """Guards the promise for every optimizer, variant, dtype and mode, and that what is refused changes
    nothing.
    """
    plain, reference = start(case, dtype)
    if refusal(case, dtype, MODES[0]) is None:
        reference.step()
    expected = on_host(reference, plain)
    for mode in MODES:
        if (message := refusal(case, dtype, mode)) is not None:
            params = make_params(dtype)
            before = [bits(p) for p in params]
            set_grads(params, 0)
            with pytest.raises(ValueError, match=message) as caught:
                case.ours(params, **case.options, **mode).step()
            assert re.match(rf"\[{case.ours.__name__}\] ", str(caught.value))
            assert [bits(p) for p in params] == before
            continue
        params, optimizer = start(case, dtype, **mode)
        optimizer.step()
        for (one, entry), (exact, wide) in zip(on_host(optimizer, params), expected, strict=True):
            assert_near(case, one, entry, exact, wide, mode)
        works_on(optimizer, params)


def assert_near(case, param, entry, exact, wide, mode):
    """After one step, from states that every format holds, the weight and each state are the FP32 run's,
    rounded.
    """
    has_master = param.dtype in HALVES and mode["master_weights"] != "none"
    assert ("master" in entry) == has_master
    if not has_master and mode["stochastic_rounding"] and param.dtype in HALVES:
        assert_neighbor(param.detach(), wide["master"])
    elif has_master and mode["master_weights"] == "split":
        assert entry["master"].dtype == torch.int16
        master, off = recode.master_of(param.detach(), entry["master"]), wide["master"].clone()
        if param.dtype == torch.float16:  # whose subnormals hold multiples of 2^-39
            small = off.abs() < 2.0**-16
            assert ((master - off).abs()[small] <= 2.0**-40).all()
            master, off = master[~small], off[~small]
        assert bits(master) == bits(off)
        assert_neighbor(param.detach(), wide["master"])
    else:
        assert bits(param) == bits(exact)
        assert not has_master or bits(entry["master"]) == bits(wide["master"])
    for name in set(wide) - {"step", "master"}:
        value, scales, wanted = entry[name], entry.get(f"{name}_scale"), wide[name]
        if name in case.scalars:
            torch.testing.assert_close(value, wanted, rtol=SUMS, atol=0.0)
        elif mode["state_dtype"] == "float32":
            assert bits(value) == bits(wanted), name
        elif mode["state_dtype"] == "bfloat16":
            assert_neighbor(value, wanted)
        else:
            nonnegative = name in nonnegative_states(case.ours)
            assert value.dtype == (torch.uint8 if nonnegative else torch.int8)
            assert storage_reference.are_neighbors(value, scales, wanted), name


def assert_neighbor(rounded, wanted):
    """A 16-bit value on one side of the FP32 value or on the other, with nothing between."""
    info = torch.finfo(rounded.dtype)
    unit = torch.clamp(wanted.double().abs(), min=info.tiny).log2().floor().exp2() * info.eps
    assert ((rounded.double() - wanted.double()).abs() < unit).all()


def works_on(optimizer, params):
    """More steps, one that is skipped, a NaN that shows, counts and formats that stay."""
    formats = [{name: value.dtype for name, value in kept(optimizer.state[p]).items()} for p in params]
    for seed in (1, 2):  # the second is made from addresses that are remembered
        set_grads(params, seed)
        optimizer.step()
    set_grads(params, 3)
    before = everything(optimizer, params)
    optimizer._amp = OVERFLOW
    optimizer.step()
    optimizer._amp = None
    assert everything(optimizer, params) == before
    assert all(p.isfinite().all() for p in fetched(params))
    params[5].grad[1, 2] = float("nan")
    optimizer.step()
    assert params[5][1, 2].isnan()
    assert all(p.isfinite().all() for p in fetched(params[:5]))
    for (_, entry), expected in zip(on_host(optimizer, params), formats, strict=True):
        assert {name: value.dtype for name, value in entry.items()} == expected
        assert entry["step"] == 4


def test_every_optimizer_is_in_the_matrix():
    """Guards the list: whatever ``fusedamp.optim`` exports has a row."""
    fused = {name for name in optim.__all__ if hasattr(getattr(optim, name), "states")}
    assert {case.ours.__name__ for case in CASES} == fused
