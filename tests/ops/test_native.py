"""What only the compiled extension can get wrong: threads, forks, large outputs, conversions of
16-bit floats.
"""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from dpfast.ops import dispatch, entropy_and_grad, gather_batch, guided_step, normal

pytestmark = pytest.mark.skipif(
    dispatch.INTERPRETED or dispatch.native() is None,
    reason="the extension was not built, or Triton is under test",
)


@pytest.fixture(autouse=True)
def on_the_extension(monkeypatch):
    monkeypatch.setattr(dispatch, "FORCED", "native")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(257, 300, generator=generator)
    x, cond, grad = (torch.randn(33, 1500, generator=generator) for _ in range(3))
    table = torch.tensor([[0.8, 0.6, 0.9, 0.3, 0.0, 0.2]])
    ids = torch.arange(33)
    skipped = torch.zeros((), dtype=torch.int64)
    grad[::2, 3] = torch.nan
    step = guided_step(
        x, cond, None, grad, table, 0, cfg_scale=1.0, omega=0.1, sample_ids=ids, skipped=skipped
    )
    store = torch.randint(0, 256, (9, 3, 31, 33), dtype=torch.uint8, generator=generator)
    options = {"mean": [0.5] * 3, "std": [0.2] * 3, "dtype": torch.float32, "channels_last": True}
    batch = gather_batch(store, torch.arange(200) % 9, **options)
    return [*entropy_and_grad(logits), step, skipped, batch, normal(ids, (1500,), seed=1, stream=0)]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(count, threads):
    threads(1)
    expected = results()
    threads(count)
    for actual, alone in zip(results(), expected, strict=True):
        assert torch.equal(actual, alone)


def test_callers_may_come_from_many_threads(threads):
    threads(2)
    expected = results()
    found: list[bool] = []

    def call() -> None:
        for _ in range(5):
            found.append(all(map(torch.equal, results(), expected)))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [True] * 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own_threads(threads):
    threads(2)
    # the fill would start torch's own threads, which no forked child has
    torch.use_deterministic_algorithms(False)
    ids = torch.arange(64)
    expected = normal(ids, (2000,), seed=1, stream=0).numpy()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for a thread which it does not have ends all the same
        os._exit(0 if (normal(ids, (2000,), seed=1, stream=0).numpy() == expected).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_outputs_beyond_the_caches():
    """From 4 MiB on, stores bypass the caches; rows of 1001 floats start at every alignment."""
    logits = torch.randn(1100, 1001)
    values, gradient = entropy_and_grad(logits)
    for rows in (slice(0, 3), slice(700, 703), slice(1097, 1100)):
        assert torch.equal(values[rows], entropy_and_grad(logits[rows])[0])
        assert torch.equal(gradient[rows], entropy_and_grad(logits[rows])[1])
    assert not gradient.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_float_converts(dtype):
    values = (
        torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(2, -1)
    )
    table = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    same = guided_step(
        values, values, None, None, table, 0, cfg_scale=1.0, omega=0.0, prediction="sample"
    )
    whole = values.isfinite()
    assert torch.equal(same[whole].view(torch.int16), values[whole].view(torch.int16) * 1)
    assert same[values.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_floats_round_to_nearest_even(dtype):
    wide = torch.cat(
        (
            torch.randn(4000),
            torch.randn(4000) * 1e-6,
            torch.randn(100) * 7e4,
            torch.tensor([65519.0, 65520.0]),
        )
    )
    x = torch.zeros(1, len(wide), dtype=dtype)
    table = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 0.0]])
    options = {"cfg_scale": 1.0, "omega": 0.0, "prediction": "sample"}
    store = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    rounded = guided_step(x, wide[None], None, None, table, 0, **options)
    torch.testing.assert_close(rounded, wide[None].to(dtype), rtol=0, atol=0)
    batch = gather_batch(
        store,
        torch.zeros(1, dtype=torch.int64),
        mean=[0.3],
        std=[1e-3],
        dtype=dtype,
        channels_last=False,
    )
    exact = gather_batch(
        store,
        torch.zeros(1, dtype=torch.int64),
        mean=[0.3],
        std=[1e-3],
        dtype=torch.float32,
        channels_last=False,
    )
    assert torch.equal(batch, exact.to(dtype))
