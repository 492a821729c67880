"""Adafactor and Muon against torch's: constructors, checkpoints, results, extensions, errors."""

import copy
import inspect
import io

import pytest
import torch
from cases import BY_NAME, COMPOSED, bits, make_params, set_grads
from fusedamp import optim
from fusedamp.optim.muon import orthogonalized
from fusedamp.optim.state import formats
from on_device import DEVICE
from test_optim_layout import with_gaps
from test_optim_skip import amp, everything, step
from tolerances import unit
from torch.utils._python_dispatch import TorchDispatchMode

PAIRS = [(optim.Adafactor, torch.optim.Adafactor), (optim.Muon, torch.optim.Muon)]
MATRICES = [(3, 5), (16, 16), (31, 7)]
SHAPES = {optim.Adafactor: [*MATRICES, (1,), (257,), (), (4, 3, 5)], optim.Muon: MATRICES}
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}
COEFFICIENTS = (3.4445, -4.775, 2.0315)
HALVES = [torch.bfloat16, torch.float16]


def train(optimizer, params, steps) -> None:
    for s in steps:
        set_grads(params, s)
        optimizer.step()


def through_a_file(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_constructors_begin_as_torchs(ours, theirs):
    """Guards the drop-in: torch's arguments, order and defaults; whatever is ours is keyword-only."""
    expected = list(inspect.signature(theirs).parameters.values())
    got = list(inspect.signature(ours).parameters.values())
    key = [(p.name, p.kind, p.default) for p in got]
    positional = [(p.name, p.kind, p.default) for p in expected if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert key[: len(positional)] == positional
    assert all(p.kind is p.KEYWORD_ONLY for p in got[len(positional) :])
    assert {p.name for p in expected} <= {p.name for p in got}
    optimizer = ours(make_params(torch.float32, MATRICES))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_adafactor_is_torchs(dtype):
    """Guards the defaults, eps1 among them, and the arithmetic: only roundings differ."""
    shapes = SHAPES[optim.Adafactor]
    ours, theirs = make_params(dtype, shapes), make_params(dtype, shapes)
    train(optim.Adafactor(ours), ours, range(20))
    train(torch.optim.Adafactor(theirs), theirs, range(20))
    # 20 updates of at most 1e-2 * max(1, |p|), each with the roundings of a sum of 257, by both.
    tolerance = 2 * 20 * unit(dtype) * (257 * 1e-2 + 2) * 4
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_muon_is_torchs(dtype, adjust):
    """Guards momentum, decay and rate to roundings, and the directions as far as BF16 tells them."""
    ours, theirs = make_params(dtype, MATRICES), make_params(dtype, MATRICES)
    optimizer, reference = (kind(p, adjust_lr_fn=adjust, **OPTIONS)
                            for kind, p in ((optim.Muon, ours), (torch.optim.Muon, theirs)))  # fmt: skip
    for s in range(5):
        set_grads(ours, s)
        set_grads(theirs, s)
        before = [p.detach().clone() for p in ours]
        optimizer.step()
        reference.step()
        for p, q, old in zip(ours, theirs, before, strict=True):
            state, other = optimizer.state[p], reference.state[q]
            torch.testing.assert_close(
                state["momentum_buffer"], other["momentum_buffer"], rtol=8 * unit(dtype), atol=8 * unit(dtype)
            )
            kept = (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]) * old
            mine, its = (p - kept).detach(), (q - kept).detach()
            # 15 products rounded to 2**-9; an iteration multiplies errors by at most 3.9.
            assert (mine - its).norm() < 15 * 2.0**-9 * 3.9 * its.norm()
            q.data.copy_(p.data)


def test_orthogonalization_is_as_exact_as_torchs():
    """Guards the order of normalizing and rounding: no further from exact arithmetic than torch's."""
    from torch.optim import _muon

    torch.manual_seed(0)
    ours = theirs = 0.0
    for shape in ((48, 48), (20, 90), (90, 20)):
        matrix = torch.randn(shape)
        exact = orthogonalized(matrix.double(), COEFFICIENTS, 5, 1e-7, torch.float64)
        ours += (orthogonalized(matrix, COEFFICIENTS, 5, 1e-7, torch.bfloat16) - exact).norm().item()
        theirs += (_muon._zeropower_via_newtonschulz(matrix, COEFFICIENTS, 5, 1e-7) - exact).norm().item()
        assert exact.shape == shape
        sigma = torch.linalg.svdvals(exact)
        assert sigma.max() < 1.3
        assert sigma.min() > 0.5
    assert ours < 1.1 * theirs


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-20, 2.0**20, 2.0**60])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_orthogonalization_ignores_the_scale(dtype, scale):
    """Guards FP16's range: gradients are normalized before they are rounded."""
    matrix = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    one, other = (orthogonalized(m, COEFFICIENTS, 5, 0.0, dtype) for m in (matrix, matrix * scale))
    assert torch.equal(one, other)


