"""Modules and convert: what stays of a model, what is refused, copies, pickles, checkpoints, optimizers.

Guards: lost ties, hooks and keys; layers that other code replaced; a grad_dtype that a copy loses; options
ignored.
"""

import copy
import io
import pickle
import warnings

import fusedamp
import pytest
import torch
from fusedamp.nn import MLP, Linear, LinearGELU, convert, fusions
from on_device import DEVICE
from torch import nn

GELU = nn.GELU("tanh")


class Own(nn.Linear):
    """A subclass, as LoRA's layers are."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.block = nn.Sequential(nn.Linear(4, 8), nn.GELU("tanh"), nn.Linear(8, 4))
        self.exact = nn.Sequential(nn.Linear(4, 4), nn.GELU())
        self.own = Own(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index):
        return self.head(self.own(self.exact(self.block(self.embedding(index)))))


def train(net, steps=2, dtype=torch.bfloat16, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=dtype):
            loss = net(torch.tensor([1, 2, 3])).float().square().mean()
        loss.backward()
        optimizer.step()
    return loss.detach()


def test_convert_changes_classes_alone():
    net = Net()
    parameters = list(net.parameters())
    keys, modules = list(net.state_dict()), dict(net.named_modules())
    seen = []
    net.head.register_forward_hook(lambda *_: seen.append(1))
    assert convert(net) is net
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))
    assert list(net.state_dict()) == keys
    assert all(m is modules[name] for name, m in net.named_modules())
    assert type(net.block[0]) is type(net.block[2]) is type(net.head) is type(net.exact[0]) is Linear
    assert type(net.own) is Own
    assert net.head.weight is net.embedding.weight
    assert isinstance(net.head, nn.Linear)
    classes = [type(m) for m in net.modules()]
    train(convert(net))
    assert [type(m) for m in net.modules()] == classes
    assert len(seen) == 2


def test_convert_of_a_layer_and_of_wrapped_models():
    assert type(convert(nn.Linear(2, 2))) is Linear
    data = nn.DataParallel(Net())
    convert(data)
    assert type(data.module.head) is Linear


def test_convert_joins_gelu():
    torch.manual_seed(0)
    net = Net()
    plain = copy.deepcopy(net)
    convert(net, fuse_gelu=True)
    assert [type(m) for m in net.block] == [LinearGELU, nn.Identity, Linear]
    assert [type(m) for m in net.exact] == [Linear, nn.GELU]
    convert(net, fuse_gelu=True)
    assert [type(m) for m in net.block] == [LinearGELU, nn.Identity, Linear]
    assert net.load_state_dict(plain.state_dict()).missing_keys == []
    index = torch.tensor([1, 2])
    assert torch.equal(net(index), plain(index))  # FP32: the same functions
    plain.load_state_dict(net.state_dict())


def joined(sequence):
    return type(convert(sequence, fuse_gelu=True)[0]) is LinearGELU


def test_what_convert_must_not_join():
    assert joined(nn.Sequential(nn.Linear(2, 2), nn.GELU("tanh")))
    assert not joined(nn.Sequential(nn.Linear(2, 2), nn.GELU()))
    assert not joined(nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.GELU("tanh")))
    for where, register in ((0, "register_forward_hook"), (1, "register_forward_pre_hook")):
        net = nn.Sequential(nn.Linear(2, 2), nn.GELU("tanh"))
        getattr(net[where], register)(lambda *_: None)
        assert not joined(net), (where, register)
    net = nn.Sequential(nn.Linear(2, 2), nn.GELU("tanh"))
    net[0].register_full_backward_hook(lambda *_: None)
    assert not joined(net)
    shared = nn.Linear(2, 2)
    assert not joined(nn.Sequential(shared, nn.GELU("tanh"), shared))  # GELU would run twice
    act = nn.GELU("tanh")  # a shared activation is replaced in its places
    net = nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act)
    assert joined(net)
    assert [type(m) for m in net] == [LinearGELU, nn.Identity] * 2

    class Owned(nn.Sequential):
        pass

    assert not joined(Owned(nn.Linear(2, 2), nn.GELU("tanh")))


def test_convert_names_what_it_leaves():
    """Their gradients stay rounded."""
    nothing = (
        r"\[convert\] nothing of Sequential was converted: it has no nn.Linear: 1 Own, whose weight gradients"
    )
    with pytest.warns(UserWarning, match=nothing):
        convert(nn.Sequential(nn.Conv2d(1, 1, 1), Own(2, 2)))
    with pytest.warns(UserWarning, match=r"nothing of Conv2d was converted: it has no nn.Linear\.$"):
        convert(nn.Conv2d(1, 1, 1))
    with pytest.warns(
        UserWarning, match=r"some layers of TransformerEncoderLayer stay as they are: 1 MultiheadA"
    ):
        convert(nn.TransformerEncoderLayer(4, 2, 8))
    with pytest.warns(UserWarning, match="1 LazyLinear.*Run one batch before convert"):
        convert(nn.Sequential(nn.LazyLinear(2)))
    for exact in (nn.Sequential(nn.Linear(2, 2), nn.GELU()), nn.Sequential(nn.Linear(2, 2))):
        with pytest.warns(UserWarning, match=r"\[convert\] fuse_gelu=True joined nothing.*LinearGELU"):
            convert(exact, fuse_gelu=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(convert(nn.Sequential(nn.Linear(2, 2))))
        convert(convert(nn.Sequential(nn.Linear(2, 2), nn.GELU("tanh")), fuse_gelu=True), fuse_gelu=True)


def test_to_plain_torch_and_back():
    """Train, save, load into nn.Linear, train there, and come back: keys, dtypes, optimizer states."""
    torch.manual_seed(0)
    net = convert(Net())
    optimizer = fusedamp.optim.AdamW(net.parameters(), lr=1e-2)
    train(net, optimizer=optimizer)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    plain = Net()
    plain.load_state_dict(saved["model"])
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    theirs.load_state_dict(saved["optimizer"])
    train(plain, optimizer=theirs)
    net.load_state_dict(plain.state_dict())
    optimizer.load_state_dict(theirs.state_dict())
    assert train(net, optimizer=optimizer).isfinite()
    with torch.no_grad():
        plain.load_state_dict(net.state_dict())
        index = torch.tensor([1])
        assert torch.equal(plain(index), net(index))


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("cls", [Linear, LinearGELU, MLP])
def test_copies_keep_float32_gradients(cls, copier):
    """torch's grad_dtype is lost by them; the module sets it again."""
    module = cls(1, 1, grad_dtype=torch.float32, dtype=torch.bfloat16)
    if copier == "deepcopy":
        other = copy.deepcopy(module)
    elif copier == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    other(torch.ones(3, 1).bfloat16()).sum().backward()
    assert {p.grad.dtype for p in other.parameters()} == {torch.float32}
    assert "grad_dtype=torch.float32" in repr(other)


