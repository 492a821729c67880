"""The scaler walks where torch's walks: random programs run on both, and everything visible is compared.

Guards the contract of torch.amp.GradScaler: scale and growth tracker, gradients and weights bit for bit,
stages, return values, and the type and text of each error.
"""

import copy
import pickle

import fusedamp
import pytest
import torch
from fusedamp import optim
from hypothesis import given, settings
from hypothesis import strategies as st
from on_device import DEVICE

BAD = {"good": 1.0, "inf": float("inf"), "nan": float("nan")}
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


class World:
    """One scaler and two optimizers, on which actions are run by name; what they raise is their outcome."""

    def __init__(self, scaler_class, optimizer_classes, dtype=torch.float32, **scaler_options):
        generator = torch.Generator().manual_seed(0)
        self.scaler = scaler_class(DEVICE, **{"init_scale": 2.0**10, "growth_interval": 3, **scaler_options})
        self.params = [
            [torch.randn(n, 3, generator=generator, dtype=dtype).requires_grad_() for n in (2, 4)]
            for _ in range(2)
        ]
        self.optimizers = [make(params) for make, params in zip(optimizer_classes, self.params, strict=True)]

    def run(self, action, which, kind):
        try:
            result = getattr(self, action)(which, kind)
        except (AssertionError, RuntimeError, ValueError) as error:
            return type(error), str(error)
        return result.item() if isinstance(result, torch.Tensor) else result

    def backward(self, which, kind):
        loss = sum((p * (p.detach() + 1)).sum() for p in self.params[which]) * BAD[kind]
        self.scaler.scale(loss).backward()

    def unscale(self, which, kind):
        self.scaler.unscale_(self.optimizers[which])

    def clip(self, which, kind):
        return torch.nn.utils.clip_grad_norm_(self.params[which], 0.5)

    def step(self, which, kind):
        return self.scaler.step(self.optimizers[which])

    def step_closure(self, which, kind):
        return self.scaler.step(self.optimizers[which], closure=None)

    def update(self, which, kind):
        self.scaler.update()

    def zero(self, which, kind):
        self.optimizers[which].zero_grad()

    def iteration(self, which, kind):
        for action in ("zero", "backward", "step", "update"):
            getattr(self, action)(which, kind)

    def set_scale(self, which, kind):
        self.scaler.update((64.0, torch.tensor(3.0))[which])

    def interval(self, which, kind):
        self.scaler.set_growth_interval(2 + which)

    def save_load(self, which, kind):
        self.scaler.load_state_dict(copy.deepcopy(self.scaler.state_dict()))

    def repickle(self, which, kind):
        self.scaler = pickle.loads(pickle.dumps(self.scaler))

    def seen(self):
        tensors = [t for params in self.params for p in params for t in (p.detach(), p.grad)]
        stages = [self.scaler._per_optimizer_states[id(o)]["stage"] for o in self.optimizers]
        return (self.scaler.get_scale(), self.scaler._get_growth_tracker(), stages), tensors


COMMON = ["iteration", "backward", "step", "update"]
ACTIONS = st.sampled_from(
    [
        *COMMON,
        *COMMON,
        "unscale",
        "clip",
        "step_closure",
        "zero",
        "set_scale",
        "interval",
        "save_load",
        "repickle",
    ]
)
PROGRAM = st.lists(
    st.tuples(ACTIONS, st.integers(0, 1), st.sampled_from(["good", "good", "inf", "nan"])), max_size=40
)


def assert_same_bits(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30))


@SETTINGS
@given(PROGRAM)
def test_any_program_on_torch_optimizers(program):
    classes = (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.1))
    ours, theirs = World(fusedamp.GradScaler, classes), World(torch.amp.GradScaler, classes)
    for step in program:
        assert ours.run(*step) == pytest.approx(theirs.run(*step), nan_ok=True), step
        (our_state, our_tensors), (their_state, their_tensors) = ours.seen(), theirs.seen()
        assert our_state == their_state, step
        assert_same_bits(our_tensors, their_tensors)


ITERATION = st.tuples(
    st.sampled_from(["good", "good", "good", "inf", "nan"]),
    st.sampled_from(["step", "unscale step", "unscale clip step"]),
    st.sampled_from([(0,), (1,), (0, 1)]),
)


@SETTINGS
@given(st.lists(ITERATION, min_size=1, max_size=25))
def test_any_iterations_on_fused_optimizers(iterations):
    """Fused route against torch's scaler and optimizers, in FP64 so that almost nothing is left to rounding.

    The scales are powers of two, so unscaling is exact. What remains is the order of Adam's few operations,
    16 roundings of values below 8 per step, and in the root and quotient a relative error of as many.
    """
    pairs = [
        (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), lambda p: optim.AdamW(p, lr=0.1)),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.1)),
    ]
    ours = World(fusedamp.GradScaler, pairs[0], torch.float64)
    theirs = World(torch.amp.GradScaler, pairs[1], torch.float64)
    for kind, actions, whiches in iterations:
        for world in (ours, theirs):
            for which in whiches:
                for action in ("zero backward " + actions).split():
                    outcome = world.run(action, which, kind)
                    assert not isinstance(outcome, tuple), outcome
            world.scaler.update()
        assert ours.seen()[0] == theirs.seen()[0]
    for params, expected in zip(ours.params, theirs.params, strict=True):
        for p, q in zip(params, expected, strict=True):
            bound = len(iterations) * 16 * 8 * torch.finfo(torch.float64).eps * (1 + q.abs())
            assert ((p - q).abs() <= bound).all()


@pytest.mark.parametrize("growth_interval", [1, 2, 5])
def test_growth_stops_before_infinity(growth_interval):
    """torch#98876: a scale that would become inf stays, and both trackers agree about it."""
    worlds = [
        World(cls, (lambda p: torch.optim.SGD(p, lr=0.0),) * 2, growth_interval=growth_interval)
        for cls in (fusedamp.GradScaler, torch.amp.GradScaler)
    ]
    for _ in range(6):
        for world in worlds:
            world.params[0][0].grad = torch.ones(2, 3)
            world.scaler.scale(torch.ones(()))
            world.step(0, "good")
            world.update(0, "good")
            if world.scaler.get_scale() < 2.0**100:
                world.scaler.update(2.0**126)
        assert worlds[0].seen()[0] == worlds[1].seen()[0]
