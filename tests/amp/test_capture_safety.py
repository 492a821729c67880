"""After the first step there are no host reads in anything that a graph captures; tested without a GPU.

Two stand-ins for a device: fake CUDA tensors (shapes and devices, no values) take every path that depends on
the device; reading a value raises, because there is none. Real CPU tensors take the path of a repeated step,
which passes addresses to the ops, with finite and non-finite gradients. In both a dispatch mode forbids
syncs: reading a value, sizes that depend on values, and copies between devices.
"""

import contextlib
import math

import pytest
import torch
from fusedamp import GradScaler, numerics, optim
from fusedamp.amp.floor import FloorWatch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPTIMIZERS = {
    "AdamW": lambda p, **options: optim.AdamW(p, capturable=True, **options),
    "AdamW amsgrad": lambda p, **options: optim.AdamW(p, capturable=True, amsgrad=True, **options),
    "Adam": lambda p, **options: optim.Adam(p, capturable=True, **options),
    "SGD": lambda p, **options: optim.SGD(p, **options),
    "SGD momentum": lambda p, **options: optim.SGD(p, momentum=0.9, **options),
    "Lion": optim.Lion,
    "Adagrad": optim.Adagrad,
    "RMSprop": lambda p, **options: optim.RMSprop(p, momentum=0.9, capturable=True, **options),
    "RMSprop centered": lambda p, **options: optim.RMSprop(p, centered=True, capturable=True, **options),
    "RAdam": lambda p, **options: optim.RAdam(p, capturable=True, **options),
    "NAdam": lambda p, **options: optim.NAdam(p, capturable=True, **options),
    "LAMB": optim.LAMB,
    "LARS": optim.LARS,
    "NovoGrad": optim.NovoGrad,
}
COMPOSED = {  # of torch's operations: captured as they are, never repeated from addresses
    "Adafactor": lambda p, **options: optim.Adafactor(p, weight_decay=0.1, **options),
    "Muon": lambda p, **options: optim.Muon(p, **options),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MASTERS = {mode: {"master_weights": mode} for mode in ("auto", "fp32", "none")}
COMPRESSED = {  # how else masters and states are kept; FP64 parameters refuse some of it
    "split": {"master_weights": "split"},
    "split, BF16 states": {"master_weights": "split", "state_dtype": torch.bfloat16},
    "8-bit states": {"state_dtype": "int8"},
    "8-bit states, rounded at random": {
        "master_weights": "none",
        "state_dtype": "int8",
        "stochastic_rounding": True,
    },
}
FORMATS = MASTERS | COMPRESSED


def formats_of(name):
    """Storage options of this optimizer: a centered variance needs FP32 states, composed ones FP32 masters
    too."""
    if name in COMPOSED:
        return MASTERS
    return {key: s for key, s in FORMATS.items() if "centered" not in name or "state_dtype" not in s}


def combinations(optimizers):
    return [
        pytest.param(make, storage, id=f"{name}-{key}")
        for name, make in optimizers.items()
        for key, storage in formats_of(name).items()
    ]


def test_every_optimizer_is_here():
    known = " ".join(OPTIMIZERS | COMPOSED).split()
    assert {name for name in optim.__all__ if hasattr(getattr(optim, name), "states")} <= set(known)


class HostRead(AssertionError):
    """The host would wait for the device."""


class Watch(TorchDispatchMode):
    """Raise for host syncs while ``strict``."""

    READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"}
    COPIES = {"_to_copy", "copy_", "_copy_from"}
    # A torch without CUDA cannot call these for fake CUDA tensors; what they write has no values anyway.
    IN_PLACE = {"copy_", "_foreach_mul_"}
    strict = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.strict and name in self.READS:
            raise HostRead(name)
        if name in self.IN_PLACE and isinstance(tree_leaves(args)[0], FakeTensor):
            result = args[0] if func._schema.returns else None
        else:
            result = func(*args, **(kwargs or {}))
        if self.strict and name in self.COPIES:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            if len({t.device.type for t in tensors}) > 1:
                raise HostRead(f"{name} between {sorted({str(t.device) for t in tensors})}")
        return result


READS = {
    "item": lambda t: t.item(),
    "float": lambda t: float(t),
    "if": lambda t: 1 if t else 0,
    "tolist": lambda t: t.tolist(),
    "equal": lambda t: torch.equal(t, t),
    "mask": lambda t: t[t > 0],
    "to the host": lambda t: t.cpu(),
    "to the host later": lambda t: t.to("cpu", non_blocking=True),
    "from the host": lambda t: torch.ones(3).to(t.device),
    "a number from the host": lambda t: torch.ones(()).to(t.device),
    "into a host tensor": lambda t: torch.zeros(()).copy_(t),
    "a list from the host": lambda t: torch.tensor([1.0, 2.0], device=t.device),
}


@pytest.mark.parametrize("read", READS)
def test_the_detector_detects(read, fake_cuda):
    scale = torch.ones((), device="cuda")
    with Watch(), pytest.raises((HostRead, RuntimeError)):
        READS[read](scale)
    with Watch():
        torch.full((), 3.0, device="cuda").add_(scale).clamp_(0, 2).copy_(scale)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Tensors on CUDA without CUDA. ``capturing`` says whether a graph is being captured."""

    class State:
        capturing = False

    # What has no memory has no address; parameters must seem to lie apart.
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: id(tensor) << 24)
    # The method first asks for the device itself, which a torch without CUDA refuses.
    monkeypatch.setattr(FakeTensor, "copy_", lambda *a, **k: torch.ops.aten.copy_(*a, **k), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # torch 2.11 with CUDA initializes the device, also for fake tensors.
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda *device: None, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: State.capturing)
    # It reads the scale through pinned memory and an event, which test_grad_scaler_limits.py guards.
    monkeypatch.setattr(
        FloorWatch, "forget", lambda watch: vars(watch).update(_at_least=2.0**60, _pending=None)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield State


def give_gradients(params, value=1.0):
    for param in params:
        param.grad = torch.full_like(param, value)


def tails(scaler, optimizer, params):
    """Every order of calls that ends in a step."""
    yield lambda: scaler.step(optimizer)
    yield lambda: (scaler.unscale_(optimizer), scaler.step(optimizer))
    for norm_type in (2.0, math.inf, 1.0):
        yield lambda p=norm_type: (scaler.clip_grad_norm_(optimizer, 1.0, p), scaler.step(optimizer))
    yield lambda: (
        scaler.unscale_(optimizer),
        scaler.clip_grad_norm_(optimizer, 1.0),
        scaler.step(optimizer),
    )
    yield lambda: (
        scaler.clip_grad_norm_(optimizer, torch.full((), 0.5, device=params[0].device)),
        scaler.unscale_(optimizer),
        scaler.step(optimizer),
    )


POLICIES = {"hysteresis": {"hysteresis": 2}, "headroom": {"policy": "headroom"}}
TAILS = [
    *[pytest.param(*case.values, "hysteresis", id=case.id) for case in combinations(OPTIMIZERS | COMPOSED)],
    *[pytest.param(OPTIMIZERS[name], {}, "headroom", id=f"{name}-headroom") for name in ("AdamW", "LAMB")],
]


@pytest.mark.parametrize(("make", "storage", "policy"), TAILS)
def test_tail_on_fake_cuda(make, storage, policy, fake_cuda):
    """unscale_, clip_grad_norm_, step and update, with everything on the device, learning rate included."""
    dtypes = DTYPES if "state_dtype" not in storage else DTYPES[:3]
    params = [torch.nn.Parameter(torch.ones(4, 3, device="cuda", dtype=dtype)) for dtype in dtypes]
    lr = torch.full((), 1e-2, device="cuda")
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": torch.full((), 1e-3, device="cuda")}]
    optimizer = make(groups, lr=lr, **storage)
    scaler = GradScaler("cuda", **POLICIES[policy])
    assert scaler.is_enabled()
    scaler.scale(torch.ones((), device="cuda"))
    with Watch() as watch:
        for tail in tails(scaler, optimizer, params):
            for watch.strict, fake_cuda.capturing in ((False, False), (True, False), (True, True)):
                give_gradients(params)
                tail()
                assert scaler.last_step_skipped.is_cuda
                scaler.update()
        with pytest.raises((HostRead, RuntimeError)):
            scaler.get_scale()
    assert all(optimizer.state[p]["step"].is_cuda for p in params)


def test_a_scale_made_while_capturing_is_refused(fake_cuda):
    """Each replay would set it to its first value again."""
    scaler, loss = GradScaler("cuda"), torch.ones((), device="cuda")
    fake_cuda.capturing = True
    with pytest.raises(RuntimeError, match=r"expected it before graph capture.* Call scaler\.scale\(\) once"):
        scaler.scale(loss)
    fake_cuda.capturing = False
    scaler.scale(loss)
    fake_cuda.capturing = True
    scaler.scale(loss)


@pytest.mark.parametrize("tail", ["step", "unscale_"])
def test_the_policy_asks_all_devices(tail, fake_cuda):
    params = [torch.nn.Parameter(torch.ones(3, device=f"cuda:{i}")) for i in (1, 0)]
    optimizer, scaler = optim.SGD(params, lr=0.1), GradScaler("cuda", policy="headroom")
    scaler.scale(torch.ones((), device="cuda:1"))
    give_gradients(params)
    with Watch():
        getattr(scaler, tail)(optimizer)
        largest = scaler._per_optimizer_states[id(optimizer)]["largest"]
        assert {value.device for value in largest.values()} == {param.device for param in params}
        if tail != "step":
            scaler.step(optimizer)
        scaler.update()
    assert scaler._headroom._state.device == params[0].device


def test_the_state_of_the_policy_is_made_with_the_scale(fake_cuda):
    """While capturing, each replay would set it to zeros again."""
    scaler = GradScaler("cuda", policy="headroom")
    scaler.scale(torch.ones((), device="cuda"))
    assert scaler._headroom._state.is_cuda


REPEATED = [
    *[pytest.param(*case.values, "overflow", id=case.id) for case in combinations(OPTIMIZERS)],
    pytest.param(OPTIMIZERS["AdamW"], {}, "headroom", id="AdamW-headroom"),
]


@pytest.mark.parametrize("options", [{"hysteresis": 2}, {"policy": "headroom"}], ids=str)
def test_an_update_makes_nothing_that_it_keeps(options, fake_cuda):
    """Each replay of a graph that captured the update would set it to its first value again."""
    scaler = GradScaler("cuda", **options)
    scaler.scale(torch.ones((), device="cuda"))
    params = [torch.nn.Parameter(torch.ones(3, device="cuda"))]
    optimizer = optim.SGD(params)
    give_gradients(params)
    scaler.step(optimizer)

    def kept():
        holders = [vars(scaler), vars(scaler._headroom or object)]
        return {id(value) for held in holders for value in held.values() if isinstance(value, torch.Tensor)}

    before, fake_cuda.capturing = kept(), True
    scaler.update()
    assert kept() == before


@pytest.mark.parametrize(("make", "storage", "policy"), REPEATED)
def test_repeated_steps_read_nothing(make, storage, policy):
    """The replayed step, which passes addresses; good and skipped steps alike, as backward makes them."""
    dtypes = [torch.float16, torch.bfloat16, torch.float32]
    params = [torch.nn.Parameter(torch.ones(4, 3, dtype=dtype)) for dtype in dtypes]
    optimizer = make(params, **storage)
    scaler = GradScaler("cpu", init_scale=64.0, growth_interval=2, policy=policy)
    outcomes = []
    for i, factor in enumerate((1.0, 1.0, 1.0, math.inf, 1.0, math.nan, 1.0, 1.0)):
        optimizer.zero_grad()
        loss = sum(p.float().sum() for p in params) * factor
        with Watch() if i > 1 else contextlib.nullcontext():
            scaler.scale(loss).backward()
            if i % 2 == 0:
                scaler.clip_grad_norm_(optimizer, 1.0)
            scaler.step(optimizer)
            skipped = scaler.last_step_skipped
            scaler.update()
        outcomes.append(skipped)
    assert [skipped.item() for skipped in outcomes] == [False] * 3 + [True, False, True, False, False]
    assert optimizer._plan is not None, "the short road was never taken"
    assert {int(optimizer.state[p]["step"]) for p in params} == {6}


WATCHED = {name: OPTIMIZERS[name] for name in ("AdamW", "SGD momentum", "LAMB")}


@pytest.mark.parametrize(("make", "storage"), combinations(WATCHED))
def test_a_watch_reads_nothing_on_fake_cuda(make, storage, fake_cuda, monkeypatch):
    """Rings, clock and counts stay on the device, in due steps and others, and while a graph is captured."""
    monkeypatch.setattr(numerics.Watch, "_recorded", lambda watch: None)  # copies to pinned memory
    dtypes = DTYPES if "state_dtype" not in storage else DTYPES[:3]
    params = [torch.nn.Parameter(torch.ones(4, 3, device="cuda", dtype=dtype)) for dtype in dtypes]
    optimizer = make(params, **storage)
    scaler = GradScaler("cuda")
    scaler.scale(torch.ones((), device="cuda"))
    recorder = numerics.watch(optimizer, scaler, every=2)
    with Watch() as watch:
        for tail in tails(scaler, optimizer, params):
            for watch.strict, fake_cuda.capturing in ((False, False), (True, False), (True, True)):
                give_gradients(params)
                tail()
                scaler.update()
        for _ in range(2):
            give_gradients(params)
            optimizer.step()  # without the scaler
    assert {clock.now.device.type for clock in recorder._clocks.values()} == {"cuda"}


@pytest.mark.parametrize(("make", "storage"), combinations(WATCHED))
@pytest.mark.parametrize("every", [1, 2])
def test_a_watch_reads_nothing_in_repeated_steps(make, storage, every):
    params = [torch.nn.Parameter(torch.ones(4, 3, dtype=dtype)) for dtype in DTYPES[:3]]
    optimizer = make(params, **storage)
    scaler = GradScaler("cpu", init_scale=64.0)
    recorder = numerics.watch(optimizer, scaler, every=every)
    for i in range(8):
        give_gradients(params, math.nan if i == 5 else 64.0)
        scaler.scale(torch.ones(()))
        with Watch() if i > 1 else contextlib.nullcontext():
            scaler.step(optimizer)
            scaler.update()
    assert optimizer._plan is not None, "the short road was never taken"
    records = recorder.poll()
    assert [record.step for record in records] == list(range(every, 9, every))
    assert [record.skipped for record in records] == [record.step == 6 for record in records]