def test_old_pickles_of_linear_layers_convert():
    module = pickle.loads(pickle.dumps(convert(nn.Linear(2, 2))))
    assert type(module) is Linear
    assert module.grad_dtype is None


@pytest.mark.parametrize("move", ["to", "bfloat16", "load_state_dict", "data"])
def test_grad_dtype_survives_moves(move):
    module = Linear(1, 1, grad_dtype=torch.float32, dtype=torch.float16)
    if move == "to":
        module.to(torch.bfloat16)
    elif move == "bfloat16":
        module.float().bfloat16()
    elif move == "load_state_dict":
        module.load_state_dict(Linear(1, 1).state_dict(), assign=True)
        module.half()
    else:
        module.weight.data = module.weight.data.clone()
    module(torch.ones(3, 1, dtype=module.weight.dtype)).sum().backward()
    assert module.weight.grad.dtype is torch.float32


def test_convert_with_grad_dtype():
    net = convert(Net().bfloat16(), grad_dtype=torch.float32)
    net(torch.tensor([1, 2])).float().sum().backward()
    assert net.block[0].weight.grad.dtype is net.block[0].bias.grad.dtype is torch.float32
    assert net.own.weight.grad.dtype is torch.bfloat16
    optimizer = fusedamp.optim.AdamW(net.parameters(), lr=1e-2)
    optimizer.step()
    net.zero_grad()
    convert(net)  # keeps it
    assert net.block[0].grad_dtype is torch.float32


