"""patch_torch: every name of torch's scalers means ours, and then torch's again."""

import importlib

import fusedamp
import pytest
import torch
from fusedamp import GradScaler, cpu, cuda, patch_torch

PLACES = {
    "torch": GradScaler,
    "torch.amp": GradScaler,
    "torch.amp.grad_scaler": GradScaler,
    "torch.cuda.amp": cuda.amp.GradScaler,
    "torch.cuda.amp.grad_scaler": cuda.amp.GradScaler,
    "torch.cpu.amp": cpu.amp.GradScaler,
    "torch.cpu.amp.grad_scaler": cpu.amp.GradScaler,
}


def current():
    return {place: importlib.import_module(place).GradScaler for place in PLACES}


@pytest.fixture(autouse=True)
def originals():
    before = current()
    yield before
    assert current() == before, "a test left a patch behind"


def test_function(originals):
    patch = patch_torch()
    assert current() == PLACES
    patch.restore()
    assert current() == originals
    patch.restore()  # once more does nothing
    assert current() == originals


def test_context_manager_ends_on_errors_too(originals):
    def body():
        with patch_torch():
            assert current() == PLACES
            assert isinstance(torch.amp.GradScaler("cpu"), GradScaler)
            raise KeyError

    with pytest.raises(KeyError):
        body()
    assert current() == originals


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_nested_and_ended_in_any_order(originals, order):
    patches = [patch_torch() for _ in range(3)]
    for i in order[:2]:
        patches[i].restore()
        assert current() == PLACES
    patches[order[2]].restore()
    assert current() == originals


def test_what_inherits_from_torchs_is_left_alone():
    sharded = pytest.importorskip(
        "torch.distributed.fsdp.sharded_grad_scaler", reason="needs torch.distributed"
    )
    with patch_torch():
        assert not issubclass(sharded.ShardedGradScaler, GradScaler)
        with pytest.warns(match="CUDA is not available") if not torch.cuda.is_available() else patch_torch():
            torch.cuda.amp.GradScaler()


def test_signatures_survive():
    with patch_torch():
        assert torch.cpu.amp.GradScaler(32.0).get_scale() == 32.0
        assert torch.amp.GradScaler("cpu", 32.0).get_scale() == 32.0
        assert torch.amp.GradScaler(device="cpu", init_scale=32.0, enabled=False).get_scale() == 1.0
    assert fusedamp.GradScaler is GradScaler
