"""Offload to the host from a pretended device: the same bits as without offload, and no race."""

import copy
from contextlib import nullcontext

import pytest
import torch
from cases import BY_NAME, CASES, MAIN, SHAPES, make_params, set_grads
from fusedamp import GradScaler, optim
from fusedamp.optim.offload import buckets
from pretend_device import Memory, Pretended, Traffic, loss_of, twins
from torch.optim.lr_scheduler import StepLR

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = torch.bfloat16
FORMATS = {
    "fp32": {},
    "split": {"master_weights": "split", "rounding_seed": 3},
    "split-bf16": {"master_weights": "split", "state_dtype": HALF, "rounding_seed": 3},
    "split-int8": {"master_weights": "split", "state_dtype": "int8", "rounding_seed": 3},
    "stochastic": {"master_weights": "none", "stochastic_rounding": True, "rounding_seed": 3},
}


@pytest.fixture
def one_thread(threads):
    threads(1)


def mixed_params():
    """16-bit, FP32 and FP64 weights; odd sizes, 0-dim, empty; transposed, channels-last, with gaps."""
    params = [p for dtype in (HALF, torch.float16, torch.float32) for p in make_params(dtype, SHAPES[:8])]
    params += make_params(torch.float64, [(5, 3), ()])
    with torch.no_grad():
        layouts = [torch.randn(6, 5).t(), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)]
        layouts += [torch.randn(8, 9)[:, ::2], torch.randn(64, 33)]
    return params + [torch.nn.Parameter(x.to(d)) for d in (HALF, torch.float32) for x in layouts]


class Run:
    """Trains with a scaler: overflows, clipping, accumulation, a schedule, and edits of weights."""

    def __init__(self, params, optimizer):
        self.params, self.optimizer = params, optimizer
        self.scaler = GradScaler("cpu", init_scale=16.0, growth_interval=4)
        self.schedule = StepLR(optimizer, 3, 0.7)
        self.norms = []

    def step(self, s, says_last):
        optimizer, link = self.optimizer, getattr(self.optimizer, "link", None)
        if link is not None:
            link.settle()
        for micro in range(2):
            poison = s % len(self.params) if s in (2, 10) and micro else None
            is_last = optimizer.last_micro_batch(micro == 1) if link and says_last else nullcontext()
            with is_last:
                self.scaler.scale(loss_of(self.params, 10 * s + micro, poison)).backward()
        if s % 3 == 1:
            self.norms.append(self.scaler.clip_grad_norm_(optimizer, 0.5))
        elif s % 3 == 2:
            self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_([p for p in self.params if p.dtype == torch.float32], 0.5)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=s % 2 == 0)
        self.schedule.step()
        if s in (5, 12):
            with link.edits() if link else nullcontext(), torch.no_grad():
                self.params[s].mul_(0.5)
                self.params[6].data = self.params[6].data.clone()
        return self.scaler.last_step_skipped.item()


def same(one, other):
    if not isinstance(one, torch.Tensor):
        return one == other
    return one.dtype == other.dtype and torch.equal(one, other)


def assert_same_state(one, other):
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for key, entry in one["state"].items():
        assert entry.keys() == other["state"][key].keys()
        assert all(same(value, other["state"][key][name]) for name, value in entry.items()), key


