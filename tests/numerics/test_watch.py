"""A watch counts what a step did, on every route, and changes no bit of training."""

import copy
import io
import math
import pickle

import counted
import pytest
import torch
from counted import FUSED, Loop
from fusedamp import GradScaler, numerics, optim
from wrappers import Own

MIXED = [torch.float16, torch.float32, torch.bfloat16]
ROUTES = ["fused", "clip", "unscale", "hook", "torch", "none", "disabled"]


def dtypes_of(drive):
    # torch's scaler unscales no FP16 gradients.
    return [torch.bfloat16, torch.float32] if drive == "torch" else MIXED


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


TORCHS = {
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}


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


# Rings ------------------------------------------------------------------------------------


def test_polls_give_each_record_once_and_count_what_they_missed():
    loop = Loop("fused", FUSED["AdamW"], MIXED)
    watch = numerics.watch(loop.optimizer, loop.scaler, every=2, history=3)
    for _ in range(4):
        loop.step()
    assert [record.step for record in watch.poll()] == [2, 4]
    assert watch.poll() == []
    for _ in range(14):
        loop.step()
    assert [record.step for record in watch.poll()] == [14, 16, 18]
    assert watch.dropped == 4
    assert [record.step for record in watch.collect()] == [14, 16, 18]
    assert [record.step for record in watch.collect()] == [14, 16, 18]


def test_steps_that_a_graph_replays_are_read_from_the_rings():
    """As in a capture: the host does not see the steps, and a poll asks the device."""
    loop = Loop("fused", FUSED["AdamW"], MIXED)
    watch = numerics.watch(loop.optimizer, loop.scaler, every=2, history=3)
    watch._recorded = lambda: None
    watch._is_captured = True
    for _ in range(5):
        loop.step()
    assert [record.step for record in watch.poll()] == [2, 4]
    assert watch.poll() == []
    for _ in range(9):
        loop.step()
    assert [record.step for record in watch.poll()] == [10, 12, 14]
    assert watch.dropped == 2
    for record in watch.collect():
        loop.model.named_parameters()
        assert torch.equal(record.histogram[0], counted.histogram(loop.steps[record.step - 1]["grads"]["a"]))


def test_the_trajectory_keeps_the_last_steps():
    loop = Loop("fused", FUSED["SGD"], [torch.float32])
    watch = numerics.watch(loop.optimizer, loop.scaler, every=10**6)
    for param in loop.model.parameters():
        param.grad = torch.ones_like(param)
    loop.scaler.scale(torch.zeros(()))
    for _ in range(4100):
        loop.scaler.step(loop.optimizer)
        loop.scaler._per_optimizer_states.clear()
    found = watch.trajectory()
    assert found[:, 0].tolist() == list(range(5, 4101))
    assert found.dtype == torch.float64
    assert watch.collect() == []


# Lifetime ---------------------------------------------------------------------------------


@pytest.mark.parametrize("drive", ROUTES)
def test_nothing_of_a_watch_is_saved_or_copied(drive):
    loop = Loop(drive, FUSED["AdamW"], dtypes_of(drive))
    plain = loop.optimizer.state_dict().keys()
    watch = numerics.watch(loop.optimizer, loop.scaler, every=1)
    loop.step()
    assert loop.optimizer.state_dict().keys() == plain
    for twin in (pickle.loads(pickle.dumps(loop.optimizer)), copy.deepcopy(loop.optimizer)):
        assert not any("observer" in name for name in vars(twin))
        twin.step()
    assert len(watch.poll()) == 1
    if loop.scaler is not None:
        for twin in (pickle.loads(pickle.dumps(loop.scaler)), copy.deepcopy(loop.scaler)):
            assert twin.state_dict() == loop.scaler.state_dict()
            if loop.scaler.is_enabled():
                other = Loop(drive, FUSED["AdamW"], dtypes_of(drive))
                other.scaler = twin
                other.step()
        buffer = io.BytesIO()
        torch.save(loop.scaler.state_dict(), buffer)
    with pytest.raises(
        TypeError, match=r"\[Watch\] cannot be pickled or copied; expected one watch per process"
    ):
        pickle.dumps(watch)
    assert watch.poll() == []


@pytest.mark.parametrize("drive", ROUTES)
def test_a_removed_watch_leaves_no_trace(drive):
    loop = Loop(drive, FUSED["AdamW"], dtypes_of(drive))
    loop.step()
    names = set(vars(loop.optimizer)), set(vars(loop.scaler)) if loop.scaler else None
    watch = numerics.watch(loop.optimizer, loop.scaler, every=1)
    loop.step()
    watch.remove()
    watch.remove()
    loop.step()
    assert len(watch.poll()) == 1
    assert set(vars(loop.optimizer)) == names[0]
    assert loop.scaler is None or set(vars(loop.scaler)) == names[1]
    assert not loop.optimizer._optimizer_step_post_hooks


