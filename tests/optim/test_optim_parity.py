"""The optimizers compute what their papers say, to counted roundings, and what torch.optim computes."""

import copy

import pytest
import tolerances
import torch
from cases import BY_NAME, CASES, COMPOSED, MAIN, WITH_TORCH, Case, make_params, set_grads, torch_scalars
from tolerances import unit

STEPS = 20
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def run(case: Case, optimizer_class, params, steps=STEPS, **more):
    optimizer = optimizer_class(params, **case.options, **more)
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    return optimizer


class Trajectory:
    """The reference's path for one parameter, and how far a computation in another precision may leave it."""

    def __init__(self, case: Case, param: torch.Tensor):
        self.case, self.p, self.state = case, param.detach().double(), {}
        self.largest = torch.zeros_like(self.p)  # |g| + |decay|, as if they never canceled
        self.units = torch.zeros_like(self.p)  # the bound of the error, in units of u
        self.exact_units = torch.zeros_like(self.p)  # that of coefficients, which are always made in FP64
        self.sure = torch.ones_like(self.p, dtype=torch.bool)  # whether roundings cannot change the branch

    def step(self, grad: torch.Tensor) -> None:
        options = self.case.options
        self.largest = torch.maximum(
            self.largest, grad.double().abs() + options["weight_decay"] * self.p.abs()
        )
        self.p = self.case.reference(self.p, grad.double(), self.state, **options)
        update = options["lr"] * self.case.terms(self.largest, self.state, options)
        self.units += 2 * (self.p.abs() + update) + self.case.roundings * update
        self.exact_units += self.state.get("condition", 0.0) * update
        if self.case.kink:
            kink = 5 * (self.state["step"] + 1) * unit(torch.float32) * self.largest
            self.sure &= self.state[self.case.kink].abs() > kink

    def p_tolerance(self, dtype: torch.dtype) -> torch.Tensor:
        bound = unit(dtype) * self.units + unit(torch.float64) * self.exact_units
        return torch.where(self.sure, bound, torch.inf)

    def state_tolerance(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Of the state ``name``."""
        weight = self.p_tolerance(dtype) / unit(dtype)
        error = tolerances.state_error(name, self.largest, weight, self.state, self.case.options)
        return unit(dtype) * error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case, dtype):
    """Guards every formula: weights (or their masters) and states against independent FP64 ones."""
    params = make_params(dtype)
    references = [Trajectory(case, p) for p in params]
    for step in range(STEPS):
        for reference, grad in zip(references, set_grads(params, step), strict=True):
            reference.step(grad)
    optimizer = run(case, case.ours, params)
    math_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert sum(int(reference.sure.sum()) for reference in references) > 0.99 * sum(p.numel() for p in params)
    for param, reference in zip(params, references, strict=True):
        state = optimizer.state[param]
        weight = state.get("master", param.detach())
        assert weight.dtype == math_dtype
        error = (weight.double() - reference.p).abs()
        assert (error <= reference.p_tolerance(math_dtype)).all(), error.max()
        assert state["step"] == STEPS
        names = [name for name in case.states if name in reference.state]
        assert {*state} - {"step", "master"} == {*names}
        for name in names:
            error = (state[name].double() - reference.state[name]).abs()
            assert state[name].dtype == (torch.float64 if name in case.scalars else math_dtype)
            assert (error <= reference.state_tolerance(name, math_dtype)).all(), (name, error.max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_param_is_the_rounded_master(case, dtype):
    """Guards the rounding: after every step params equal round(master) bit for bit."""
    params = make_params(dtype)
    optimizer = case.ours(params, **case.options)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
        for param in params:
            assert torch.equal(param, optimizer.state[param]["master"].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", MAIN + COMPOSED, ids=str)
def test_without_master_each_step_rounds_once(case, dtype):
    """Guards master_weights="none": FP32 arithmetic on the 16-bit weight, then one rounding."""
    params = make_params(dtype)
    optimizer = case.ours(params, **case.options, master_weights="none")
    references = [Trajectory(case, p) for p in params]
    for step in range(5):
        for param, reference in zip(params, references, strict=True):
            reference.p = param.detach().double()
        for reference, grad in zip(references, set_grads(params, step), strict=True):
            reference.step(grad)
        optimizer.step()
        for param, reference in zip(params, references, strict=True):
            assert "master" not in optimizer.state[param]
            error = (param.detach().double() - reference.p).abs()
            smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps / 2
            one_rounding = torch.finfo(dtype).eps / 2 * reference.p.abs() + smallest
            assert (error <= one_rounding * 1.0001 + reference.p_tolerance(torch.float32)).all()


@pytest.mark.parametrize("case", WITH_TORCH, ids=str)
def test_reference_matches_torch_in_fp64(case):
    """Guards the reference itself: torch.optim in FP64 agrees to FP64 roundings."""
    params = make_params(torch.float64)
    references = [Trajectory(case, p) for p in params]
    for step in range(STEPS):
        for reference, grad in zip(references, set_grads(params, step), strict=True):
            reference.step(grad)
    with torch_scalars(torch.float64):
        run(case, case.torch, params, foreach=False)
    for param, reference in zip(params, references, strict=True):
        error = (param.detach() - reference.p).abs()
        assert (error <= 2 * reference.p_tolerance(torch.float64)).all(), error.max()


@pytest.mark.parametrize("case", WITH_TORCH, ids=str)
def test_matches_torch_in_fp32(case):
    """Guards the drop-in: FP32 weights agree with torch.optim's to the roundings of both."""
    ours, theirs = make_params(torch.float32), make_params(torch.float32)
    references = [Trajectory(case, p) for p in ours]
    for step in range(STEPS):
        for reference, grad in zip(references, set_grads(ours, step), strict=True):
            reference.step(grad)
    run(case, case.ours, ours)
    run(case, case.torch, theirs)
    for mine, its, reference in zip(ours, theirs, references, strict=True):
        error = (mine - its).detach().double().abs()
        assert (error <= 3 * reference.p_tolerance(torch.float32)).all(), error.max()


@pytest.mark.parametrize("case", MAIN + COMPOSED, ids=str)
def test_mixed_dtypes_in_one_optimizer(case):
    """Guards the grouping: every parameter of a mixed list ends as it does in an optimizer of its own."""
    mixed = [p for dtype in DTYPES for p in make_params(dtype)]
    alone = copy.deepcopy(mixed)
    optimizer = case.ours([{"params": mixed[1::2]}, {"params": mixed[::2]}], **case.options)
    singles = [case.ours([p], **case.options) for p in alone]
    for step in range(3):
        set_grads(mixed, step)
        for single, p, q in zip(singles, alone, mixed, strict=True):
            p.grad = q.grad.clone()
            single.step()
        optimizer.step()
    for p, q, single in zip(mixed, alone, singles, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, single.state[q][name]), name


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_gradient_dtype_may_differ(case, dtype, grad_dtype):
    """Guards p.grad_dtype, which every torch optimizer refuses: the step is that of the gradient's exact
    values.
    """
    params, exact = make_params(dtype), make_params(dtype)
    optimizer, same = case.ours(params, **case.options), case.ours(exact, **case.options)
    for p, q in zip(params, exact, strict=True):
        p.grad_dtype = grad_dtype
        p.grad = torch.full_like(p, 0.375, dtype=grad_dtype)
        q.grad = torch.full_like(q, 0.375)
    optimizer.step()
    same.step()
    for p, q in zip(params, exact, strict=True):
        assert torch.equal(p, q)


def test_late_gradients_have_their_own_bias_correction():
    """Guards the step count per parameter: a first gradient at step 6 gives the step that it gives at step
    1.
    """
    case = BY_NAME["adamw"]
    early, late = torch.nn.Parameter(torch.ones(9)), torch.nn.Parameter(torch.ones(9))
    optimizer = case.ours([early, late], **case.options)
    early.grad = torch.linspace(0.1, 1, 9)
    optimizer.step()
    first = early.detach().clone()
    for _ in range(5):
        optimizer.step()
    assert late not in optimizer.state
    late.grad = early.grad.clone()
    optimizer.step()
    assert torch.equal(late, first)
    assert optimizer.state[late]["step"] == 1
    assert optimizer.state[early]["step"] == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_steps_stall_without_masters_only(dtype):
    """Guards the purpose of masters: 1000 steps of 1e-4 from 1.0 must end where FP32 does."""
    ends = {}
    for name, param_dtype, mode in [
        ("fp32", torch.float32, "auto"),
        ("master", dtype, "auto"),
        ("none", dtype, "none"),
    ]:
        param = torch.nn.Parameter(torch.ones(8, dtype=param_dtype))
        param.grad = torch.ones_like(param)
        optimizer = BY_NAME["adamw"].ours([param], lr=1e-4, weight_decay=0.0, master_weights=mode)
        for _ in range(1000):
            optimizer.step()
        ends[name] = optimizer.state[param].get("master", param.detach())
    assert torch.equal(ends["master"], ends["fp32"])
    assert (ends["master"] - 0.9).abs().max() < 1e-3
    assert (ends["none"] == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_second_moments_of_16_bit_parameters_do_not_stall(dtype):
    """Guards FP32 states: 2000 gradients of 1 bring v to 1 - 0.999^2000; BF16 states stall before it."""
    param = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = BY_NAME["adamw"].ours([param], lr=0.0)
    for _ in range(2000):
        optimizer.step()
    assert (optimizer.state[param]["exp_avg_sq"] - (1 - 0.999**2000)).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [case for case in MAIN if case.name != "novograd"], ids=str
)  # it divides by |g|
def test_nan_is_not_hidden(case, dtype):
    """Guards steps without a scaler: a NaN gradient reaches its weight and states, and no other element."""
    param = torch.nn.Parameter(torch.ones(9, dtype=dtype))
    param.grad = torch.ones_like(param)
    param.grad[4] = float("nan")
    optimizer = case.ours([param], **case.options)
    optimizer.step()
    for name, value in [("param", param), *optimizer.state[param].items()]:
        if name != "step" and name not in case.scalars:
            assert value.isnan().tolist() == [i == 4 for i in range(9)], name