@pytest.mark.parametrize("case", COMPOSED, ids=str)
def test_keys(case):
    """Guards drop-in checkpoints: torch's keys in state and groups, and what the docstrings add."""
    ours, theirs = case.ours, dict(PAIRS)[case.ours]
    params, others = (make_params(torch.bfloat16, SHAPES[ours]) for _ in range(2))
    optimizer, reference = ours(params, **OPTIONS), theirs(others, **OPTIONS)
    train(optimizer, params, range(1))
    train(reference, others, range(1))
    mine, its = optimizer.state_dict(), reference.state_dict()
    own = {
        "maximize",
        "use_muon",
        "adamw_betas",
        "adamw_eps",
        "ns_dtype",
        "per_shard",
        "rounding_seed",
        *formats.DEFAULTS,
    }
    keys = [key for key in mine["param_groups"][0] if key not in own - {*its["param_groups"][0]}]
    assert keys == [*its["param_groups"][0]]
    for i, entry in its["state"].items():
        assert set(mine["state"][i]) == {*entry, "step", "master"}
        for name, value in entry.items():
            assert mine["state"][i][name].shape == value.shape
            assert mine["state"][i][name].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", COMPOSED, ids=str)
def test_exchange_with_torch(case, dtype):
    """Guards both directions: training continues from fusedamp's checkpoint in torch, and the reverse."""
    ours, theirs = case.ours, dict(PAIRS)[case.ours]
    for first, second in ((ours, theirs), (theirs, ours)):
        params = make_params(dtype, SHAPES[ours])
        one, other = first(params, **OPTIONS), second(params, **OPTIONS)
        train(one, params, range(3))
        saved = through_a_file(one.state_dict())
        other.load_state_dict(saved)
        for i, p in enumerate(params):
            for name, value in saved["state"][i].items():
                assert torch.equal(other.state[p][name], value), name
        train(other, params, range(3, 5))
        if second is ours:
            assert all(other.state[p]["step"] == (5 if ours is optim.Adafactor else 3) for p in params)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", COMPOSED, ids=str)
def test_16_bit_checkpoints_of_torch_are_widened(case, dtype):
    """Guards the import of 16-bit states, whatever their shapes: they become FP32, and a master appears."""
    ours, theirs = case.ours, dict(PAIRS)[case.ours]
    params = make_params(dtype, SHAPES[ours])
    reference, optimizer = theirs(params, **OPTIONS), ours(params, **OPTIONS)
    train(reference, params, range(2))
    saved = through_a_file(reference.state_dict())
    optimizer.load_state_dict(saved)
    for i, p in enumerate(params):
        for name in set(saved["state"][i]) - {"step"}:
            assert torch.equal(optimizer.state[p][name], saved["state"][i][name].float())
    train(optimizer, params, range(2, 3))
    for p in params:
        assert torch.equal(optimizer.state[p]["master"].to(dtype), p)


