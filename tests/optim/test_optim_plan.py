"""The plan of a repeated step: one call per device for all groups, one walk that sees every change."""

import copy
import math

import pytest
import torch
from fusedamp import _C, optim
from fusedamp.tensors import addresses

DIRECT = _C.reads_directly()


@pytest.fixture(params=["direct", "dlpack"], autouse=True)
def reading(request):
    """Both ways of reading tensors; the first one where torch's functions were found."""
    if request.param == "direct" and not DIRECT:
        pytest.skip("torch's own functions were not found")
    _C.read_directly(request.param == "direct")
    yield
    _C.read_directly(True)


def make(groups=3, dtype=torch.float32, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3 + i).to(dtype)) for i in range(2 * groups)]
    made = optim.AdamW([{"params": params[i::groups], "lr": 0.1 / (i + 1)} for i in range(groups)], **options)
    return params, made


def give_grads(params, step):
    torch.manual_seed(step)
    for param in params:
        param.grad = torch.randn_like(param)


def warm(steps=3, **options):
    params, optimizer = make(**options)
    for step in range(steps):
        give_grads(params, step)
        optimizer.step()
    assert optimizer._plan is not None
    give_grads(params, steps)
    return params, optimizer


def looks(optimizer, versioned=False):
    return optimizer._plan._walk.look(optimizer.param_groups, versioned)


def test_one_call_for_all_groups(monkeypatch):
    """Also of two update rules, with and without masters."""
    _, optimizer = make(dtype=torch.bfloat16)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "amsgrad": True})
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(3):
        give_grads(everything, step)
        optimizer.step()
    calls = []
    table = optimizer._plan._tables[0][0]
    step = type(table).step
    monkeypatch.setattr(type(table), "step", lambda *args: calls.append(args) or step(*args))
    give_grads(everything, 3)
    optimizer.step()
    assert len(calls) == len(optimizer._plan._tables) == 1
    assert all(float(optimizer.state[p]["step"]) == 4 for p in everything)


def test_schedules_of_all_kinds_are_taken():
    """Guards new options in a kept table: the same as an optimizer that remembers nothing."""
    results = []
    for forgets in (False, True):
        params, optimizer = make()
        schedules = [
            torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2, 0.3], total_steps=12),  # betas, too
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
        ]
        for step in range(10):
            give_grads(params, step)
            if forgets:
                optimizer._forget()
            optimizer.step()
            schedules[step % 2].step()
            if step == 7:
                optimizer.param_groups[1]["weight_decay"] = 0.5
                optimizer.param_groups[2]["lr"] = torch.tensor(0.25)
            if step == 8:
                optimizer.param_groups[2]["lr"].fill_(0.75)  # in place
            if step == 5:
                optimizer.param_groups[0]["maximize"] = True
        assert forgets or optimizer._plan is not None
        results.append(params)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("lr", [-1.0, math.nan, math.inf, 1e39, "0.1", None, [0.1]])
def test_options_that_are_unusable_change_nothing(lr):
    params, optimizer = warm()
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[2]["lr"] = lr
    with pytest.raises((ValueError, TypeError), match=r"^\[AdamW\] group 2: lr is "):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    optimizer.param_groups[2]["lr"] = 0.5
    optimizer.step()
    assert not any(map(torch.equal, params, before))


def test_the_walk_reports_options_and_writes_rates():
    _, optimizer = warm()
    assert looks(optimizer) == ()
    optimizer.param_groups[1]["lr"] = 0.375
    assert looks(optimizer) == ()
    table = optimizer._plan._tables[0][0]
    assert [table._numbers[g * 13 + 8] for g in range(3)] == [0.1, 0.375, 0.1 / 3]
    optimizer.param_groups[1]["eps"] = 1e-3
    optimizer.param_groups[2]["lr"] = 1  # no float: the checks must see it
    assert looks(optimizer) == (1, 2)
    optimizer.param_groups[0]["name"] = "first"
    assert looks(optimizer) == (0, 1, 2)
    optimizer.step()
    assert looks(optimizer) == ()


def replaced_gradient(params):
    params[0].grad = params[0].grad.clone()


def moved_gradient(params):
    params[0].grad.data = params[0].grad.data.clone()


HARMLESS = [replaced_gradient, moved_gradient]


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.__name__)
def test_gradients_may_move(change):
    params, optimizer = warm()
    change(params)
    assert looks(optimizer) == ()
    column = optimizer._plan._tables[0][0].fields[0].tolist()
    assert sorted(column) == sorted(param.grad.data_ptr() for param in params)


class Sub(torch.Tensor):
    pass


