"""A watch counts what a step did, on every route, and changes no bit of training."""

import math

import counted
import pytest
import torch
from counted import FUSED, MIXED, ROUTES, TORCHS, Loop, dtypes_of
from fusedamp import numerics, optim
from wrappers import Own


def records_of(loop, steps=9, every=2, history=16, **options):
    with numerics.watch(
        loop.optimizer, loop.scaler, every=every, history=history, model=loop.model, **options
    ) as watch:
        for _ in range(steps):
            loop.step()
        return watch.poll(), watch


@pytest.mark.parametrize("drive", ROUTES)
@pytest.mark.parametrize("name", FUSED)
def test_records_are_what_the_steps_did(drive, name):
    loop = Loop(drive, FUSED[name], dtypes_of(drive), bad=(4, 5))
    records, watch = records_of(loop)
    assert [record.step for record in records] == [2, 4, 6, 8]
    for record in records:
        loop.check(record)
    rows = watch.trajectory().tolist()
    assert [row[0] for row in rows] == list(range(1, 10))
    for number, (row, step) in enumerate(zip(rows, loop.steps, strict=True), 1):
        assert row[1:3] == [step["scale"], step["skipped"]]
        if drive in ("none", "disabled") and number % 2:
            assert math.isnan(row[3])  # not read
        else:
            assert row[3] == max(map(counted.largest, step["grads"].values()))


@pytest.mark.parametrize("drive", ROUTES)
@pytest.mark.parametrize("name", TORCHS)
def test_any_optimizer_has_records_of_its_gradients(drive, name):
    loop = Loop(drive, TORCHS[name], [torch.float32], bad=(4, 5))
    records, _ = records_of(loop, updates=False)
    assert [record.step for record in records] == [2, 4, 6, 8]
    for record in records:
        loop.check(record, updates=False)


@pytest.mark.parametrize("drive", ROUTES)
@pytest.mark.parametrize("storage", [{}, {"master_weights": "split", "state_dtype": "int8"}])
@pytest.mark.parametrize("every", [1, 3])
def test_training_has_the_same_bits(drive, storage, every):
    loops = []
    for watched in (False, True):
        loop = Loop(
            drive, lambda p: optim.AdamW(p, lr=1e-2, rounding_seed=3, **storage), dtypes_of(drive), bad=(1, 5)
        )
        if watched:
            watch = numerics.watch(loop.optimizer, loop.scaler, every=every)
        for _ in range(8):
            loop.step()
        loops.append(loop)
    plain, seen = loops
    assert len(watch.poll()) == 8 // every
    for a, b in zip(plain.model.parameters(), seen.model.parameters(), strict=True):
        assert torch.equal(a, b)
    states = [loop.optimizer.state_dict() for loop in loops]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for a, b in zip(states[0]["state"].values(), states[1]["state"].values(), strict=True):
        assert a.keys() == b.keys()
        assert all(
            torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a
        )
    if plain.scaler is not None:
        assert plain.scaler.state_dict() == seen.scaler.state_dict()


def test_steps_count_as_in_the_overflow_report():
    loop = Loop("fused", FUSED["AdamW"], MIXED, bad=(5,))
    for _ in range(3):
        loop.step()
    watch = numerics.watch(loop.optimizer, loop.scaler, every=5)
    for _ in range(3):
        loop.step()
    (record,) = watch.poll()
    assert record.step == 5 == loop.scaler.overflow_report(loop.optimizer).step
    assert record.skipped
    assert watch.trajectory()[:, 0].tolist() == [4, 5, 6]


