"""The peaks that this machine is measured to have, against the layers that a run takes."""

import time
import types

import pytest
import torch
import torch.nn.functional as F

from dpfast.hardware import peaks
from dpfast.hardware.peaks import here
from dpfast.ops.frozen_linear import frozen_linear

SLACK = 1.1  # layers took 44 % to 100 % of the peak, and 107 % to 250 % of torch.mm's
TRIES = 5  # other work on the machine takes caches and clock rates from the one or the other


@pytest.fixture(autouse=True)
def processor_time(monkeypatch):
    """Both are timed by what this process got of the processors, not by what others left it."""
    monkeypatch.setattr(peaks, "time", types.SimpleNamespace(perf_counter=time.process_time))


def rate(work, call):
    """FLOP/s of the best of twenty calls."""
    times = []
    for _ in range(20):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return work / min(times)


def below_the_peak(work, call):
    for _ in range(TRIES):
        here.cache_clear()
        if rate(work, call) < SLACK * here().full:
            return True
    return False


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the GPU there")
@pytest.mark.parametrize(
    ("rows", "inside", "out"), [(2048, 192, 768), (2048, 768, 192), (4096, 512, 512)]
)
def test_no_frozen_layer_is_faster_than_the_peak(rows, inside, out):
    x = torch.randn(rows, inside)
    weight = torch.randn(inside, out).t()
    assert below_the_peak(2 * rows * inside * out, lambda: frozen_linear(x, weight))


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the GPU there")
@pytest.mark.parametrize(("channels", "width"), [(64, 32), (256, 8)])
def test_no_convolution_is_faster_than_the_peak(channels, width):
    weight = torch.randn(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    images = torch.randn(64, channels, width, width).to(memory_format=torch.channels_last)
    work = 2 * 64 * width**2 * 9 * channels**2
    assert below_the_peak(work, lambda: F.conv2d(images, weight, padding=1))


@pytest.mark.parametrize("error", [RuntimeError("_scaled_mm: no kernel"), NotImplementedError("x")])
def test_a_build_without_products_in_float8_has_no_peak_of_them(error, monkeypatch):
    """The other peaks of the machine are measured all the same."""

    def missing():
        raise error

    monkeypatch.setattr(peaks, "float8_product", lambda device, side: (1.0, missing))
    assert peaks._float8_peak(torch.device("cpu")) is None
    monkeypatch.setattr(peaks, "float8_product", lambda device, side: (1.0, lambda: None))
    assert peaks._float8_peak(torch.device("cpu")) > 0


def test_measuring_takes_no_random_numbers_from_the_run():
    here.cache_clear()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    here()
    assert torch.equal(torch.rand(4), expected)
