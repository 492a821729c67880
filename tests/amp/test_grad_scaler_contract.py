"""The outside of the scaler: arguments, errors, disabled mode. torch's own, and our additions."""

import inspect
import math
import pickle
import warnings
from collections import namedtuple

import fusedamp
import pytest
import torch
from fusedamp import GradScaler, optim
from on_device import DEVICE

LIMITS = {
    *("process_group", "min_scale", "max_scale", "hysteresis", "hysteresis_refill", "on_floor"),
    *("policy", "headroom_bits"),
}


def iterate(scaler, optimizer, factor=1.0):
    """Run one iteration; all gradients are ``factor``."""
    optimizer.zero_grad()
    params = optimizer.param_groups[0]["params"]
    scaler.scale(sum(p.float().sum() for p in params) * factor).backward()
    scaler.step(optimizer)
    scaler.update()


def make(cls=torch.optim.SGD, scaler_class=GradScaler, **options):
    param = torch.ones(3, requires_grad=True)
    return scaler_class(DEVICE, **{"init_scale": 8.0, **options}), cls([param], lr=0.1)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (fusedamp.GradScaler, torch.amp.GradScaler),
        (fusedamp.cuda.amp.GradScaler, torch.cuda.amp.GradScaler),
        (fusedamp.cpu.amp.GradScaler, torch.cpu.amp.GradScaler),
    ],
)
def test_signature_is_torchs_and_more(ours, theirs):
    def plain(cls):
        return [
            (p.name, p.kind, p.default)
            for p in inspect.signature(cls).parameters.values()
            if p.name not in LIMITS and p.kind is not p.VAR_KEYWORD
        ]

    assert plain(ours) == plain(theirs)
    assert issubclass(ours, torch.amp.GradScaler)


def test_device_namesakes_do_not_warn_and_know_their_device():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler = fusedamp.cpu.amp.GradScaler(4.0, 3.0, 0.25, 7, hysteresis=2)
    assert (scaler._device, scaler._init_scale, scaler._hysteresis) == ("cpu", 4.0, 2)
    assert (scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()) == (
        3.0,
        0.25,
        7,
    )
    assert fusedamp.cuda.amp.GradScaler(enabled=False)._device == "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_it_disables_itself_as_torchs():
    with pytest.warns(UserWarning, match="CUDA is not available.  Disabling"):
        assert not GradScaler().is_enabled()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"growth_factor": 1.0}, AssertionError, r"^The growth factor must be > 1.0.$"),
        ({"backoff_factor": 1.0}, AssertionError, r"^The backoff factor must be < 1.0.$"),
        ({"growth_factor": math.inf}, ValueError, "growth_factor is inf; expected a finite number >= 1"),
        ({"growth_factor": math.nan}, ValueError, "growth_factor is nan"),
        ({"backoff_factor": 0.0}, ValueError, "backoff_factor is 0.0; expected a number > 0"),
        ({"backoff_factor": math.nan}, ValueError, "backoff_factor is nan"),
        (
            {"growth_interval": 0},
            ValueError,
            "growth_interval is 0; expected a whole number from 1 to 2147483647",
        ),
        ({"growth_interval": 1.5}, ValueError, "growth_interval is 1.5; expected a whole number"),
        ({"growth_interval": math.inf}, ValueError, "growth_interval is inf"),
        ({"init_scale": 0.0}, ValueError, "init_scale is 0.0; expected a finite number > 0"),
        ({"init_scale": -1.0}, ValueError, "init_scale is -1.0"),
        ({"init_scale": math.nan}, ValueError, "init_scale is nan"),
        ({"init_scale": math.inf}, ValueError, "init_scale is inf"),
        ({"init_scale": "8"}, TypeError, "init_scale is '8'; expected a number"),
        (
            {"init_scale": 2.0, "min_scale": 4.0},
            ValueError,
            "init_scale is 2.0; expected a number from min_scale",
        ),
        ({"max_scale": 4.0}, ValueError, "init_scale is 8.0; expected .* to max_scale"),
        ({"min_scale": 0.0}, ValueError, r"min_scale is 0.0; expected a finite number >= 2\*\*-126"),
        ({"min_scale": 2.0**-127}, ValueError, "keeps 1/scale finite"),
        ({"min_scale": math.nan}, ValueError, "min_scale is nan"),
        (
            {"min_scale": 2.0, "max_scale": 1.0},
            ValueError,
            "max_scale is 1.0; expected a number >= min_scale",
        ),
        ({"max_scale": math.nan}, ValueError, "max_scale is nan"),
        ({"hysteresis": 0}, ValueError, "hysteresis is 0; expected a whole number from 1 to 2147483647"),
        ({"hysteresis": None}, TypeError, "hysteresis is None; expected a number"),
        (
            {"hysteresis_refill": "always"},
            ValueError,
            "hysteresis_refill is 'always'; expected \"growth\" or",
        ),
        ({"on_floor": "ignore"}, ValueError, 'on_floor is \'ignore\'; expected "warn" or "raise"'),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=match):
        GradScaler(DEVICE, **{"init_scale": 8.0, **options})


@pytest.mark.parametrize("device", ["tpu", "mps", "meta", None, 3.5])
def test_devices_without_kernels(device):
    """Refused before the first step; a disabled scaler does nothing on any device."""
    with pytest.raises(
        ValueError, match=r"\[GradScaler\] device is .*; expected \"cuda\" or \"cpu\".*torch.amp"
    ):
        GradScaler(device)
    assert not GradScaler(device, enabled=False).is_enabled()
    assert GradScaler("cpu:0").is_enabled()


def test_bad_arguments_of_torch_are_not_looked_at_when_disabled():
    GradScaler(DEVICE, 0.0, 0.5, 2.0, 0, enabled=False)
    with pytest.raises(ValueError, match="hysteresis"):
        GradScaler(DEVICE, enabled=False, hysteresis=0)


