"""Gradients of activations as rows of a record: of several passes and calls, and for the policy."""

import counted
import pytest
import torch
from fusedamp import GradScaler, numerics, optim
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of the oracle


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

    def take(name, grads):
        seen.setdefault(f"{name} (activation)", []).append(grads[0].clone())

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_full_backward_hook(lambda m, _, grads, name=name: take(name, grads))
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
    assert not any(module._forward_hooks for module in model.modules())


def test_the_largest_of_all_is_known_on_the_device():
    model = Net()
    optimizer = optim.AdamW(model.parameters())
    watch = numerics.watch(optimizer, every=10**6, activations=model)
    assert watch.activations(torch.device("cpu")) is None
    seen = oracle(model)
    (model(torch.randn(2, 4)).sum() * 1000).backward()
    grads = torch.cat([grad.flatten() for some in seen.values() for grad in some])
    assert watch.activations(torch.device("cpu")).item() == counted.largest(grads)


def test_outputs_may_be_changed_in_place_and_be_of_any_structure():
    class Pair(nn.Module):
        def forward(self, x):
            return {"double": x * 2, "rest": (x * 3, 5)}

    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.relu, self.pair = nn.Linear(3, 3), nn.ReLU(inplace=True), Pair()

        def forward(self, x):
            pair = self.pair(self.relu(self.linear(x)))
            return pair["double"].sum() + pair["rest"][0].sum()

    model = Changed()
    optimizer = optim.SGD(model.parameters(), lr=1e-3)
    watch = numerics.watch(optimizer, every=1, activations=model)
    x = torch.randn(4, 3)
    with torch.no_grad():
        model(x)  # no backward pass follows
        positive = int((model.linear(x) > 0).sum())
    model(x).backward()
    optimizer.step()
    (record,) = watch.poll()
    by_name = dict(zip(record.names, record.histogram, strict=True))
    assert by_name["pair (activation)"][counted.bin_of(1.0)] == 24  # 1 for each element of both outputs
    assert by_name["relu (activation)"][counted.bin_of(5.0)] == 12
    assert by_name["linear (activation)"][counted.bin_of(5.0)] == positive
    assert by_name["linear (activation)"][0] == 12 - positive
