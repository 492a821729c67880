"""Gradients of activations as rows of a record: of several passes and calls, and for the policy."""

import counted
import pytest
import torch
from fusedamp import GradScaler, numerics, optim
from torch import nn


class Net(nn.Module):
    """Leaf modules that are called twice, once, and never; a nested one; and an output that is expanded."""

    def __init__(self):
        super().__init__()
        self.twice, self.never = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 3), nn.ReLU())

    def forward(self, x):
        return self.inner(self.twice(self.twice(x)))


NAMES = ("twice (activation)", "never (activation)", "inner.0 (activation)", "inner.1 (activation)")


def oracle(model):
    """Collect what flows into the outputs of leaf modules."""
    seen = {}

    def follow(name, output):
        output.register_hook(lambda grad: seen.setdefault(f"{name} (activation)", []).append(grad.clone()))

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, inputs, output, name=name: follow(name, output))
    return seen


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("drive", ["scaler", "torch", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_what_flowed(passes, drive, dtype):
    torch.manual_seed(0)
    model = Net().to(dtype)
    seen = oracle(model)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    kind = {"scaler": GradScaler, "torch": torch.amp.GradScaler}.get(drive)
    scaler = None if kind is None else kind("cpu", init_scale=64.0)
    watch = numerics.watch(optimizer, scaler, every=2, model=model, activations=model)
    for step in range(1, 5):
        seen.clear()
        optimizer.zero_grad()
        for _ in range(passes):
            loss = model(torch.randn(5, 4, dtype=dtype)).float().square().sum()
            (loss if scaler is None else scaler.scale(loss)).backward()
        scale = 1.0 if scaler is None else scaler.get_scale()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        records = watch.poll()
        assert [record.step for record in records] == ([step] if step % 2 == 0 else [])
        for record in records:
            assert record.names[-4:] == NAMES
            assert record.names[0] == "twice.weight"
            assert record.scale == scale
            for i, name in enumerate(record.names[-4:], len(record.names) - 4):
                grads = torch.cat([grad.flatten() for grad in seen.get(name, [])] or [torch.zeros(0)])
                assert torch.equal(record.histogram[i], counted.histogram(grads)), name
                assert record.largest[i] == counted.largest(grads)
                wanted = (grads.double() / scale).norm().item()
                assert record.norm[i].item() == pytest.approx(wanted, rel=1e-5)
                assert record.moved[i] == 0


def test_skipped_steps_and_removal():
    model = Net()
    optimizer = optim.AdamW(model.parameters())
    scaler = GradScaler("cpu", init_scale=64.0)
    watch = numerics.watch(optimizer, scaler, every=1, activations=model)
    for bad in (False, True):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(2, 4)).sum() * (float("inf") if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    good, skipped = watch.poll()
    assert (good.skipped, skipped.skipped) == (False, True)
    assert skipped.largest[-1] == float("inf")
    watch.remove()
    assert not any(module._backward_pre_hooks for module in model.modules())


def test_the_largest_of_all_is_known_on_the_device():
    model = Net()
    optimizer = optim.AdamW(model.parameters())
    watch = numerics.watch(optimizer, every=10**6, activations=model)
    assert watch.largest_activation(torch.device("cpu")) is None
    seen = oracle(model)
    (model(torch.randn(2, 4)).sum() * 1000).backward()
    grads = torch.cat([grad.flatten() for some in seen.values() for grad in some])
    assert watch.largest_activation(torch.device("cpu")).item() == counted.largest(grads)