@pytest.mark.parametrize("case", COMPOSED, ids=str)
def test_tensor_learning_rates(case):
    """Guards schedules on the device: a tensor is read at each step and gives what the number gives."""
    ends = []
    for lr in (0.05, torch.tensor(0.05), torch.tensor([0.05], dtype=torch.float64)):
        params = make_params(torch.bfloat16)
        optimizer = case.ours(params, **{**case.options, "lr": lr})
        train(optimizer, params, range(2))
        optimizer.param_groups[0]["lr"] = lr * 0.5
        train(optimizer, params, range(2, 4))
        ends.append([optimizer.state[p]["master"] for p in params])
    for masters in ends[1:]:
        for one, other in zip(ends[0], masters, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-7)  # 0.05 itself is rounded


@pytest.mark.parametrize("case", COMPOSED, ids=str)
def test_skipped_steps_follow_no_write(case):
    """Guards all-or-nothing for written weights too: the master keeps its bits until a step is taken."""
    params = make_params(torch.float16, [(5, 4), (7,)])
    optimizer = case.ours(params, **case.options)
    train(optimizer, params, range(2))
    with torch.no_grad():
        params[0].fill_(0.25)
    for p in params:
        p.grad.fill_(float("nan"))
    before = everything(optimizer)
    step(optimizer, amp(1.0))
    assert everything(optimizer) == before


def test_late_gradients_count_from_their_own_first_step():
    """Guards step counts per parameter, on which Adafactor's decay and rate depend."""
    early, late = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    optimizer = optim.Adafactor([early, late])
    early.grad = torch.linspace(0.1, 1, 12).view(3, 4)
    optimizer.step()
    first = early.detach().clone()
    for _ in range(3):
        optimizer.step()
    late.grad = early.grad.clone()
    optimizer.step()
    assert torch.equal(late, first)
    assert (optimizer.state[early]["step"], optimizer.state[late]["step"]) == (5, 1)


def test_weights_of_zero_move():
    """Guards eps[1]: the rate is relative to the weights, and at least to it."""
    param = torch.nn.Parameter(torch.zeros(3, 4))
    param.grad = torch.ones_like(param)
    optim.Adafactor([param], lr=0.5, eps=(None, 2.0**-10)).step()
    # All means are 1, and so is the quotient; sums of 4 and roots of 12 round.
    torch.testing.assert_close(param, torch.full_like(param, -(2.0**-11)), rtol=16 * 2.0**-24, atol=0)


def test_what_is_no_matrix_is_updated_by_adamw():
    """Guards the second algorithm in the same call: AdamW's bits and state, for matrices too if asked."""
    for dtype in (torch.float32, torch.bfloat16):
        params, twins = (make_params(dtype, [(3, 4), (5,), (), (2, 3, 2), (6, 2)]) for _ in range(2))
        optimizer = optim.Muon(
            [{"params": params[:4]}, {"params": params[4:], "use_muon": False, "lr": 0.5}],
            adamw_betas=(0.8, 0.9), adamw_eps=1e-3, **OPTIONS,
        )  # fmt: skip
        expected = optim.AdamW(
            [{"params": twins[1:4]}, {"params": twins[4:], "lr": 0.5}], betas=(0.8, 0.9), eps=1e-3, **OPTIONS
        )
        for s in range(4):
            set_grads(params, s)
            set_grads(twins, s)
            optimizer.step()
            expected.step()
        for p, q in zip(params[1:], twins[1:], strict=True):
            assert bits(p) == bits(q)
            assert optimizer.state[p].keys() == expected.state[q].keys()
            for name, value in optimizer.state[p].items():
                assert bits(value) == bits(expected.state[q][name])
        assert "momentum_buffer" in optimizer.state[params[0]]
        assert "exp_avg" not in optimizer.state[params[0]]


def test_the_algorithm_can_change():
    """Guards a group's use_muon between steps: the other algorithm starts with states of its own."""
    (param,) = make_params(torch.float32, [(3, 4)])
    optimizer = optim.Muon([param])
    train(optimizer, [param], range(2))
    optimizer.param_groups[0]["use_muon"] = False
    train(optimizer, [param], range(2, 4))
    assert {"exp_avg", "exp_avg_sq"} <= optimizer.state[param].keys()
    assert optimizer.state[param]["step"] == 4


