"""The hooks of the read pass in backward: when they come and go, and when they must not look."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from attach_worlds import OPTIMIZERS, World, record_reads
from fusedamp import GradScaler, attach, ops, optim
from on_device import DEVICE
from torch.utils.weak import TensorWeakRef


@pytest.fixture
def reads(monkeypatch):
    return record_reads(monkeypatch)


@pytest.mark.parametrize("how", ["handle", "scaler", "twice", "scaler dies", "optimizer dies"])
def test_detached(how, reads):
    """No hook stays behind, whoever goes; a stale handle does not undo a later attach."""
    world = World(True)
    if how == "handle":
        world.handle.remove()
        world.handle.remove()
    elif how == "scaler":
        world.scaler.detach(world.optimizer)
        world.scaler.detach(world.optimizer)
    elif how == "twice":
        stale, world.handle = world.handle, world.scaler.attach(world.optimizer, min_numel=0)
        stale.remove()
        world.backward()
        assert len(reads) == 5
        world.handle.remove()
        reads.clear()
    else:
        if how == "scaler dies":
            gone = weakref.ref(world.scaler)
            world.scaler = GradScaler(DEVICE)
        else:
            gone = weakref.ref(world.optimizer)
            world.optimizer = OPTIMIZERS["AdamW"](world.params)
        gc.collect()
        assert gone() is None, "the attachment must not keep it alive"
        world.backward()
    assert not any(p._post_accumulate_grad_hooks for p in world.params)
    world.backward()
    assert reads == []
    world.finish()
    assert len(reads) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_not_attached(copied, reads):
    """Neither of the scaler nor of the parameters; and the original still is."""
    world = World(True)
    world.backward()
    world.finish()
    twin, params = copied(world.scaler), copied([torch.nn.Parameter(p.detach()) for p in world.params])
    optimizer = copy.deepcopy(world.optimizer)
    assert not any(p._post_accumulate_grad_hooks for p in params)
    assert not any(p._post_accumulate_grad_hooks for p in optimizer.param_groups[0]["params"])
    assert len(twin._attached) == 0
    twin.attach(optimizer)
    assert len(world.scaler._attached) == 1


def test_gradients_are_not_kept_alive():
    """zero_grad must free them: the next forward needs the memory."""
    for finish in (True, False):
        world = World(True)
        world.backward()
        if finish:
            world.finish(0.5)
        grads = [TensorWeakRef(p.grad) for p in world.params]
        world.optimizer.zero_grad()
        gc.collect()
        assert [ref() for ref in grads] == [None] * 5


def test_small_gradients_and_disabled_scalers_cost_nothing(reads):
    world = World(False)
    world.scaler.attach(world.optimizer)
    world.backward()
    assert reads == []
    scaler = GradScaler(DEVICE, enabled=False)
    optimizer = optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
    scaler.attach(optimizer, min_numel=0)
    assert not optimizer.param_groups[0]["params"][0]._post_accumulate_grad_hooks


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("optimizer",), TypeError, r"\[GradScaler.attach\] optimizer is a str; expected a torch.optim"),
        ((None, -1.0), ValueError, r"\[GradScaler.attach\] norm_type is -1.0; expected a number >= 0"),
        ((None, 2.0, -1), ValueError, r"\[GradScaler.attach\] min_numel is -1; expected a whole number >= 0"),
        ((None, 2.0, 1.5), ValueError, r"\[GradScaler.attach\] min_numel is 1.5; expected a whole number"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, match):
    world = World(True)
    optimizer, norm_type, min_numel = (*arguments, 2.0, 0)[:3] if len(arguments) < 3 else arguments
    with pytest.raises(error, match=match):
        world.scaler.attach(optimizer or world.optimizer, norm_type, min_numel=min_numel)
    assert world.scaler._attached[world.optimizer] is world.handle
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in world.params)


def test_nothing_is_read_early_while_a_graph_is_captured(monkeypatch, reads):
    """A replay writes gradients and moves no version counter; a finding made before is a constant to it."""
    world = World(True)
    world.backward()
    reads.clear()
    monkeypatch.setattr(attach, "_must_wait", lambda grad: True)
    world.finish()
    assert len(reads[0]) == 5, "a captured step reads itself"
    reads.clear()
    world.backward()
    assert reads == []


def test_when_hooks_must_wait(monkeypatch):
    """Guards the conditions themselves, of which this machine may have none."""

    class Gradient:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not attach._must_wait(Gradient())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert attach._must_wait(Gradient())
    assert not attach._must_wait(torch.ones(1, device="cpu"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for ranks, expected in ((1, False), (2, True)):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda ranks=ranks: ranks)
        assert attach._must_wait(torch.ones(1, device="cpu")) == expected


def test_findings_of_another_stream_are_recorded(monkeypatch):
    """Else the allocator gives their memory away while step still reads it."""
    recorded = []

    class Result:
        device = "cuda"
        record_stream = recorded.append

    stats = ops.GradStats(None, None, Result(), Result())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "here")
    for stream in (None, "here"):
        attach._settled(attach._Finding(None, 0, None, 0, stats, stream))
    assert recorded == []
    attach._settled(attach._Finding(None, 0, None, 0, stats, "elsewhere"))
    assert recorded == ["here", "here"]
