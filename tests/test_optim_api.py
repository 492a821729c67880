"""The optimizers as a user of torch.optim meets them: constructors, groups, hooks, closures, schedulers,
errors.
"""

import copy
import inspect
import warnings

import pytest
import torch
from cases import MAIN, bits, make_params, set_grads
from fusedamp import optim
from torch.optim.optimizer import register_optimizer_step_post_hook

PAIRS = [(optim.AdamW, torch.optim.AdamW), (optim.Adam, torch.optim.Adam), (optim.SGD, torch.optim.SGD)]


def one(dtype=torch.float32, **options):
    """A parameter with a gradient, and its AdamW."""
    param = torch.nn.Parameter(torch.ones(4, 4, dtype=dtype))
    param.grad = torch.ones_like(param)
    return param, optim.AdamW([param], **options)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_constructors_are_torchs(ours, theirs):
    """Guards the two-line diff: same arguments, order, kinds and defaults, then keyword-only
    master_weights.
    """
    expected = [(p.name, p.kind, p.default) for p in inspect.signature(theirs).parameters.values()]
    got = [(p.name, p.kind, p.default) for p in inspect.signature(ours).parameters.values()]
    extra = ("master_weights", inspect.Parameter.KEYWORD_ONLY, "auto")
    keyword_only = [p for p in expected if p[1] is inspect.Parameter.KEYWORD_ONLY]
    assert got[: len(expected) - len(keyword_only)] == expected[: len(expected) - len(keyword_only)]
    assert set(got) == {*expected, extra}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_classes_are_what_trainers_expect(ours, theirs):
    """Guards Lightning and Accelerate (no _step_supports_amp_scaling) and Dynamo (no _init_group)."""
    optimizer = ours(make_params(torch.float32), foreach=False, fused=True)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert not isinstance(optimizer, theirs)
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    assert not hasattr(optimizer, "_init_group")
    assert not hasattr(optimizer, "is_second_order")
    assert inspect.ismethod(optimizer.step)


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_nothing_is_built_before_the_first_step(case):
    """Guards trainers that rewrite param_groups after construction (FSDP2, DeepSpeed), also between steps."""
    params, swapped, again = (make_params(torch.bfloat16, seed=s) for s in range(3))
    optimizer = case.ours(params, **case.options)
    assert not optimizer.state
    for new in (swapped, again):
        optimizer.param_groups[0]["params"] = new
        set_grads(new, 0)
        before = [bits(p) for p in params]
        optimizer.step()
        assert [bits(p) for p in params] == before
        assert set(optimizer._slots) == {id(p) for p in new}  # nothing keeps the old parameters alive
        assert all(optimizer.state[p]["step"] == 1 for p in new)


def test_groups_options_and_names():
    """Guards add_param_group, options per group and named parameters."""
    a, b, c = make_params(torch.float32, [(3,), (4,), (5,)])
    optimizer = optim.AdamW([("a", a)], lr=0.1)
    optimizer.add_param_group({"params": iter([("b", b)]), "lr": 0.0, "master_weights": "none"})
    optimizer.add_param_group({"params": (("c", c),), "betas": (0.5, 0.5)})
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    before = b.detach().clone()
    optimizer.step()
    assert torch.equal(b, before)
    assert [g["param_names"] for g in optimizer.param_groups] == [["a"], ["b"], ["c"]]
    assert optimizer.param_groups[2]["betas"] == (0.5, 0.5)
    optimizer.zero_grad()
    assert a.grad is None
    optimizer.step()  # no gradients: nothing to do
    assert optimizer.state[a]["step"] == 1
    a.grad = torch.ones_like(a)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(a.grad, torch.zeros_like(a))
    assert "master_weights: none" in repr(optimizer)
    single = optim.SGD([a])
    single.add_param_group({"params": b})
    assert single.param_groups[1]["params"] == [b]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_hooks_run_once(ours, theirs):
    """Guards against doubled hooks, which subclasses of torch's optimizers get; in any order of
    construction.
    """
    calls = []
    for kind in (optim.AdamW, optim.SGD, optim.Adam, ours):
        param = torch.nn.Parameter(torch.ones(2))
        param.grad = torch.ones(2)
        optimizer = kind([param], lr=0.1)
        optimizer.register_step_pre_hook(lambda *a: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *a: calls.append("post"))
        handle = register_optimizer_step_post_hook(lambda *a: calls.append("all"))
        optimizer.step()
        handle.remove()
        assert calls == ["pre", "post", "all"]
        calls.clear()


