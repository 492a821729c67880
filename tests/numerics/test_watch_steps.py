"""What a step is to a watch, if it is not the plain one: with a closure, by hand, interrupted, without
gradients."""

import copy
import gc
import io
import itertools
import math
import warnings
import weakref

import pytest
import torch
from fusedamp import GradScaler, numerics, optim
from fusedamp.optim.core.batch import Batch
from torch import nn

STORED = 4.0  # of a scaled gradient


def params_of(n=3):
    return [nn.Parameter(torch.ones(5)) for _ in range(n)]


def give(params, value):
    for param in params:
        param.grad = torch.full_like(param, value)


def scaler_of(**options):
    scaler = GradScaler("cpu", init_scale=4.0, **options)
    scaler.scale(torch.ones(()))
    return scaler


def largest(watch):
    return [(record.step, record.largest.tolist()) for record in watch.collect()]


def expected(values):
    return [(step, [value] * 3) for step, value in enumerate(values, 1)]


@pytest.mark.parametrize("as_keyword", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, optim.AdamW])
def test_gradients_of_a_closure_are_those_of_its_step(kind, as_keyword):
    """Trainers pass the whole forward and backward pass as the closure."""
    params = params_of()
    optimizer = kind(params, lr=1e-3)
    watch = numerics.watch(optimizer, every=1, updates=False)
    for value in (1.0, 2.0, 3.0):

        def closure(value=value):
            give(params, value)
            return torch.zeros(())

        optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
    assert largest(watch) == expected([1.0, 2.0, 3.0])
    assert watch.trajectory()[:, 3].tolist() == [1.0, 2.0, 3.0]


def test_lbfgs_is_read_after_its_last_closure():
    params, values = params_of(), itertools.count(1)
    optimizer = torch.optim.LBFGS(params, max_iter=3)
    watch = numerics.watch(optimizer, every=1, updates=False)

    def closure():
        give(params, float(next(values)))
        return torch.zeros(())

    for _ in range(2):
        optimizer.step(closure)
        last = params[0].grad[0].item()
        assert largest(watch)[-1][1] == [last] * 3
    assert len(largest(watch)) == 2


@pytest.mark.parametrize("kind", [torch.optim.SGD, optim.AdamW])
def test_a_closure_that_raises_makes_no_step(kind):
    params = params_of()
    optimizer = kind(params, lr=1e-3)
    watch = numerics.watch(optimizer, every=1, updates=False)

    def closure():
        give(params, 7.0)
        raise RuntimeError("no data")

    for value in (1.0, 2.0):
        with pytest.raises(RuntimeError, match="no data"):
            optimizer.step(closure)
        give(params, value)
        optimizer.step()
    assert largest(watch) == expected([1.0, 2.0])


@pytest.mark.parametrize("policy", ["overflow", "headroom"])
@pytest.mark.parametrize("every", [1, 2])
def test_a_step_by_hand_after_unscale_has_a_record_of_unscaled_gradients(policy, every):
    params = params_of()
    optimizer, scaler = optim.AdamW(params, lr=1e-3), scaler_of(policy=policy)
    watch = numerics.watch(optimizer, scaler, every=every)
    for value in (1.0, 0.5, 0.25, 0.125):
        give(params, value * scaler.get_scale())
        scaler.unscale_(optimizer)
        optimizer.step()
        scaler.update()
    records = watch.poll()
    assert [record.step for record in records] == list(range(every, 5, every))
    for record in records:
        assert (record.scale, record.skipped) == (1.0, False)
        assert record.largest.tolist() == [2.0 ** (1 - record.step)] * 3
        assert record.moved.tolist() == [5, 5, 5]
    give(params, scaler.get_scale())
    scaler.step(optimizer)  # and back to the scaler's
    give(params, 1.0)
    optimizer.step()
    assert watch.trajectory()[-2:, :2].tolist() == [[5.0, scaler.get_scale()], [6.0, 1.0]]


def test_a_watch_that_comes_after_clipping_records_from_the_next_step_on():
    params = params_of()
    optimizer, scaler = optim.AdamW(params, lr=1e-3), scaler_of()
    for number in range(1, 5):
        give(params, STORED)
        scaler.clip_grad_norm_(optimizer, 1e9)
        if number == 3:
            watch = numerics.watch(optimizer, scaler, every=1)
        scaler.step(optimizer)
        scaler.update()
    (record,) = watch.poll()
    assert (record.step, record.scale, record.largest.tolist()) == (4, 4.0, [STORED] * 3)
    assert record.moved.tolist() == [5, 5, 5]


