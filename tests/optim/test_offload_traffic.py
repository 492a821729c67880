"""Offload: what crosses between device and host, when, and which modifications are noticed."""

import copy

import pytest
import torch
from cases import make_params
from fusedamp import GradScaler, optim
from fusedamp.optim.offload import buckets
from pretend_device import Memory, Pretended, Traffic, loss_of, twins

HALF = torch.bfloat16


def trained(shapes=((64, 64), (8,), (128, 32), (16,)), dtype=HALF, **options):
    memory = Memory()
    params = twins(memory, make_params(dtype, list(shapes)))
    optimizer = Pretended(memory, optim.AdamW, params, lr=1e-2, **options)
    loss_of(params, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.link.settle()
    return params, optimizer


def test_two_bytes_each_way():
    params, optimizer = trained()
    scaler = GradScaler("cpu", init_scale=16.0)
    for s in range(1, 4):
        with Traffic(optimizer) as traffic:
            scaler.scale(loss_of(params, s)).backward()
            scaler.clip_grad_norm_(optimizer, 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            optimizer.link.settle()
        assert (traffic.down, traffic.up) == (2.0, 2.0)


def test_a_step_moves_the_version_counters_of_weights():
    """As torch's in-place operations do, so that autograd notices; a skipped step does not."""
    params, optimizer = trained()
    before = [p._version for p in params]
    loss_of(params, 1).backward()
    optimizer.found_inf = 1.0
    optimizer.step()
    assert [p._version for p in params] == before
    del optimizer.found_inf
    optimizer.step()
    assert [p._version for p in params] > before


def test_fp32_weights_cross_in_four_bytes():
    params, optimizer = trained(dtype=torch.float32)
    with Traffic(optimizer) as traffic:
        loss_of(params, 1).backward()
        optimizer.step()
        optimizer.link.settle()
    assert (traffic.down, traffic.up) == (4.0, 4.0)


def test_nothing_goes_up_on_overflow():
    params, optimizer = trained()
    before = [p.detach().clone() for p in params]
    scaler = GradScaler("cpu", init_scale=16.0)
    with Traffic(optimizer) as traffic:
        scaler.scale(loss_of(params, 1, poison=0)).backward()
        scaler.step(optimizer)
        optimizer.link.settle()
    assert (traffic.down, traffic.up) == (2.0, 0.0)
    assert scaler.last_step_skipped
    assert all(map(torch.equal, before, params))


@pytest.mark.parametrize(("says", "expected"), [((False, True), 2.0), ((True, True), 4.0)])
def test_only_the_last_micro_batch_is_copied(says, expected):
    params, optimizer = trained()
    with Traffic(optimizer) as traffic:
        for s, is_last in enumerate(says):
            optimizer.last_micro_batch(is_last)
            loss_of(params, s + 1).backward()
        optimizer.step()
    assert traffic.down == expected


def test_after_a_step_backward_passes_copy_again():
    params, optimizer = trained()
    optimizer.last_micro_batch(False)
    loss_of(params, 1).backward()
    optimizer.step()
    optimizer.link.late = False
    with Traffic(optimizer) as traffic:
        loss_of(params, 2).backward()
    assert traffic.down == 2.0


def test_last_micro_batch_as_a_context():
    params, optimizer = trained()
    optimizer.last_micro_batch(True)
    with Traffic(optimizer) as traffic, optimizer.last_micro_batch(False):
        loss_of(params, 1).backward()
    assert traffic.down == 0.0
    assert optimizer._is_last
    with pytest.raises(TypeError, match=r"\[Offloaded.last_micro_batch\] is_last"):
        optimizer.last_micro_batch("no")


def test_gradients_are_copied_during_the_backward_pass(monkeypatch):
    monkeypatch.setattr(buckets, "FULL", 1)
    params, optimizer = trained()
    optimizer.link.late = False
    with Traffic(optimizer) as traffic:
        loss_of(params, 1).backward()
    assert traffic.down == 2.0
    with Traffic(optimizer) as traffic:
        optimizer.step()
    assert (traffic.down, traffic.up) == (0.0, 2.0)


def test_a_copy_waits_for_the_stream_of_each_gradient(monkeypatch):
    """Backward passes may use several streams; a copy is queued on the last one's."""
    params, optimizer = trained([(8, 8)] * 3)
    met = []
    monkeypatch.setattr(optimizer.link, "meet", met.append)
    loss_of(params, 1).backward()
    assert met == ["down"] * 3


def test_a_main_grad_is_copied_in_the_step():
    """Trainers write it in kernels of their own, which move no version counter."""
    params, optimizer = trained([(8, 8)], betas=(0.0, 0.0))
    optimizer.link.late = False
    params[0].main_grad = torch.zeros(8, 8)
    handle = params[0].register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for s in range(2):
        loss_of(params, s).backward()
        optimizer._arrive(params[0])  # as hooks do that run after the trainer's
        params[0].main_grad.data.add_(1.0)
    optimizer.step()
    handle.remove()
    assert (optimizer.state[params[0]]["exp_avg"] == 2).all()


def test_small_tensors_cross_together():
    params, optimizer = trained(shapes=[(16,)] * 100)
    before = dict(optimizer.link.crossings)
    loss_of(params, 1).backward()
    optimizer.step()
    optimizer.link.settle()
    assert {k: n - before[k] for k, n in optimizer.link.crossings.items()} == {"down": 1, "up": 1}


def test_large_tensors_have_buckets_of_their_own(monkeypatch):
    monkeypatch.setattr(buckets, "SMALL", 64)
    monkeypatch.setattr(buckets, "FULL", 8192)
    _, optimizer = trained(shapes=[(8,), (64, 64), (32, 32), (8,), (40, 40), (100, 60)])
    sizes = [[t.param.nbytes for t in bucket.twins] for bucket in optimizer._mirror.buckets]
    assert sorted(map(sorted, sizes)) == [[16, 16], [2048, 3200], [8192], [12000]]


def test_memory_is_made_for_what_trains():
    """A frozen parameter has none; one that gets its first gradient late gets memory then."""
    memory = Memory()
    params = twins(memory, make_params(HALF, [(8, 8), (4, 4), (16, 16)]))
    params[1].requires_grad_(False)
    optimizer = Pretended(memory, optim.SGD, params, lr=0.5)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert sum(len(host) for host in optimizer.link.host) == 2 * 2 * (64 + 256)
    params[1].grad = torch.ones_like(params[1])
    expected = params[1].float() - 0.5
    optimizer.step()
    optimizer.link.settle()
    assert torch.equal(params[1].float(), expected.to(HALF).float())


@pytest.mark.parametrize("edit", ["in place", "data", "model"])
def test_modified_weights_are_noticed(edit):
    params, optimizer = trained([(8, 8)] * 4)
    other = torch.full_like(params[0], 3.0)
    expected = [other, other, params[2].clone(), params[3].clone()]
    with optimizer.link.edits(), torch.no_grad():
        if edit == "in place":
            params[0].copy_(other)
            params[1].fill_(3.0)
        elif edit == "data":
            params[0].data, params[1].data = other, other.clone()
        else:
            torch.nn.ParameterList(params).load_state_dict(dict(zip("0123", expected, strict=True)))
    optimizer.param_groups[0]["lr"] = 0.0
    with Traffic(optimizer) as traffic:
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        optimizer.link.settle()
    assert all(map(torch.equal, params, expected))
    assert traffic.down == 2.0 + (2.0 if edit == "model" else 1.0)  # load_state_dict writes all


def test_other_memory_at_the_same_address_is_noticed():
    """As after two assignments to .data, when the allocator reuses what the first one freed."""
    memory = bytearray(4 * 8)
    param = torch.nn.Parameter(torch.frombuffer(memory, dtype=torch.float32))
    optimizer = optim.Offloaded(optim.SGD, [param], lr=0.0)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    memory[:] = torch.arange(8.0).numpy().tobytes()
    param.data = torch.frombuffer(memory, dtype=torch.float32)
    optimizer.step()
    assert torch.equal(param, torch.arange(8.0))


def test_a_copy_is_used_in_one_step_only():
    """A replayed CUDA graph writes the same gradients without a version counter, and runs no hook."""
    params, optimizer = trained([(8, 8)], betas=(0.0, 0.0))
    loss_of(params, 1).backward()
    optimizer.step()
    params[0].grad.data.fill_(2.0)
    optimizer.step()
    assert (optimizer.state[params[0]]["exp_avg"] == 2).all()


def test_reload_weights_after_writes_through_data():
    params, optimizer = trained([(8, 8)])
    optimizer.param_groups[0]["lr"] = 0.0
    with optimizer.link.edits():
        params[0].data.fill_(3.0)
    optimizer.reload_weights()
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    optimizer.link.settle()
    assert (params[0] == 3.0).all()


def test_gradients_modified_after_the_backward_pass_are_copied_again():
    params, optimizer = trained([(8, 8)], betas=(0.0, 0.0))
    twin = copy.deepcopy(params[0])
    loss_of(params, 1).backward()
    params[0].grad.zero_()
    optimizer.step()
    assert (optimizer.state[params[0]]["exp_avg"] == 0).all()
    loss_of(params, 2).backward()
    params[0].grad = torch.ones_like(twin)
    optimizer.step()
    assert (optimizer.state[params[0]]["exp_avg"] == 1).all()
