"""A repeated step takes addresses instead of tensors. Guards that no address can be stale and no change
unseen: whatever is done between two steps, the optimizer must end bit for bit where one ends that prepares
every step from scratch.
"""

import copy

import pytest
import torch
from cases import kept
from fusedamp.optim import SGD, AdamW

SHAPES = [(5, 4), (7,), (3, 3), (), (0,)]


def make(dtype=torch.bfloat16, cls=AdamW, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    return params, cls([{"params": params[:3]}, {"params": params[3:], "lr": 3e-2}], **options)


def give_grads(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def everything(params, optimizer):
    state = [tensor for param in params for _, tensor in sorted(kept(optimizer.state[param]).items())]
    return [tensor.detach().clone() for tensor in (*params, *state)]


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def swap_memory(params, optimizer):
    for param in params:
        param.data = param.data.clone()


def shrink(params, optimizer):
    params[0].data = params[0].data[:3]
    params[0].grad = params[0].grad[:3].clone()
    for name in ("exp_avg", "exp_avg_sq", "master"):
        optimizer.state[params[0]][name] = optimizer.state[params[0]][name][:3].clone()


def transpose(params, optimizer):
    params[2].data = params[2].data.t()
    params[2].grad = params[2].grad.t().contiguous()


def replace_state_tensor(params, optimizer):
    optimizer.state[params[1]]["exp_avg"] = torch.full((7,), 0.5)


def swap_state_memory(params, optimizer):
    state = optimizer.state[params[1]]
    state["exp_avg_sq"].data = torch.full((7,), 0.25)


def reinterpret(params, optimizer):
    params[1].data = params[1].data.view(torch.float16)
    params[1].grad = params[1].grad.to(torch.float16)


def replace_entry(params, optimizer):
    optimizer.state[params[1]] = copy.deepcopy(optimizer.state[params[1]])
    optimizer.state[params[1]]["exp_avg"].fill_(-1)


def drop_state(params, optimizer):
    del optimizer.state[params[1]]


def drop_master(params, optimizer):
    del optimizer.state[params[0]]["master"]


def reload(params, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def change_options(params, optimizer):
    for group in optimizer.param_groups:
        group.update(lr=0.5, betas=(0.8, 0.9), weight_decay=0.2, maximize=True)


def start_amsgrad(params, optimizer):
    optimizer.param_groups[0]["amsgrad"] = True


def stop_masters(params, optimizer):
    optimizer.param_groups[1]["master_weights"] = "none"


def couple_decay(params, optimizer):
    optimizer.param_groups[0]["decoupled_weight_decay"] = False


def swap_groups(params, optimizer):
    optimizer.param_groups[0]["params"] = list(reversed(optimizer.param_groups[0]["params"]))


def step_one_group(params, optimizer):
    optimizer.param_groups = optimizer.param_groups[:1]


def lose_a_gradient(params, optimizer):
    params[1].grad = None


def use_main_grad(params, optimizer):
    params[1].main_grad, params[1].grad = params[1].grad.float(), None


def stride_a_gradient(params, optimizer):
    params[0].grad = params[0].grad.t().contiguous().t()


def swap_gradient_memory(params, optimizer):
    params[0].grad.data = params[0].grad.data * 2


def write_weights(params, optimizer):
    for param in params:
        param.data.fill_(0.25)


def nothing(params, optimizer):
    pass


CHANGES = [
    nothing, reinterpret, swap_memory, shrink, transpose, replace_state_tensor,
    swap_state_memory, replace_entry, drop_state, drop_master, reload, change_options, start_amsgrad,
    stop_masters, couple_decay, swap_groups, step_one_group, lose_a_gradient, use_main_grad,
    stride_a_gradient, swap_gradient_memory, write_weights,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_change_between_steps_goes_unseen(change, monkeypatch):
    def run(repeating):
        params, optimizer = make()
        for step in range(8):
            give_grads(params, step)
            if step in (4, 6):
                change(params, optimizer)
            if not repeating:
                optimizer._plan = None
                optimizer._stepped = []
            optimizer.step()
            if step == 3:
                assert (optimizer._plan is not None) == repeating
            if step == 4 and change in (shrink, transpose, reinterpret):
                break  # a second time they would do something else
        return everything(params, optimizer)

    assert_same(run(repeating=True), run(repeating=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("cls", "options"),
    [(AdamW, {"amsgrad": True}), (SGD, {"momentum": 0.9}), (SGD, {}), (AdamW, {"master_weights": "none"})],
)
def test_repeated_steps_equal_prepared_ones(dtype, cls, options):
    one, repeated = make(dtype, cls, **options)
    two, prepared = make(dtype, cls, **options)
    for step in range(5):
        give_grads(one, step)
        give_grads(two, step)
        repeated.step()
        prepared._stepped = []
        prepared.step()
    assert repeated._plan is not None
    assert prepared._plan is None
    assert_same(everything(one, repeated), everything(two, prepared))


def test_a_repeated_step_keeps_the_promises_of_a_first_one():
    params, optimizer = make()
    for step in range(4):
        give_grads(params, step)
        versions = [param._version for param in params]
        optimizer.step()
        assert all(param._version > version for param, version in zip(params, versions, strict=True))
    assert optimizer._plan is not None
    clone = copy.deepcopy(optimizer)
    assert clone._plan is None  # addresses of another's memory
    optimizer.param_groups[0]["lr"] = -1.0
    before = everything(params, optimizer)
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    assert_same(before, everything(params, optimizer))


def test_freed_memory_is_refused():
    params, optimizer = make()
    for step in range(3):
        give_grads(params, step)
        optimizer.step()
    give_grads(params, 3)
    params[0].data.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no storage"):
        optimizer.step()


def test_a_transposed_state_is_paired_by_strides():
    """Another order at the same address is another state: the step starts from what it shows."""
    ends = []
    for contiguous in (False, True):
        params, optimizer = make()
        for step in range(3):
            give_grads(params, step)
            optimizer.step()
        state = optimizer.state[params[2]]
        turned = state["exp_avg_sq"].data.t()
        state["exp_avg_sq"].data = turned.contiguous() if contiguous else turned
        give_grads(params, 3)
        optimizer.step()
        ends.append(everything(params, optimizer))
    assert_same(*ends)