def test_closure():
    """Guards step(closure): gradients are enabled in it, its loss is returned, the new gradient is used."""
    param = torch.nn.Parameter(torch.full((3,), 2.0))
    optimizer = optim.SGD([param], lr=0.25)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 12
    assert torch.equal(param, torch.ones(3))
    assert optimizer.step() is None


@pytest.mark.parametrize("case", MAIN, ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers_and_tensor_learning_rates(case, as_tensor):
    """Guards schedulers without a warning, and tensors that are filled in place: read at each step, never
    rebound.
    """
    ends = []
    for kind in (case.ours, case.torch):
        params = make_params(torch.float64)
        lr = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
        optimizer = kind(params, **{**case.options, "lr": lr})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=0.1, total_steps=8, cycle_momentum=False
            )
            for s in range(6):
                set_grads(params, s)
                optimizer.step()
                scheduler.step()
        assert (optimizer.param_groups[0]["lr"] is lr) == as_tensor
        ends.append(params)
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_lr_tensor_of_one_element_and_dtypes():
    """Guards the forms of a tensor learning rate: any floating dtype, shape [] or [1]; numpy numbers too."""
    import numpy as np

    ends = []
    for lr in (0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5).double(), np.float32(0.5)):
        param, optimizer = one(lr=lr)
        optimizer.step()
        ends.append(param.detach())
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_gradient_accumulation():
    """Guards backward several times before a step: the accumulated gradient counts, and one step is taken."""
    param, optimizer = one()
    twin = copy.deepcopy(param)
    param.grad = None
    for _ in range(4):
        (param * 0.5).sum().backward()
    twin.grad = torch.full_like(twin, 2.0)
    optimizer.step()
    optim.AdamW([twin]).step()
    assert torch.equal(param, twin)


def test_sparse_gradients():
    """Guards embeddings: SGD makes their gradients dense, Adam refuses them as torch does, before any
    step.
    """
    for kind in (optim.SGD, optim.Adam, optim.AdamW):
        dense, table = torch.nn.Parameter(torch.ones(3)), torch.nn.Embedding(5, 3, sparse=True)
        before = table.weight.detach().clone()
        optimizer = kind([dense, table.weight], lr=0.5)
        (table(torch.tensor([1, 1, 4])).sum() + dense.sum()).backward()
        if kind is optim.SGD:
            optimizer.step()
            expected = before - 0.5 * torch.tensor([0.0, 2, 0, 0, 1])[:, None]
            assert torch.equal(table.weight, expected)
        else:
            with pytest.raises(
                RuntimeError, match="does not support sparse gradients, please consider SparseAdam"
            ):
                optimizer.step()
            assert torch.equal(dense, torch.ones(3))


def test_main_grad():
    """Guards FP32 gradients that a trainer keeps in main_grad: used where grad is None, and only there."""
    param, optimizer = one(torch.bfloat16)
    twin, expected = one(torch.bfloat16)
    param.grad, param.main_grad = None, torch.full((4, 4), 0.3)
    twin.grad = None
    twin.grad_dtype = torch.float32
    twin.grad = torch.full((4, 4), 0.3)
    optimizer.step()
    expected.step()
    assert torch.equal(optimizer.state[param]["master"], expected.state[twin]["master"])
    param.main_grad = torch.ones(16)
    with pytest.raises(
        ValueError, match=r"\[AdamW\] group 0: params\[0\] has a main_grad of shape \[16\]; expected"
    ):
        optimizer.step()


