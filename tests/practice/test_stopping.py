"""SIGTERM: at once where nothing is to be saved, a request elsewhere; and what a run's costs and
device are.
"""

import os
import signal

import pytest
import torch

from dpfast.errors import InputError
from dpfast.hardware.device import device_named
from dpfast.practice.stopping import Stop, Stopped
from dpfast.sources.costs import Cost, Price


def test_sigterm_is_a_request_and_raises_at_once_only_where_that_is_said():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(Stopped):
            stop.check()
    with Stop() as stop, stop.at_once(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_cost_of_a_resumed_round_is_all_that_was_spent_after_the_one_before():
    cost, price = Cost(), Price(2.0, 10.0)
    cost.add(30, price, 3.0)
    before = Cost(**cost.state_dict())
    cost.add(5, price, 1.0)
    resumed = Cost(**cost.state_dict())
    resumed.add(10, price, 2.0)
    assert resumed.since(before) == Cost(samples=15, forwards=30.0, flops=150.0, seconds=3.0)


def test_the_device_is_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device_named("auto") == torch.device("cuda")
    assert device_named("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_named("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(InputError, match=f"device = '{name}'"):
        device_named(name)