def test_steps_go_on_by_hand_after_one_of_the_scaler_raised():
    params = params_of()
    optimizer, scaler = optim.AdamW(params, lr=1e-3), scaler_of()
    watch = numerics.watch(optimizer, scaler, every=1)
    give(params, STORED)
    optimizer.step = lambda: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        scaler.step(optimizer)
    del optimizer.step
    give(params, 1.0)
    optimizer.step()
    assert largest(watch) == expected([1.0])


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_step_that_is_tried_again_has_updates(by_hand, monkeypatch):
    """The first of two batches was counted before the error."""
    params, calls = params_of(4), itertools.count(1)
    optimizer, scaler = optim.AdamW([{"params": params[::2]}, {"params": params[1::2]}], lr=1e-3), scaler_of()
    watch = numerics.watch(optimizer, scaler, every=1)
    launch = Batch.launch

    def out_of_memory_at_first(*args):
        if next(calls) == 2:
            raise RuntimeError("out of memory")
        launch(*args)

    monkeypatch.setattr(Batch, "launch", out_of_memory_at_first)
    give(params, STORED)
    step = optimizer.step if by_hand else lambda: scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="out of memory"):
        step()
    step()
    (record,) = watch.poll()
    assert record.moved.tolist() == [5] * 4


def test_a_step_without_gradients_keeps_the_scale():
    params = params_of()
    optimizer, scaler = optim.AdamW(params, lr=1e-3), scaler_of()
    watch = numerics.watch(optimizer, scaler, every=1)
    for has_gradients in (True, False, True):
        give(params, STORED) if has_gradients else optimizer.zero_grad()
        scaler.step(optimizer)
        scaler.update()
    assert watch.trajectory().tolist() == [[1, 4, 0, STORED], [2, 4, 0, 0], [3, 4, 0, STORED]]
    assert [record.step for record in watch.poll()] == [1, 3]


def test_records_outlive_their_rings_if_gradients_come_and_go():
    """More sets of parameters than a watch keeps rings for."""
    params = params_of(6)
    optimizer, scaler = optim.SGD(params, lr=1e-3), scaler_of()
    watch = numerics.watch(optimizer, scaler, every=20, history=4)
    for step in range(1, 101):
        optimizer.zero_grad()
        give([p for i, p in enumerate(params) if step % 20 == 0 or step >> i & 1], STORED)
        scaler.step(optimizer)
        scaler.update()
    assert [record.step for record in watch.collect()] == [40, 60, 80, 100]
    assert len(watch._sets) <= 16


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: _loaded(m)])
def test_copies_of_a_model_with_watched_activations_are_not_watched(duplicate):
    """Averaged models are copies."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer, scaler = optim.AdamW(model.parameters(), lr=1e-3), scaler_of()
    watch = numerics.watch(optimizer, scaler, every=1, activations=model)
    for net in (duplicate(model), model):
        scaler.scale(net(torch.ones(2, 3)).sum()).backward()
    scaler.step(optimizer)
    (record,) = watch.poll()
    assert record.numel[-3:].tolist() == [8, 8, 2]  # of one pass


def _loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_activations_end_with_the_optimizer():
    model = nn.Linear(3, 2)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    numerics.watch(optimizer, every=1, activations=model)
    output = model(torch.ones(1, 3))
    assert output._backward_hooks
    output.sum().backward()
    del optimizer, output
    gc.collect()
    assert not model(torch.ones(1, 3))._backward_hooks


def test_a_removed_watch_is_free():
    """The policy reads in the checks of a watch, and lets it go."""
    params = params_of()
    optimizer, scaler = optim.AdamW(params, lr=1e-3), scaler_of(policy="headroom")
    watch = numerics.watch(optimizer, scaler, every=1)
    give(params, STORED)
    scaler.step(optimizer)
    watch.remove()
    alive = weakref.ref(watch)
    del watch
    assert alive() is None


@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_a_scale_that_is_not_finite_stops_no_training(scale):
    class Logger:
        def log(self, step, values):
            steps.append(step)

    params, steps = params_of(), []
    optimizer, scaler = torch.optim.SGD(params, lr=1e-3), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    watch = numerics.watch(optimizer, scaler, every=1, updates=False).log_to(Logger())
    for value in (4.0, scale, 4.0):
        scaler._scale.fill_(value)
        give(params, STORED)
        with (
            warnings.catch_warnings()
            if value == 4
            else pytest.warns(UserWarning, match=f"loss scale of step 2 is {scale}; expected a finite number")
        ):
            scaler.step(optimizer)
        scaler.update(4.0)
    assert steps == [1, 3]
    with pytest.warns(UserWarning, match="loss scale of step 2"):
        assert "loss scale 4" in watch.table()
