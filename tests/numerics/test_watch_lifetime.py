"""What a watch keeps, passes on and leaves behind, and what it refuses."""

import copy
import io
import pickle

import counted
import pytest
import torch
from counted import FUSED, MIXED, ROUTES, TORCHS, Loop, dtypes_of
from fusedamp import numerics, optim

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
