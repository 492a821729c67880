"""Errors of the optimizers and their messages; nothing is changed then."""

import pytest
import torch
from cases import bits, make_params, set_grads
from fusedamp import optim
from on_device import HERE


def one(dtype=torch.float32, **options):
    """A parameter with a gradient, and its AdamW."""
    param = torch.nn.Parameter(torch.ones(4, 4, dtype=dtype))
    param.grad = torch.ones_like(param)
    return param, optim.AdamW([param], **options)


BAD_OPTIONS = [
    (optim.AdamW, {"lr": -0.1}, r"lr is -0.1; expected a finite number >= 0"),
    (optim.AdamW, {"lr": float("nan")}, r"lr is nan; expected a finite number >= 0"),
    (optim.AdamW, {"lr": torch.ones(2)}, r"lr is a torch.float32 tensor of shape \[2\]; expected a number"),
    (optim.AdamW, {"lr": torch.tensor(-1.0, device="cpu")}, r"lr is -1.0; expected"),
    (optim.AdamW, {"lr": "1e-3"}, r"lr is '1e-3'; expected a number"),
    (optim.AdamW, {"eps": -1e-8}, r"eps is -1e-08; expected a finite number >= 0"),
    (optim.AdamW, {"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0; expected a number >= 0 and < 1"),
    (optim.AdamW, {"betas": (0.9, -0.1)}, r"betas\[1\] is -0.1"),
    (optim.AdamW, {"betas": (0.9,)}, r"betas is \(0.9,\); expected 2 numbers"),
    (optim.Adam, {"weight_decay": -1}, r"weight_decay is -1; expected"),
    (optim.Adam, {"differentiable": True}, r"differentiable is True; expected False"),
    (
        optim.Adam,
        {"master_weights": "fp16"},
        r"master_weights is 'fp16'; expected one of \('auto', 'fp32', 'split', 'none'\)",
    ),
    (optim.SGD, {"momentum": -0.5}, r"momentum is -0.5; expected"),
    (optim.SGD, {"dampening": float("inf"), "momentum": 0.9}, r"dampening is inf; expected"),
    (optim.SGD, {"nesterov": True}, r"nesterov is True with momentum 0 and dampening 0; expected"),
    (optim.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, r"nesterov is True with momentum 0.9"),
    (optim.Lion, {"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0; expected"),
    (optim.Lion, {"weight_decay": "no"}, r"weight_decay is 'no'; expected a number"),
    (optim.Adagrad, {"lr_decay": -1}, r"lr_decay is -1; expected"),
    (optim.Adagrad, {"initial_accumulator_value": -0.1}, r"initial_accumulator_value is -0.1; expected"),
    (optim.RMSprop, {"alpha": -0.1}, r"alpha is -0.1; expected"),
    (optim.RMSprop, {"momentum": -0.1}, r"momentum is -0.1; expected"),
    (optim.RMSprop, {"eps": None}, r"eps is None; expected a number"),
    (optim.RAdam, {"betas": (1.5, 0.9)}, r"betas\[0\] is 1.5; expected"),
    (optim.RAdam, {"eps": -1}, r"eps is -1; expected"),
    (optim.Adafactor, {"eps": (1e-3,)}, r"eps is \(0.001,\); expected 2 numbers"),
    (optim.Adafactor, {"eps": (None, -1)}, r"eps\[1\] is -1; expected"),
    (optim.Adafactor, {"d": 0.5}, r"d is 0.5; expected a finite number >= 1"),
    (optim.Adafactor, {"beta2_decay": 0.1}, r"beta2_decay is 0.1; expected a number <= 0"),
    (optim.Muon, {"momentum": 1.0}, r"momentum is 1.0; expected a number >= 0 and < 1"),
    (optim.Muon, {"ns_steps": 100}, r"ns_steps is 100; expected a whole number from 0 to 99"),
    (optim.Muon, {"ns_coefficients": (1, 2)}, r"ns_coefficients is \(1, 2\); expected 3 numbers"),
    (optim.Muon, {"adamw_betas": (0.9, 1)}, r"adamw_betas\[1\] is 1; expected a number >= 0 and < 1"),
    (optim.Muon, {"adjust_lr_fn": "best"}, r"adjust_lr_fn is 'best'; expected one of"),
    (optim.Muon, {"ns_dtype": torch.int8}, r"ns_dtype is 'int8'; expected one of"),
    (optim.Muon, {"use_muon": "no"}, r"use_muon is 'no'; expected one of"),
    (optim.NAdam, {"momentum_decay": -0.1}, r"momentum_decay is -0.1; expected"),
    (optim.LAMB, {"trust_clip": -1.0}, r"trust_clip is -1.0; expected"),
    (optim.LAMB, {"betas": (0.9, 2)}, r"betas\[1\] is 2; expected"),
    (optim.LARS, {"trust_coefficient": -1}, r"trust_coefficient is -1; expected"),
    (optim.LARS, {"momentum": float("nan")}, r"momentum is nan; expected"),
    (optim.NovoGrad, {"eps": "small"}, r"eps is 'small'; expected a number"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD_OPTIONS)
def test_bad_options_are_refused(kind, options, message):
    """Guards constructor, add_param_group and later edits of a group; nothing is changed by the last two."""
    good, bad = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    name = kind.__name__
    with pytest.raises((ValueError, TypeError), match=rf"^\[{name}\] {message}"):
        kind([good], **options)
    with pytest.raises((ValueError, TypeError), match=rf"^\[{name}\] group 0: {message}"):
        kind([{"params": [good], **options}])
    optimizer = kind([good])
    with pytest.raises((ValueError, TypeError), match=rf"^\[{name}\] group 1: {message}"):
        optimizer.add_param_group({"params": [bad], **options})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [bad]})
    good.grad, bad.grad = torch.ones(3), torch.ones(3)
    optimizer.param_groups[1].update(options)
    with pytest.raises((ValueError, TypeError), match=rf"^\[{name}\] group 1: {message}"):
        optimizer.step()
    assert torch.equal(good, torch.ones(3))


def shared_memory():
    base = torch.ones(8)
    return [torch.nn.Parameter(base[:5]), torch.nn.Parameter(base[4:])]


def freed():
    param = torch.nn.Parameter(torch.ones(8))
    param.grad = torch.ones(8)
    param.untyped_storage().resize_(0)
    return [param]


def wide_gradient():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad_dtype = torch.float64
    param.grad = torch.ones(3, dtype=torch.float64)
    return [param]


def gradient_of_dtype(param_dtype, grad_dtype):
    def make():
        param = torch.nn.Parameter(torch.ones(3, dtype=param_dtype))
        param.main_grad = torch.ones(3, dtype=grad_dtype)
        return [param]

    return make


BAD_PARAMS = {
    "expanded": (
        lambda: [torch.nn.Parameter(torch.ones(1).expand(3))],
        rf"params\[1\] is float32 of shape \[3\] on {HERE} with strides \[0\], so elements share",
    ),
    "meta": (
        lambda: [torch.nn.Parameter(torch.ones(3, device="meta"))],
        r"params\[1\] is float32 of shape \[3\] on meta; expected cpu or cuda\. Call its to_empty",
    ),
    "dtype": (
        lambda: [torch.nn.Parameter(torch.ones(3).to(torch.float8_e5m2))],
        rf"params\[1\] is float8_e5m2 of shape \[3\] on {HERE}; expected one of float16, ",
    ),
    "shared": (shared_memory, rf"two parameters share memory at 0x[0-9a-f]+ on {HERE}; expected disjoint"),
    "freed": (
        freed,
        rf"params\[1\] is float32 of shape \[8\] on {HERE} and has no storage; expected memory to update",
    ),
    "integer gradient": (
        gradient_of_dtype(torch.float32, torch.int32),
        rf"params\[1\] has a gradient .*torch.int32 on {HERE}; expected .*float32 or narrower",
    ),
    "real gradient": (
        gradient_of_dtype(torch.complex64, torch.float32),
        rf"params\[1\] has a gradient .*torch.float32 on {HERE}; expected .*complex64 or narrower",
    ),
    "wide gradient": (
        wide_gradient,
        rf"params\[1\] has a gradient .*torch.float64 on {HERE}; expected .*float32 or narrower",
    ),
}


@pytest.mark.parametrize("name", BAD_PARAMS)
def test_parameters_that_cannot_be_stepped_are_refused(name):
    """Guards the errors of a step: each time, also where states exist; the good parameter before it didn't
    move.
    """
    make, message = BAD_PARAMS[name]
    good, bad = torch.nn.Parameter(torch.ones(3)), make()
    optimizer = optim.SGD([good, *bad], lr=0.1)
    for p in (good, *bad):
        if p.grad is None and not hasattr(p, "main_grad"):
            p.grad = torch.ones_like(p)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"\[SGD\].*{message}"):
            optimizer.step()
        assert torch.equal(good, torch.ones(3))


