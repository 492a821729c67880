"""Bad arguments of fusedamp.nn: each error names the call, the argument, what it got and what it wanted."""

import fusedamp
import pytest
import torch
from fusedamp.nn import MLP, Linear, LinearGELU, convert, functional
from on_device import DEVICE
from torch import nn

X, WEIGHT, BIAS = torch.ones(2, 5), torch.ones(4, 5), torch.ones(4)
REFUSED = {
    "input of another width": (
        lambda: functional.linear(torch.ones(2, 3), WEIGHT),
        ValueError,
        r"\[linear\] input has shape \[2, 3\]; expected \[\.\.\., 5\], as weight \[4, 5\]",
    ),
    "0-dim input": (
        lambda: functional.linear(torch.ones(()), WEIGHT),
        ValueError,
        r"\[linear\] input has shape \[\]",
    ),
    "1-dim weight": (
        lambda: functional.linear(X, torch.ones(5)),
        ValueError,
        r"\[linear\] weight has shape \[5\]; expected \[out",
    ),
    "bias of another length": (
        lambda: functional.linear_gelu(X, WEIGHT, BIAS[:2]),
        ValueError,
        r"\[linear_gelu\] bias has shape \[2\]; expected \[4\]",
    ),
    "dtypes without autocast": (
        lambda: functional.linear(X, WEIGHT.half()),
        ValueError,
        r"\[linear\] weight is torch.float16; expected torch.float32, like input.*autocast",
    ),
    "bias in another dtype": (
        lambda: functional.linear(X, WEIGHT, BIAS.double()),
        ValueError,
        r"bias is torch.float64; expected torch.float32",
    ),
    "integers": (
        lambda: functional.linear(X.int(), WEIGHT),
        TypeError,
        r"\[linear\] input is torch.int32; expected a floating-point tensor",
    ),
    "integer weight": (
        lambda: functional.linear(X, WEIGHT.bool()),
        TypeError,
        r"\[linear\] weight is torch.bool",
    ),
    "a list": (
        lambda: functional.linear([1.0], WEIGHT),
        TypeError,
        r"\[linear\] input is a list; expected a tensor",
    ),
    "no weight": (
        lambda: functional.linear(X, None),
        TypeError,
        r"\[linear\] weight is None; expected a tensor",
    ),
    "devices": (
        lambda: functional.linear(X, WEIGHT.to("meta")),
        ValueError,
        r"\[linear\] weight is on meta; expected .*, like input",
    ),
    "mlp: second weight": (
        lambda: functional.mlp(X, WEIGHT, None, torch.ones(3, 5), None),
        ValueError,
        r"\[mlp\] w2 has shape \[3, 5\]; expected \[\.\.\., 4\], as w1 \[4, 5\]",
    ),
    "mlp: second bias": (
        lambda: functional.mlp(X, WEIGHT, None, torch.ones(3, 4), BIAS),
        ValueError,
        r"\[mlp\] b2 has shape \[4\]; expected \[3\]",
    ),
    "mlp: activation": (
        lambda: functional.mlp(X, WEIGHT, None, WEIGHT.t(), None, activation="gelu"),
        ValueError,
        r"\[mlp\] activation is 'gelu'.*gelu_tanh",
    ),
    "MLP: gelu": (
        lambda: MLP(2, 2, activation="gelu"),
        ValueError,
        r"\[MLP\] activation is 'gelu'.*Did you mean \"gelu_tanh\".*erf",
    ),
    "MLP: silu": (
        lambda: MLP(2, 2, activation="silu"),
        ValueError,
        r"\[MLP\] activation is 'silu'; expected \"gelu_tanh\" or \"relu\"",
    ),
    "Linear: grad_dtype": (
        lambda: Linear(2, 2, grad_dtype=torch.float16),
        ValueError,
        r"\[Linear\] grad_dtype is torch.float16; expected torch.float32 or None",
    ),
    "LinearGELU: grad_dtype": (
        lambda: LinearGELU(2, 2, grad_dtype="fp32"),
        TypeError,
        r"\[LinearGELU\] grad_dtype is 'fp32'",
    ),
    "convert: no module": (
        lambda: convert([nn.Linear(2, 2)]),
        TypeError,
        r"\[convert\] model is a list; expected an nn.Module",
    ),
    "convert: a class": (lambda: convert(nn.Linear), TypeError, r"\[convert\] model is the class Linear"),
    "convert: grad_dtype": (
        lambda: convert(nn.Linear(2, 2), grad_dtype=torch.bfloat16),
        ValueError,
        r"\[convert\] grad_dtype is torch.bfloat16",
    ),
    "Linear: a size": (
        lambda: Linear(4.5, 2),
        ValueError,
        r"\[Linear\] in_features is 4.5; expected a whole number",
    ),
    "Linear: negative": (
        lambda: Linear(4, -1),
        ValueError,
        r"\[Linear\] out_features is -1; expected a whole number",
    ),
    "Linear: dtype": (
        lambda: Linear(4, 4, dtype=torch.int8),
        TypeError,
        r"\[Linear\] dtype is torch.int8; expected a flo",
    ),
    "MLP: activation in the wrong place": (
        lambda: MLP(4, 8, "relu"),
        TypeError,
        r"\[MLP\] out_features is 'relu'; exp",
    ),
    "fusions: device": (
        lambda: fusedamp.nn.fusions("gpu0"),
        ValueError,
        r"\[fusions\] device is 'gpu0'; expected a device",
    ),
    "convert: fuse_gelu": (
        lambda: convert(nn.Linear(2, 2), fuse_gelu="yes"),
        TypeError,
        r"\[convert\] fuse_gelu is 'yes'",
    ),
}


PARAMETERS = {
    "width": ((torch.ones(2, 3), WEIGHT, None), r"input has shape \[2, 3\]; expected \[\.\.\., 5\]"),
    "bias": ((X, WEIGHT, BIAS[:2]), r"bias has shape \[2\]; expected \[4\]"),
    "bias of one element": ((X, WEIGHT, BIAS[:1]), r"bias has shape \[1\]; expected \[4\]"),
    "1-dim weight": ((X, torch.ones(5), None), r"weight has shape \[5\]; expected"),
    "device": ((X, WEIGHT.to("meta"), None), r"weight is on meta; expected"),
    "device of the bias": ((X, WEIGHT, BIAS.to("meta")), r"bias is on meta; expected"),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters_refused_by_name(case, autocast):
    """As modules pass them."""
    (x, *parameters), message = PARAMETERS[case]
    parameters = [None if p is None else nn.Parameter(p) for p in parameters]
    with (
        torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast),
        pytest.raises(ValueError, match=rf"\[linear\] {message}"),
    ):
        functional.linear(x, *parameters)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    call, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        call()


def test_a_16_bit_gradient_is_in_the_way():
    """Nothing is changed by the refusal."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)).bfloat16()
    net(torch.ones(1, 1).bfloat16()).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"\[convert\] weight.grad is torch.bfloat16; expected .*zero_grad\(\)"
    ):
        convert(net, grad_dtype=torch.float32)
    assert [type(m) for m in net] == [nn.Linear] * 2
    module = Linear(1, 1, dtype=torch.bfloat16)
    module(torch.ones(1, 1).bfloat16()).sum().backward()
    module.grad_dtype = torch.float32
    with pytest.raises(RuntimeError, match=r"\[Linear\] weight.grad is torch.bfloat16"):
        module(torch.ones(1, 1).bfloat16())