class Wrapped(torch.Tensor):
    """Has no memory of its own, as DTensors."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map_only(cls, lambda t: t.inner, args)
        return func(*plain, **(kwargs or {}))


def lost(params, optimizer):
    params[0].grad = None


def resized(params, optimizer):
    params[0].grad.data = params[0].grad.data[:2]


def cast(params, optimizer):
    params[0].grad.data = params[0].grad.data.double()


def gapped(params, optimizer):
    params[1].grad = torch.randn(2 * params[1].numel())[::2]


def expanded(params, optimizer):
    params[1].grad = torch.randn(1).expand(params[1].numel())


def negated(params, optimizer):
    params[1].grad = torch._neg_view(params[1].grad)


def sparse(params, optimizer):
    params[1].grad = params[1].grad.to_sparse()


def wrapped(params, optimizer):
    params[1].grad = Wrapped(params[1].grad)


def no_list(params, optimizer):
    optimizer.param_groups[0]["params"] = tuple(optimizer.param_groups[0]["params"])


def longer(params, optimizer):
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.ones(1)))


def shorter(params, optimizer):
    optimizer.param_groups[0]["params"].pop()


def swapped(params, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def moved(params, optimizer):
    params[2].data = params[2].data.clone()


def copied(params, optimizer):
    optimizer.param_groups[0]["params"][0] = copy.deepcopy(params[0])


def one_group_less(params, optimizer):
    optimizer.param_groups.pop()


def test_groups_that_are_no_list_are_stepped_the_long_way():
    params, optimizer = warm()
    other, plain = warm()
    optimizer.param_groups = tuple(optimizer.param_groups)
    for step in range(3, 6):
        for some, one in ((params, optimizer), (other, plain)):
            give_grads(some, step)
            one.step()
    assert optimizer._plan is None
    assert all(map(torch.equal, params, other))


@pytest.mark.parametrize(
    "change",
    [lost, resized, cast, gapped, expanded, negated, sparse, wrapped, no_list, longer, shorter, swapped,
     moved, copied, one_group_less],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_what_is_more_than_new_gradients(change):
    params, optimizer = warm()
    assert looks(optimizer) == ()
    change(params, optimizer)
    assert looks(optimizer) is None


def test_subclasses_with_memory_are_read_or_left_to_the_long_way():
    params, optimizer = warm()
    grad = params[0].grad.clone()
    params[0].grad = params[0].grad.as_subclass(Sub)
    other, plain = warm()
    other[0].grad = grad
    optimizer.step()
    plain.step()
    assert torch.equal(params[0], other[0])


def test_a_gradient_that_comes_is_seen():
    params, optimizer = make()
    for step in range(3):
        give_grads(params[1:], step)
        optimizer.step()
    assert optimizer._plan is not None
    assert looks(optimizer) == ()
    params[0].main_grad = torch.ones(3)
    assert looks(optimizer) is None
    del params[0].main_grad
    assert looks(optimizer) == ()
    params[0].grad = torch.ones(3)
    assert looks(optimizer) is None


def test_marks():
    """Guards the scaler's question whether gradients are as they were checked."""
    params, optimizer = warm()
    walk = optimizer._plan._walk
    assert looks(optimizer, True) == ()
    first = walk.mark()
    assert walk.is_as_marked(first)
    looks(optimizer, True)
    assert walk.is_as_marked(first)
    params[0].grad.add_(1)
    looks(optimizer, True)
    assert not walk.is_as_marked(first)
    second = walk.mark()
    assert walk.is_as_marked(second)
    assert not walk.is_as_marked(first)  # of an earlier mark nothing is known
    old = params[1].grad
    params[1].grad = old.clone()
    looks(optimizer, True)
    assert not walk.is_as_marked(second)
    params[1].grad = old
    looks(optimizer, True)
    assert walk.is_as_marked(second)


def test_gradients_of_inference_mode_have_no_version():
    params, optimizer = warm()
    with torch.inference_mode():
        params[0].grad = torch.ones(3)
    assert looks(optimizer, True) is None


def test_no_param_is_kept_alive_by_the_walk():
    params, optimizer = warm()
    optimizer.state.clear()
    import weakref

    refs = [weakref.ref(param) for param in params]
    optimizer.param_groups.clear()
    optimizer.zero_grad()
    del params
    assert not [ref for ref in refs if ref() is not None]


def test_reading_is_bound_to_known_answers():
    """If torch's functions disagree, or one is missing, DLPack is used."""
    leaves = [torch.ones(2, requires_grad=True) for _ in range(4)]
    for leaf in leaves[:2]:
        leaf.grad = torch.ones(2)
    exchange, pairs = torch.Tensor.__dlpack_c_exchange_api__, addresses._negated
    try:
        # No leaf without a gradient: what stands for none is not known.
        assert _C.bind_tensors(torch.Tensor, torch.nn.Parameter, exchange, pairs, leaves[:2])
        assert not _C.reads_directly()
        _C.read_directly(True)
        assert not _C.reads_directly()
        _, optimizer = warm()
        optimizer.step()
        assert optimizer._plan is not None
    finally:
        _C.bind_tensors(torch.Tensor, torch.nn.Parameter, exchange, pairs, leaves)
        assert _C.reads_directly() == DIRECT


def test_torchs_functions_are_found_in_known_versions():
    """Guards against a search that depends on what lies in memory: it would fall back without a trace."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    assert DIRECT or version > (2, 14)


def test_lists_that_change_in_place_are_seen():
    """As JSON brings betas; nothing but the list's content tells."""
    results = []
    for forgets in (False, True):
        params, optimizer = make()
        optimizer.param_groups[0]["betas"] = [0.9, 0.99]
        for step in range(6):
            give_grads(params, step)
            if forgets:
                optimizer._forget()
            if step == 4:
                optimizer.param_groups[0]["betas"][0] = 0.5
            optimizer.step()
        results.append(params)
    assert all(map(torch.equal, *results))