@pytest.mark.parametrize(
    ("form", "late", "says_last"),
    [*((form, True, False) for form in FORMATS), ("split", True, True), ("split", False, False)],
)
def test_same_bits_through_a_training_run(form, late, says_last, monkeypatch):
    """Small buckets, so that many copies are under way."""
    monkeypatch.setattr(buckets, "FULL", 2048)
    monkeypatch.setattr(buckets, "SMALL", 600)
    memory, params = Memory(), mixed_params()
    wide = [i for i, p in enumerate(params) if p.dtype == torch.float64]

    def groups(some, **options):
        return [
            {"params": [p for i, p in enumerate(some) if i not in wide], **options},
            {"params": [some[i] for i in wide], "lr": 3e-3, "state_dtype": "float32"},
        ]

    options = {"lr": 1e-2, "weight_decay": 0.1}
    moved = twins(memory, params)
    plain = Run(params, optim.AdamW(groups(params, **FORMATS[form]), **options))
    offloaded = Run(
        moved, Pretended(memory, optim.AdamW, groups(moved, **FORMATS[form]), late=late, **options)
    )
    skipped = []
    for s in range(21):
        skipped.append(plain.step(s, says_last))
        assert offloaded.step(s, says_last) == skipped[-1]
        offloaded.optimizer.link.settle()
        for i, (p, q) in enumerate(zip(params, moved, strict=True)):
            assert torch.equal(p, q), (s, i)
            assert p.stride() == q.stride()
    assert skipped.count(True) == 2
    assert plain.norms == offloaded.norms
    assert plain.scaler.state_dict() == offloaded.scaler.state_dict()
    assert_same_state(plain.optimizer.state_dict(), offloaded.optimizer.state_dict())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_optimizer(case):
    memory, params = Memory(), [*make_params(HALF), *make_params(torch.float32)]
    moved = twins(memory, params)
    plain = case.ours(params, **case.options)
    offloaded = Pretended(memory, case.ours, moved, **case.options)
    for s in range(3):
        for q, grad in zip(moved, set_grads(params, s), strict=True):
            q.grad = grad.clone()
        plain.step()
        offloaded.step()
        offloaded.link.settle()
        assert all(map(torch.equal, params, moved))
    assert_same_state(plain.state_dict(), offloaded.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_gradients_of_another_dtype(dtype):
    """FP32 gradients of 16-bit weights, as ``main_grad``: 4 bytes down."""
    memory = Memory()
    params, moved = make_params(HALF), None
    moved = twins(memory, params)
    plain, offloaded = optim.AdamW(params), Pretended(memory, optim.AdamW, moved)
    for _ in range(3):
        for p, q in zip(params, moved, strict=True):
            p.main_grad = q.main_grad = torch.randn(p.shape, dtype=dtype)
        plain.step()
        with Traffic(offloaded) as traffic:
            offloaded.step()
            offloaded.link.settle()
        assert all(map(torch.equal, params, moved))
    assert traffic.down == pytest.approx(dtype.itemsize, rel=0.2)  # padding of small tensors


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_another_layout(shape):
    memory = Memory()
    (param,) = make_params(HALF, [shape])
    moved = memory.take(param)
    plain, offloaded = optim.AdamW([param]), Pretended(memory, optim.AdamW, [moved])
    for s in range(3):
        grad = torch.randn((*shape, 2)).to(HALF)[..., s % 2]  # with gaps
        param.grad, moved.grad = grad, grad
        plain.step()
        offloaded.step()
        offloaded.link.settle()
        assert torch.equal(param, moved)


def test_complex_parameters():
    memory = Memory()
    param = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))
    moved = memory.take(param)
    plain, offloaded = optim.AdamW([param]), Pretended(memory, optim.AdamW, [moved])
    for transposed in (False, True, False):
        grad = torch.randn(5, 3, dtype=torch.complex64)
        param.grad = grad.t().contiguous().mH if transposed else grad.conj()
        moved.grad = param.grad
        plain.step()
        offloaded.step()
        offloaded.link.settle()
        assert torch.equal(param, moved)


@pytest.mark.parametrize("case", MAIN[:1], ids=str)
def test_a_cpu_is_its_own_device(case):
    params = make_params(HALF)
    moved = copy.deepcopy(params)
    plain = case.ours(params, **case.options)
    offloaded = optim.Offloaded(case.ours, moved, **case.options)
    for s in range(3):
        loss_of(params, s).backward()
        loss_of(moved, s).backward()
        for optimizer in (plain, offloaded):
            optimizer.step()
            optimizer.zero_grad()
        assert all(map(torch.equal, params, moved))


def test_torchs_scaler():
    memory, params = Memory(), make_params(torch.float32)
    moved = twins(memory, params)
    case = BY_NAME["adamw"]
    plain = Run(params, case.ours(params, **case.options))
    offloaded = Run(moved, Pretended(memory, case.ours, moved, **case.options))
    for run in (plain, offloaded):
        run.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        for s in range(6):
            for micro in range(2):
                run.scaler.scale(loss_of(run.params, 10 * s + micro, 0 if s == 2 else None)).backward()
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad()
    offloaded.optimizer.link.settle()
    assert all(map(torch.equal, params, moved))
    assert plain.scaler.state_dict() == offloaded.scaler.state_dict()
