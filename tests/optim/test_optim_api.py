"""The optimizers as a user of torch.optim meets them: constructors, groups, hooks, closures, schedulers."""

import copy
import inspect
import warnings

import pytest
import torch
from cases import COMPOSED, MAIN, WITH_TORCH, bits, make_params, set_grads, torch_scalars
from fusedamp import optim
from torch.optim.optimizer import register_optimizer_step_post_hook

PAIRS = sorted({(case.ours, case.torch) for case in WITH_TORCH}, key=str)


def one(dtype=torch.float32, **options):
    """A parameter with a gradient, and its AdamW."""
    param = torch.nn.Parameter(torch.ones(4, 4, dtype=dtype))
    param.grad = torch.ones_like(param)
    return param, optim.AdamW([param], **options)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_constructors_are_torchs(ours, theirs):
    """Guards the two-line diff: same arguments, order, passing modes and defaults, then keyword-only options
    of storage.
    """
    expected = [(p.name, p.kind, p.default) for p in inspect.signature(theirs).parameters.values()]
    got = [(p.name, p.kind, p.default) for p in inspect.signature(ours).parameters.values()]
    storage = {"master_weights": "auto", "state_dtype": "float32", "stochastic_rounding": False}
    storage["rounding_seed"] = None
    storage = storage if ours.can_compress else {"master_weights": "auto"}
    extra = {(name, inspect.Parameter.KEYWORD_ONLY, default) for name, default in storage.items()}
    keyword_only = [p for p in expected if p[1] is inspect.Parameter.KEYWORD_ONLY]
    assert got[: len(expected) - len(keyword_only)] == expected[: len(expected) - len(keyword_only)]
    assert set(got) == {*expected} | extra


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_classes_are_what_trainers_expect(ours, theirs):
    """Guards Lightning and Accelerate (no _step_supports_amp_scaling) and Dynamo (no _init_group)."""
    fused = {"fused": True} if "fused" in inspect.signature(theirs).parameters else {}
    optimizer = ours(make_params(torch.float32), foreach=False, **fused)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert not isinstance(optimizer, theirs)
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    assert not hasattr(optimizer, "_init_group")
    assert not hasattr(optimizer, "is_second_order")
    assert inspect.ismethod(optimizer.step)


@pytest.mark.parametrize("case", MAIN + COMPOSED, ids=str)
def test_nothing_is_built_before_the_first_step(case):
    """Guards trainers that rewrite param_groups after construction (FSDP2, DeepSpeed), also between steps."""
    params, swapped, again = (make_params(torch.bfloat16, seed=s) for s in range(3))
    optimizer = case.ours(params, **case.options)
    assert not optimizer.state or case.ours is optim.Adagrad  # which creates its sums immediately, as torch's
    for new in (swapped, again):
        optimizer.param_groups[0]["params"] = new
        set_grads(new, 0)
        before = [bits(p) for p in params]
        optimizer.step()
        assert [bits(p) for p in params] == before
        assert {slot.param for slot in optimizer._slots.values()} == set(new)
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


@pytest.mark.parametrize("case", [case for case in MAIN if case.torch], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers_and_tensor_learning_rates(case, as_tensor):
    """Guards schedulers without a warning, and tensors that are filled in place: read at each step, never
    rebound.
    """
    ends = []
    for kind in (case.ours, case.torch):
        params = make_params(torch.float64)
        lr = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
        plain = {"foreach": False} if kind is case.torch else {}  # else torch refuses tensors on some devices
        optimizer = kind(params, **{**case.options, "lr": lr}, **plain)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=0.1, total_steps=8, cycle_momentum=False
            )
            for s in range(6):
                set_grads(params, s)
                with torch_scalars(torch.float64):
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