def test_compiled_callers_are_not_wrong():
    """Guards torch.compile: a step inside a compiled function runs eagerly and counts each time."""
    param, optimizer = one(torch.bfloat16)
    twin, expected = one(torch.bfloat16)

    @torch.compile(backend="eager")
    def train(scale):
        param.grad = torch.ones_like(param) * scale
        optimizer.step()
        return param.sum()

    for scale in (1.0, 0.5, 0.25):
        twin.grad = torch.ones_like(twin) * scale
        expected.step()
        assert train(torch.tensor(scale, dtype=torch.bfloat16)) == twin.sum()
    assert optimizer.state[param]["step"] == 3
    assert torch.equal(param, twin)


BAD_OPTIONS = [
    (optim.AdamW, {"lr": -0.1}, r"lr is -0.1; expected a finite number >= 0"),
    (optim.AdamW, {"lr": float("nan")}, r"lr is nan; expected a finite number >= 0"),
    (optim.AdamW, {"lr": torch.ones(2)}, r"lr is a tensor of shape \[2\]; expected one element"),
    (optim.AdamW, {"lr": torch.tensor(-1.0)}, r"lr is -1.0; expected"),
    (optim.AdamW, {"lr": "1e-3"}, r"lr is '1e-3' \(str\); expected a number"),
    (optim.AdamW, {"eps": -1e-8}, r"eps is -1e-08; expected a finite number >= 0"),
    (optim.AdamW, {"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0; expected a number < 1 >= 0"),
    (optim.AdamW, {"betas": (0.9, -0.1)}, r"betas\[1\] is -0.1"),
    (optim.AdamW, {"betas": (0.9,)}, r"betas is \(0.9,\); expected two numbers"),
    (optim.Adam, {"weight_decay": -1}, r"weight_decay is -1; expected"),
    (optim.Adam, {"differentiable": True}, r"differentiable is True; expected False"),
    (
        optim.Adam,
        {"master_weights": "fp16"},
        r"master_weights is 'fp16'; expected one of \('auto', 'fp32', 'none'\)",
    ),
    (optim.SGD, {"momentum": -0.5}, r"momentum is -0.5; expected"),
    (optim.SGD, {"dampening": float("inf"), "momentum": 0.9}, r"dampening is inf; expected"),
    (optim.SGD, {"nesterov": True}, r"nesterov is True with momentum 0 and dampening 0; expected"),
    (optim.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, r"nesterov is True with momentum 0.9"),
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
        r"params\[1\] is float32 of shape \[3\] on cpu with strides \[0\], so that elements share an address",
    ),
    "meta": (
        lambda: [torch.nn.Parameter(torch.ones(3, device="meta"))],
        r"params\[1\] is float32 of shape \[3\] on meta; expected cpu or cuda",
    ),
    "dtype": (
        lambda: [torch.nn.Parameter(torch.ones(3).to(torch.float8_e5m2))],
        r"params\[1\] is float8_e5m2 of shape \[3\] on cpu; expected one of float16, ",
    ),
    "shared": (shared_memory, r"two parameters share memory at 0x[0-9a-f]+ on cpu; expected disjoint"),
    "freed": (
        freed,
        r"params\[1\] is float32 of shape \[8\] on cpu and has no storage; expected memory to update",
    ),
    "integer gradient": (
        gradient_of_dtype(torch.float32, torch.int32),
        r"params\[1\] has a gradient .*torch.int32 on cpu; expected .*float32 or narrower",
    ),
    "real gradient": (
        gradient_of_dtype(torch.complex64, torch.float32),
        r"params\[1\] has a gradient .*torch.float32 on cpu; expected .*complex64 or narrower",
    ),
    "wide gradient": (
        wide_gradient,
        r"params\[1\] has a gradient .*torch.float64 on cpu; expected .*float32 or narrower",
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
