"""Checkpoints between torch.optim and its namesakes here: keys, both directions, 16-bit states."""

import inspect

import pytest
import torch
from cases import WITH_TORCH, has_fused, make_params, torch_scalars
from test_optim_state import HALVES, through_a_file, train


def train_on_halves(optimizer, params, steps: int) -> None:
    """Steps that torch survives in FP16 too, where its eps is 0 and small second moments vanish."""
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    for _ in range(steps):
        optimizer.step()


OURS = ("master_weights", "state_dtype", "stochastic_rounding", "rounding_seed")


@pytest.mark.parametrize("case", WITH_TORCH, ids=str)
def test_keys_are_torchs_plus_master(case):
    """Guards drop-in checkpoints: the same keys in state and groups, in torch's order."""
    ours, theirs = make_params(torch.bfloat16), make_params(torch.bfloat16)
    optimizer, reference = case.ours(ours, **case.options), case.torch(theirs, **case.options)
    for o, params in ((optimizer, ours), (reference, theirs)):
        train(o, params, range(1))
    mine, its = optimizer.state_dict(), reference.state_dict()
    assert list(mine) == list(its)
    assert [*its["param_groups"][0]] == [k for k in mine["param_groups"][0] if k not in OURS]
    if its["state"]:
        assert set(mine["state"][0]) == {*its["state"][0], "step", "master"}
    else:
        assert set(mine["state"][0]) == {"step", "master"}
    for name, value in mine["state"][5].items():
        assert value.dtype == (torch.float64 if name in case.scalars else torch.float32)
        assert value.shape == (() if name in ("step", *case.scalars) else ours[5].shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("case", "options"),
    [
        (case, options)
        for case in WITH_TORCH
        for options in ({}, {"foreach": False}, {"fused": True})
        if options.keys() <= inspect.signature(case.torch).parameters.keys()
        if "fused" not in options or has_fused(case.torch)
    ],
    ids=str,
)
def test_exchange_with_torch(case, dtype, options):
    """Guards both directions: train here, continue there, and the reverse; all four ways end at the same
    weights.
    """
    ends = []
    for kinds in (
        (case.ours, case.ours),
        (case.ours, case.torch),
        (case.torch, case.ours),
        (case.torch, case.torch),
    ):
        params = make_params(dtype)
        first, second = (
            kind(params, **case.options, **(options if kind is case.torch else {})) for kind in kinds
        )
        with torch_scalars(dtype):
            train(first, params, range(3))
        second.load_state_dict(through_a_file(first.state_dict()))
        train(second, params, range(3, 6))
        ends.append(params)
    tolerance = 200 * torch.finfo(dtype).eps  # 6 steps of two times 16 roundings, of values below 4
    for params in ends[1:]:
        for p, q in zip(params, ends[0], strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", WITH_TORCH, ids=str)
def test_16_bit_checkpoints_of_torch_are_widened(case, dtype):
    """Guards the import of 16-bit states: they become FP32, step on, and a master appears."""
    params = make_params(dtype)
    theirs = case.torch(params, **case.options, foreach=False)
    train_on_halves(theirs, params, 2)
    ours = case.ours(params, **case.options)
    saved = through_a_file(theirs.state_dict())
    ours.load_state_dict(saved)
    for i, p in enumerate(params):
        for name in case.states:
            wide = torch.float64 if name in case.scalars else torch.float32
            assert ours.state[p][name].dtype == wide
            assert torch.equal(ours.state[p][name], saved["state"][i][name].to(wide))
    train_on_halves(ours, params, 1)
    for p in params:
        assert torch.equal(ours.state[p]["master"].to(dtype), p)
        if "exp_avg" in case.states:
            assert ours.state[p]["step"] == 3


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", WITH_TORCH, ids=str)
def test_torch_loads_our_16_bit_checkpoints(case, dtype):
    """Guards the way back for 16-bit weights: torch casts the states, ignores the master and steps on."""
    params = make_params(dtype)
    ours = case.ours(params, **case.options)
    train_on_halves(ours, params, 2)
    theirs = case.torch(params, **case.options)
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    for p in params:
        for name in case.states:
            assert torch.equal(theirs.state[p][name], ours.state[p][name].to(dtype))
    train_on_halves(theirs, params, 1)
    assert all(torch.isfinite(p).all() for p in params)