def test_bad_settings_change_nothing():
    scaler, _ = make()
    before = scaler.state_dict()
    for setter, values in {
        scaler.set_growth_factor: (0.5, math.inf, math.nan),
        scaler.set_backoff_factor: (0.0, 1.5, math.nan),
        scaler.set_growth_interval: (0, -1, 2.5),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match="expected"):
                setter(value)
    assert scaler.state_dict() == before
    scaler.set_growth_factor(1.0)  # torch's way to freeze the scale
    scaler.set_backoff_factor(1.0)
    scaler.set_growth_interval(9)
    assert scaler.state_dict() == {
        **before,
        "growth_factor": 1.0,
        "backoff_factor": 1.0,
        "growth_interval": 9,
    }


@pytest.mark.parametrize("new", [16.0, 16, torch.tensor(16.0), torch.tensor([16.0]), torch.tensor(16)])
def test_update_takes_numbers_and_one_element_tensors(new):
    scaler, optimizer = make()
    iterate(scaler, optimizer)
    scale = scaler._scale
    scaler.update(new)
    assert scaler.get_scale() == 16.0
    assert scaler._scale is scale, "captured graphs and compiled code rely on the same tensor"
    if isinstance(new, torch.Tensor):
        new.fill_(2)
        assert scaler.get_scale() == 16.0


@pytest.mark.parametrize(
    ("new", "error", "match"),
    [
        (torch.ones(2), AssertionError, "new_scale should be a float or a 1-element"),
        (torch.ones(1, requires_grad=True), AssertionError, "new_scale should be a float"),
        (torch.ones(1, device="meta"), AssertionError, "new_scale should be a float"),
        (0.0, ValueError, "new_scale is 0.0; expected a finite number > 0"),
        (math.nan, ValueError, "new_scale is nan"),
        (math.inf, ValueError, "new_scale is inf"),
        ("16", TypeError, "new_scale is '16'; expected a number"),
        ([16.0], TypeError, "expected a number"),
    ],
)
def test_update_refuses(new, error, match):
    scaler, optimizer = make()
    iterate(scaler, optimizer)
    with pytest.raises(error, match=match):
        scaler.update(new)
    assert scaler.get_scale() == 8.0


def test_new_scale_is_brought_into_the_bounds():
    scaler, optimizer = make(min_scale=2.0, max_scale=32.0)
    iterate(scaler, optimizer)
    for new, expected in ((1, 2.0), (1e9, 32.0), (torch.tensor(1e-9), 2.0), (torch.tensor(64), 32.0)):
        scaler.update(new)
        assert scaler.get_scale() == expected


def test_misuse_has_torchs_errors():
    scaler, optimizer = make()
    for name, call in {
        "step": lambda: scaler.step(optimizer),
        "unscale_": lambda: scaler.unscale_(optimizer),
        "update": scaler.update,
        "clip_grad_norm_": lambda: scaler.clip_grad_norm_(optimizer, 1.0),
    }.items():
        with pytest.raises(AssertionError, match=f"Attempted {name} but _scale is None.  This may indicate"):
            call()
    scaler.scale(torch.ones(()))
    with pytest.raises(AssertionError, match=r"No inf checks were recorded prior to update."):
        scaler.update()
    with pytest.raises(AssertionError, match=r"No inf checks were recorded for this optimizer."):
        scaler.step(optimizer)
    scaler.update(8.0)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    with pytest.raises(
        RuntimeError, match=r"^Closure use is not currently supported if GradScaler is enabled.$"
    ):
        scaler.step(optimizer, closure=None)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called on this optimizer since the last update"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="being called after step"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_\(\) is being called after step"):
        scaler.clip_grad_norm_(optimizer, 1.0)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called since the last update"):
        scaler.step(optimizer)
    with pytest.raises(AssertionError, match="may only be pickled at the beginning of an iteration"):
        pickle.dumps(scaler)


def test_scale_takes_what_torchs_takes_and_refuses_the_rest_at_once():
    scaler, _ = make()
    point = namedtuple("point", "x y")
    one = torch.ones(())
    assert scaler.scale([one, (one, [one])]) == [8, (8, [8])]
    assert scaler.scale(point(one, one)) == point(8, 8)
    assert list(scaler.scale(one for _ in range(2))) == [8, 8]
    assert scaler.scale(torch.ones((), dtype=torch.float16)).dtype is torch.float32
    assert scaler.scale(torch.ones(1, dtype=torch.float16)).dtype is torch.float16
    for bad in (3.0, "loss", {"loss": 3.0}, None):
        with pytest.raises(ValueError, match="outputs must be a Tensor or an iterable of Tensors"):
            scaler.scale(bad)


def test_disabled_does_nothing():
    scaler, optimizer = make(optim.AdamW, enabled=False)
    loss = torch.ones(())
    assert scaler.scale(loss) is loss
    assert (scaler.state_dict(), scaler.get_scale(), scaler.is_enabled()) == ({}, 1.0, False)
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.full((3,), 2.0)
    scaler.unscale_(optimizer)
    scaler.load_state_dict({})
    assert scaler.clip_grad_norm_(optimizer, 1.0).item() == pytest.approx(math.sqrt(12))
    assert torch.linalg.vector_norm(param.grad).item() == pytest.approx(1.0)
    assert scaler.step(optimizer, closure=lambda: 5.0) == 5.0
    scaler.update()
    assert not scaler.last_step_skipped
    assert not scaler.overflow_report()
    assert not pickle.loads(pickle.dumps(scaler)).is_enabled()
    with pytest.raises(AttributeError):
        scaler.get_growth_factor()