def test_the_last_watch_counts():
    loop = Loop("torch", TORCHS["foreach"], [torch.float32])
    first = numerics.watch(loop.optimizer, loop.scaler, every=1, updates=False)
    loop.step()
    second = numerics.watch(loop.optimizer, loop.scaler, every=1, updates=False)
    loop.step()
    first.remove()
    loop.step()
    assert len(first.poll()) == 1
    assert [record.step for record in second.poll()] == [1, 2]


def test_a_watch_that_nobody_keeps_still_logs():
    class Logger:
        def __init__(self):
            self.seen = []

        def log(self, step, values):
            self.seen.append((step, values))

    logger, loop = Logger(), Loop("fused", FUSED["AdamW"], MIXED)
    numerics.watch(loop.optimizer, loop.scaler, every=2).log_to(logger)
    for _ in range(5):
        loop.step()
    assert [step for step, _ in logger.seen] == [2, 4]
    assert all(values["numerics/scale"] == loop.steps[step - 1]["scale"] for step, values in logger.seen)


def test_a_logger_that_fails_does_not_end_training():
    class Broken:
        def log(self, step, values):
            raise OSError("disk is full")

    loop = Loop("fused", FUSED["AdamW"], MIXED)
    watch = numerics.watch(loop.optimizer, loop.scaler, every=1).log_to(Broken())
    with pytest.warns(UserWarning, match=r"\[Watch\] Broken.log raised OSError: disk is full"):
        loop.step()
    loop.step()
    assert len(watch.poll()) == 2


# Bad input --------------------------------------------------------------------------------


def test_wrong_arguments_are_refused_by_name():
    loop = Loop("fused", FUSED["AdamW"], MIXED)
    good = dict(optimizer=loop.optimizer, scaler=loop.scaler)
    for wrong, message in [
        (
            dict(optimizer=loop.model),
            r"\[numerics.watch\] optimizer is Module\(\); expected a torch.optim.Optimizer",
        ),
        (
            dict(scaler="cpu"),
            r"\[numerics.watch\] scaler is 'cpu'; expected fusedamp's or torch's GradScaler",
        ),
        (dict(every=0), r"\[numerics.watch\] every is 0; expected a whole number from 1"),
        (dict(every=1.5), r"\[numerics.watch\] every is 1.5; expected a whole number"),
        (dict(history=0), r"\[numerics.watch\] history is 0; expected a whole number from 1"),
        (dict(updates="yes"), r"\[numerics.watch\] updates is 'yes'; expected True or False"),
        (dict(model=3), r"\[numerics.watch\] model is 3; expected a torch.nn.Module, or None"),
        (
            dict(activations=[]),
            r"\[numerics.watch\] activations is \[\]; expected a torch.nn.Module, or None",
        ),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            numerics.watch(**{**good, **wrong})
    assert not any("observer" in name for name in vars(loop.optimizer))
    watch = numerics.watch(**good)
    with pytest.raises(TypeError, match="log"):
        watch.log_to(object())


def test_optimizers_that_a_watch_cannot_follow_are_refused_or_warned_of():
    param = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = optim.AdamW([param])
    steps = optim.step_in_backward(optimizer)
    with pytest.raises(ValueError, match=r"\[numerics.watch\] the optimizer steps in the backward pass"):
        numerics.watch(optimizer)
    steps.remove()
    watch = numerics.watch(optimizer)
    with pytest.raises(ValueError, match=r"\[step_in_backward\] .* is watched"):
        optim.step_in_backward(optimizer)
    watch.remove()
    optim.step_in_backward(optimizer)
    for kind in (torch.optim.SGD, optim.Muon, optim.Adafactor):
        with pytest.warns(
            UserWarning, match=rf"{kind.__name__} does not count its updates; records have gradients only"
        ):
            numerics.watch(kind([param], lr=1e-3))


def test_scalers_of_all_kinds_may_come_later():
    """A watch without a scaler follows the one that steps its optimizer."""
    loop = Loop("fused", FUSED["AdamW"], MIXED, bad=(2,))
    watch = numerics.watch(loop.optimizer, every=1, model=loop.model)
    for _ in range(3):
        loop.step()
    for record in watch.poll():
        loop.check(record)
    assert isinstance(loop.scaler, GradScaler)


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