def test_scaler_and_clipping_take_float32_gradients_of_fp16_weights():
    torch.manual_seed(0)
    net = convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).half(), grad_dtype=torch.float32)
    optimizer = fusedamp.optim.AdamW(net.parameters(), lr=1e-2)
    scaler = fusedamp.GradScaler(DEVICE, init_scale=2.0**10)
    for bad in (False, True):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in net.parameters()]
        for _ in range(4):
            loss = net(torch.ones(2, 4).half() * (float("inf") if bad else 1.0)).float().mean()
            scaler.scale(loss).backward()
        scaler.clip_grad_norm_(optimizer, 1.0)
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)]
        assert all(same) if bad else not all(same)


def untouched_mlp():
    torch.manual_seed(0)
    return MLP(4, 8)


def doubled(module):
    module.fc1.register_forward_hook(lambda m, a, y: 2 * y)


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


def replaced(module):
    module.fc1 = Lora(module.fc1)


def patched(module):
    inner = module.fc1.forward
    module.fc1.forward = lambda x: 2 * inner(x)


def subclassed(module):
    class Twice(Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module.fc1.__class__ = Twice


@pytest.mark.parametrize("change", [doubled, replaced, patched, subclassed])
@pytest.mark.parametrize("fusion", [{}, {"gelu": True, "gelu_grad": True}], ids=["unfused", "fused"])
def test_mlp_calls_what_stands_in_its_place(fusion, change):
    module = untouched_mlp()
    x = torch.randn(3, 4)
    with fusions(**fusion), torch.autocast(DEVICE, dtype=torch.bfloat16):
        module(x)
        hidden = 2 * module.fc1(x)
        wanted = module.fc2(torch.nn.functional.gelu(hidden, approximate="tanh"))
        change(module)
        assert torch.equal(module(x), wanted)


def test_mlp_sees_global_hooks():
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(type(m)))
    try:
        untouched_mlp()(torch.ones(1, 4))
    finally:
        handle.remove()
    assert seen == [Linear, Linear, MLP]


def test_mlp():
    module = MLP(4, 8, 3, bias=False, activation="relu")
    assert list(module.state_dict()) == ["fc1.weight", "fc2.weight"]
    x = torch.randn(2, 4)
    wanted = torch.relu(x @ module.fc1.weight.t()) @ module.fc2.weight.t()
    torch.testing.assert_close(module(x), wanted)
    assert "activation='relu'" in repr(module)
    assert list(MLP(4, 8).state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert MLP(4, 8)(x).shape == (2, 4)


def test_constructors_are_those_of_torch():
    torch.manual_seed(3)
    ours = Linear(5, 3, False, "cpu", torch.float64)
    torch.manual_seed(3)
    theirs = nn.Linear(5, 3, False, "cpu", torch.float64)
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.bias is None
    assert repr(ours) == repr(theirs)


@pytest.fixture(autouse=True)
def no_choice_is_left():
    yield
    assert not fusedamp.nn.fusions.__globals__["_chosen"]


def test_fusions_report_and_choose():
    rows = {row.kind: row for row in fusions("cpu")}
    assert rows["bias_grad"].fused
    assert not rows["gelu"].fused
    with fusions("cpu", gelu=True) as chosen:
        assert {row.kind: row.fused for row in chosen}["gelu"]
        with fusions("cpu", gelu=False, bias_grad=False):
            assert not any(row.fused for row in fusions("cpu"))
        assert {row.kind: row.fused for row in fusions("cpu")} == {
            "bias_grad": True,
            "gelu": True,
            "gelu_grad": False,
        }
        assert "chosen" in str(chosen)
    assert str(fusions("cpu")) == "\n".join(str(fusions("cpu")).splitlines())
    assert not {row.kind: row for row in fusions("meta")}["gelu"].fused
    with pytest.raises(TypeError, match=r"\[fusions\] gelu is 1; expected True, False or None"):
        fusions("cpu", gelu=1)