@pytest.mark.parametrize("complex_", [False, True])
def test_a_parameter_given_twice_is_refused(complex_):
    """Guards a double step: in one group, in two, and in a list that was edited later."""
    param, other = make_params(torch.complex64 if complex_ else torch.float32, [(3,), (3,)])
    for params in ([param, param], [("a", param), ("b", param)]):
        with pytest.raises(
            ValueError, match=r"\[AdamW\] group 0: a parameter is given twice; expected it once"
        ):
            optim.AdamW(params)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optim.AdamW([{"params": [param]}, {"params": [param]}])
    optimizer = optim.AdamW([param, other])
    set_grads([param, other], 0)
    optimizer.step()
    before = bits(param)
    optimizer.param_groups[0]["params"].append(param)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\[AdamW\] group 0: params\[2\] is in the optimizer twice"):
            optimizer.step()
    assert bits(param) == before


@pytest.mark.parametrize("shape", [(2, 3), (6, 4)])  # the second keeps its strides
def test_a_state_of_another_shape_is_refused(shape):
    """Guards parameters that were resized after their state was made."""
    param, optimizer = one()
    optimizer.step()
    param.grad = None
    param.data = torch.ones(shape)
    param.grad = torch.ones(shape)
    with pytest.raises(ValueError, match=r"params\[0\] has state 'exp_avg' of shape \[4, 4\].*; expected \["):
        optimizer.step()
    assert torch.equal(param, torch.ones(shape))