def test_late_gradients_and_gradients_that_go_are_in_the_right_rows():
    loop = Loop("fused", FUSED["AdamW"], MIXED)
    step = loop.run

    def without(*names):
        def run():
            for name in names:
                getattr(loop.model, name).grad = None
            step()

        return run

    watch = numerics.watch(loop.optimizer, loop.scaler, every=1, model=loop.model)
    missing = [("a", "e"), ("a", "e"), ("b",), (), (), ("c",), ("c",), ("c",)]
    for names in missing:
        loop.run = without(*names)
        loop.step()
    records = watch.poll()
    assert [record.step for record in records] == list(range(1, 9))
    for record, names in zip(records, missing, strict=True):
        assert record.names == tuple(name for name in counted.SIZES if name not in names)
        done = loop.steps[record.step - 1]
        for i, name in enumerate(record.names):
            assert torch.equal(record.histogram[i], counted.histogram(done["grads"][name]))
            (old, weight), new = done["before"][name], done["after"][name]
            assert (record.moved[i], record.lost[i]) == counted.moved_and_lost(old, new, weight)


def test_two_optimizers_have_a_watch_each():
    a, b = Loop("fused", FUSED["AdamW"], MIXED), Loop("fused", FUSED["SGD"], MIXED)
    b.scaler = a.scaler
    watches = [numerics.watch(loop.optimizer, a.scaler, every=every) for loop, every in ((a, 2), (b, 3))]
    for _ in range(6):
        a.step()
        b.step()
    assert [[record.step for record in watch.poll()] for watch in watches] == [[2, 4, 6], [3, 6]]


def test_gradients_that_change_after_clipping_are_counted_as_they_are_stepped():
    loop = Loop("clip", FUSED["AdamW"], MIXED)
    for _ in range(3):
        loop.step()
    watch = numerics.watch(loop.optimizer, loop.scaler, every=1)

    def run():
        loop.scaler.clip_grad_norm_(loop.optimizer, 1.0)
        loop.model.a.grad.mul_(4)
        loop.scaler.step(loop.optimizer)
        loop.scaler.update()

    loop.run = run
    loop.step()
    (record,) = watch.poll()
    assert record.step == 4
    assert torch.equal(record.histogram[0], counted.histogram(loop.steps[-1]["grads"]["a"] * 4))


@pytest.mark.parametrize("norm_type", [1.0, math.inf, 3.0])
def test_norms_are_of_squares_whatever_the_clipping_measures(norm_type):
    loop = Loop("clip", FUSED["AdamW"], MIXED)

    def run():
        loop.scaler.clip_grad_norm_(loop.optimizer, 1.0, norm_type)
        loop.scaler.step(loop.optimizer)
        loop.scaler.update()

    loop.run = run
    records, _ = records_of(loop, every=1)
    assert len(records) == 9
    for record in records:
        loop.check(record)


def test_overflow_flags_set_by_hand_skip():
    for drive in ("fused", "none"):
        loop = Loop(drive, FUSED["AdamW"], MIXED)
        watch = numerics.watch(loop.optimizer, loop.scaler, every=1)
        for flag in (0.0, 1.0, 0.0):
            loop.optimizer.found_inf = torch.tensor(flag)
            loop.step()
        assert [record.skipped for record in watch.poll()] == [False, True, False]


class Wrapped(torch.optim.Optimizer):
    """As Accelerate's wrapper: another optimizer in an attribute."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.__dict__["optimizer"], name)

    def step(self, closure=None):
        self.optimizer.step(closure)


@pytest.mark.parametrize("drive", ["fused", "torch", "none"])
@pytest.mark.parametrize("wrap", [Wrapped, Own])
def test_wrappers_are_seen_through(drive, wrap):
    loop = Loop(drive, FUSED["AdamW"], dtypes_of(drive), bad=(2,))
    inner = loop.optimizer
    watch = numerics.watch(wrap(inner) if wrap is Wrapped else inner, loop.scaler, every=1, model=loop.model)
    loop.optimizer = wrap(inner)
    for _ in range(3):
        loop.step()
    records = watch.poll()
    assert [record.step for record in records] == [1, 2, 3]
    for record in records:
        loop.check(record)
    watch.remove()
    assert not any("observer" in name for name in vars(inner))
