"""A repeated step doesn't check state without other references. Guards that code with a reference to a part
of the state, in whatever way, is noticed for as long as it is held, and that what is done with it is seen.
"""

import copy
import pickle
import weakref

import pytest
import torch
from fusedamp import optim
from fusedamp.optim.core import ownership
from torch.utils.weak import TensorWeakRef

STORAGE = [
    {},
    {"master_weights": "split", "state_dtype": torch.bfloat16},
    {"master_weights": "none", "state_dtype": "int8"},
]


def make(cls=optim.AdamW, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).bfloat16()) for n in (5, 300)]
    optimizer = cls(params, **{"lr": 1e-2, **options})
    for step in range(8):
        one_step(params, optimizer, step)
    return params, optimizer


def one_step(params, optimizer, step):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()


def is_private(optimizer):
    return optimizer._plan is not None and optimizer._plan._watch.is_private(optimizer._accesses)


@pytest.mark.parametrize("options", STORAGE, ids=["fp32", "split", "int8"])
@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, optim.LAMB, optim.NAdam])
def test_what_nobody_asked_for_is_private(cls, options):
    """Otherwise each step would check thousands of tensors for nothing."""
    momentum = {"momentum": 0.9} if cls is optim.SGD else {}
    assert is_private(make(cls, **momentum, **options)[1])


def entry_of(params, optimizer):
    return optimizer.state[params[0]]


def tensor_of(params, optimizer):
    return optimizer.state[params[0]]["exp_avg"]


HOLDERS = {
    "the state": lambda p, o: o.state,
    "the state's items": lambda p, o: o.state.items(),
    "an entry": entry_of,
    "an entry's values": lambda p, o: entry_of(p, o).values(),
    "a tensor": tensor_of,
    "a step count": lambda p, o: entry_of(p, o)["step"],
    "another tensor on its memory": lambda p, o: tensor_of(p, o).detach(),
    "its data": lambda p, o: tensor_of(p, o).data,
    "a view": lambda p, o: tensor_of(p, o).view(-1),
    "its storage": lambda p, o: tensor_of(p, o).untyped_storage(),
    "a weak reference": lambda p, o: weakref.ref(tensor_of(p, o)),
    "torch's weak reference": lambda p, o: TensorWeakRef(tensor_of(p, o)),
    "a checkpoint": lambda p, o: o.state_dict(),
    "a shallow copy": lambda p, o: copy.copy(o),
    "its attributes' state": lambda p, o: vars(o)["state"],  # who knows that much doesn't ask
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_what_somebody_holds_is_not_private(holder):
    params, optimizer = make()
    held = holder(params, optimizer)
    if vars(optimizer)["state"] is held:  # taken behind its back: noticed once it counts again
        assert optimizer.state is held
    for step in range(20):
        one_step(params, optimizer, step)
        assert not is_private(optimizer), step
    del held
    for step in range(40):  # it counts again after 1, 2, 4 ... steps
        one_step(params, optimizer, step)
    assert is_private(optimizer)


def move(tensor):
    tensor.data = tensor.data.clone()


def replace(entry):
    entry["exp_avg"] = entry["exp_avg"] * 2


CHANGES = {
    "a tensor moves": (tensor_of, move),
    "a tensor is set": (tensor_of, lambda t: t.set_(torch.full_like(t, 0.25))),
    "a tensor of an entry is exchanged": (entry_of, replace),
    "an entry is emptied": (entry_of, dict.clear),
    "the state is emptied": (lambda p, o: o.state, dict.clear),
    "memory grows": (lambda p, o: tensor_of(p, o).untyped_storage(), lambda s: s.resize_(1 << 20)),
    "memory moves to another process's reach": (
        lambda p, o: tensor_of(p, o).detach(),
        torch.Tensor.share_memory_,
    ),
    "a weakly held tensor moves": (lambda p, o: weakref.ref(tensor_of(p, o)), lambda ref: move(ref())),
}


@pytest.mark.parametrize("rest", [0, 1, 2, 7, 20])
@pytest.mark.parametrize(("take", "change"), CHANGES.values(), ids=CHANGES)
def test_a_change_by_a_holder_is_seen(take, change, rest):
    """The optimizer must give the same result as one that prepares each step from scratch."""
    ends = []
    for repeats in (True, False):
        params, optimizer = make()
        held = take(params, optimizer)
        for step in range(rest):
            one_step(params, optimizer, step)
        change(held)
        for step in range(3):
            if not repeats:
                optimizer._plan = None
            one_step(params, optimizer, 50 + step)
        ends.append([*params, *(value for param in params for value in optimizer.state[param].values())])
    for ours, expected in zip(*ends, strict=True):
        assert torch.equal(ours, expected)


def test_every_look_is_noticed():
    """Also through what torch's own methods ask for."""
    params, optimizer = make()
    looks = [
        lambda: optimizer.state,
        lambda: optimizer.state.get(params[0]),
        optimizer.state_dict,
        lambda: copy.copy(optimizer),
        lambda: copy.deepcopy(optimizer),
        lambda: pickle.dumps(optimizer),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: setattr(optimizer, "state", vars(optimizer)["state"]),
    ]
    for look in looks:
        before = optimizer._accesses
        look()
        assert optimizer._accesses > before


def test_without_torchs_counts_nothing_is_private(monkeypatch):
    """No silent guess where torch does not tell who uses a tensor."""
    monkeypatch.setattr(ownership, "_CAN_TELL", False)
    assert not is_private(make()[1])
