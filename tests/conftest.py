"""Shared fixtures."""

import os

import pytest
import torch
from on_device import DEVICE, OnDevice
from tiers import marks_of

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: more threads would only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # of what a test starts
    torch.set_num_threads(1)
_on_device = None


def pytest_configure() -> None:
    global _on_device
    if "FUSEDAMP_TEST_DEVICE" in os.environ:
        _on_device = OnDevice(DEVICE)
        _on_device.__enter__()


def pytest_collectstart(collector) -> None:
    if _on_device is not None and isinstance(collector, pytest.Module):
        _on_device.enter_module(collector.path.stem)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items) -> None:
    for item in items:
        for mark in marks_of(item.path):
            item.add_marker(mark)


def pytest_runtest_setup(item) -> None:
    if _on_device is not None:
        _on_device.enter_module(item.path.stem)
        _on_device.active &= item.get_closest_marker("host") is None


@pytest.fixture
def threads():
    """Sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