@pytest.mark.parametrize("case", COMPOSED, ids=str)
def test_gradients_are_not_written(case):
    """Guards the fused route: afterwards gradients are as they were, scaled."""
    params = make_params(torch.float32)
    optimizer = case.ours(params, **case.options)
    set_grads(params, 0)
    before = [bits(p.grad) for p in params]
    optimizer.step()
    assert [bits(p.grad) for p in params] == before


@pytest.mark.parametrize("case", COMPOSED, ids=str)
def test_autocast_changes_nothing(case):
    """Guards a step inside torch.autocast: no product of ours is narrowed."""
    ends = []
    narrow = {"ns_dtype": torch.float32} if case.ours is optim.Muon else {}  # FP64 is out of autocast's reach
    for enabled in (False, True):
        params = make_params(torch.float32)
        optimizer = case.ours(params, **{**case.options, **narrow})
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            train(optimizer, params, range(2))
        ends.append([bits(p) for p in params])
    assert ends[0] == ends[1]


class Products(TorchDispatchMode):
    """Notes the number of elements of each matrix product."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("shape", [(64, 4), (4, 64)], ids=str)
def test_muon_multiplies_on_the_short_side(shape):
    """Guards its cost: 4 x 4 products for a matrix of 64 x 4, whichever way it lies."""
    param = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    param.grad = torch.ones_like(param)
    with Products() as products:
        optim.Muon([param], ns_steps=3).step()
    assert products.sizes == [16, 16, 256] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", COMPOSED, ids=str)
def test_parameters_with_gaps(case, dtype):
    """Guards parameters stepped on a dense copy: the result is copied back to the user's tensor."""
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    params = [torch.nn.Parameter(layout(values)) for layout in (with_gaps, torch.clone)]
    for param in params:
        optimizer = case.ours([param], **case.options)
        for s in range(3):
            param.grad = (values * (s - 1)).contiguous()
            optimizer.step()
    assert torch.equal(*params)
    assert not torch.equal(params[0], values)


def complex_parameter():
    return torch.nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))


REFUSED = [
    (optim.Adafactor, complex_parameter, {}, r"params\[1\] of shape \[3, 3\] is complex; Adafactor expected"),
    (optim.Muon, complex_parameter, {}, r"params\[1\] of shape \[3, 3\] is complex; Muon expected real"),
    (optim.Muon, lambda: torch.nn.Parameter(torch.ones(3)), {"use_muon": True},
     r"params\[1\] has shape \[3\] in a group with use_muon=True; expected two dimensions"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "make", "options", "message"), REFUSED)
def test_parameters_that_cannot_be_stepped_are_refused(kind, make, options, message):
    """Guards the errors of a step; the good parameter before it didn't move."""
    good, bad = torch.nn.Parameter(torch.ones(3, 3)), make()
    optimizer = kind([good, bad], **options)
    good.grad, bad.grad = torch.ones_like(good), torch.ones_like(bad)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"\[{kind.__name__}\] group 0: {message}"):
            optimizer.step()
        assert torch.equal(good, torch.ones(3, 3))


@pytest.mark.parametrize("case", COMPOSED, ids=str)
def test_state_of_another_shape_is_refused(case):
    """Guards loading: a checkpoint of other shapes, or of the other algorithm, is refused whole."""
    params, others = (make_params(torch.float32, shapes) for shapes in ([(3, 4), (5,)], [(4, 4), (5,)]))
    optimizer, other = case.ours(params), case.ours(others)
    train(optimizer, params, range(1))
    train(other, others, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        ValueError, match=r"load_state_dict\] state\[0\] has state .* of shape \[4, .*; expected"
    ):
        optimizer.load_state_dict(other.state_dict())
    saved = other.state_dict()
    saved["state"][0] = saved["state"][1]
    with pytest.raises(ValueError, match=r"state\[0\] has .*, without \['(row_var|momentum_buffer)"):
        optimizer.load_state_dict(saved)
    assert repr(before) == repr(optimizer.state_dict())


def test_cases_have_their_rows():
    assert {case.ours for case in COMPOSED} == set(SHAPES)
    assert BY_NAME["adafactor"] in COMPOSED
