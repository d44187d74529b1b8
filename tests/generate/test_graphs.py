"""Capture and replay under the rules of a CUDA graph: fixed addresses, no host reads, outputs that
stay.
"""

import logging
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dpfast.generate.graphs import Captured
from dpfast.generate.guidance import GuidanceConfig
from dpfast.generate.sampler import GuidedSampler
from tests.generate.standin import StandInRecorder, Watch, force_reference


class Outputs(NamedTuple):
    y: Tensor
    none: None


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 3).requires_grad_(False)


@pytest.fixture
def recorder(monkeypatch):
    force_reference(monkeypatch)
    return StandInRecorder()


def captured(linear, recorder):
    return Captured(
        lambda x, scale: Outputs(linear(x) * scale, None), recorder, watched=linear.parameters
    )


def test_a_replay_computes_what_the_function_computes(linear, recorder):
    call, scale = captured(linear, recorder), torch.tensor(2.0)
    for _ in range(3):
        x = torch.randn(4, 3)
        torch.testing.assert_close(call(x, scale).y, linear(x) * 2)
    assert recorder.recorded == 1


def test_a_later_replay_leaves_earlier_outputs_alone(linear, recorder):
    call, scale = captured(linear, recorder), torch.tensor(2.0)
    x = torch.randn(4, 3)
    first = call(x, scale)
    kept = first.y.clone()
    call(torch.randn(4, 3), scale)
    assert torch.equal(first.y, kept)
    assert first.none is None


def test_an_input_changed_in_place_is_read_again(linear, recorder):
    call, x, scale = captured(linear, recorder), torch.randn(4, 3), torch.tensor(2.0)
    call(x, scale)
    call(x, scale)
    x.add_(1)
    scale.fill_(3.0)
    torch.testing.assert_close(call(x, scale).y, linear(x) * 3)
    assert recorder.recorded == 1


def test_inputs_are_private(linear, recorder):
    """The caller may overwrite or free its tensors: a replay reads the buffers."""
    call, x = captured(linear, recorder), torch.randn(4, 3)
    call(x, torch.tensor(2.0))
    assert all(buffer.data_ptr() != x.data_ptr() for buffer in call._buffers)


def test_weights_updated_in_place_are_seen_without_another_capture(linear, recorder):
    call, x, scale = captured(linear, recorder), torch.randn(4, 3), torch.tensor(2.0)
    before = call(x, scale).y
    linear.weight.neg_()
    after = call(x, scale).y
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, linear(x) * 2)
    assert recorder.recorded == 1


def test_weights_at_another_address_are_captured_anew(linear, recorder):
    call, x, scale = captured(linear, recorder), torch.randn(4, 3), torch.tensor(2.0)
    call(x, scale)
    call.refresh()
    assert call(x, scale) is not None
    assert recorder.recorded == 1
    linear.weight = nn.Parameter(torch.randn(3, 3), requires_grad=False)
    call.refresh()
    torch.testing.assert_close(call(x, scale).y, linear(x) * 2)
    assert recorder.recorded == 2


@pytest.mark.parametrize(
    "x",
    [torch.randn(5, 3), torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 4).T],
    ids=["shape", "dtype", "stride"],
)
def test_another_signature_is_not_replayed(x, recorder):
    call = Captured(lambda x, scale: Outputs(x * scale, None), recorder)
    call(torch.randn(4, 3), torch.tensor(2.0))
    assert torch.equal(call(x, torch.tensor(2.0)).y, x * 2)
    assert recorder.recorded == 2


def test_a_constant_belongs_to_the_signature(recorder):
    call, x = Captured(lambda x, scale: Outputs(x * scale, None), recorder), torch.randn(4)
    assert torch.equal(call(x, 2).y, x * 2)
    assert torch.equal(call(x, 3).y, x * 3)
    assert recorder.recorded == 2


def test_a_host_read_falls_back_to_eager_and_says_why(recorder, caplog):
    call = Captured(lambda x: Outputs(x * float(x.sum()), None), recorder, name="reading step")
    x = torch.randn(4)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(call(x).y, x * float(x.sum()))
    assert "HostRead" in call.reason
    assert "_local_scalar_dense" in call.reason
    assert "reading step" in caplog.text
    call(x)
    assert recorder.recorded == 0


def test_out_of_memory_is_not_taken_for_a_failed_capture(recorder):
    def fails(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    call = Captured(fails, recorder)
    with pytest.raises(torch.OutOfMemoryError):
        call(torch.randn(2))
    assert call.reason is None


def test_close_releases_buffers_and_the_next_call_captures_anew(linear, recorder):
    call, x, scale = captured(linear, recorder), torch.randn(4, 3), torch.tensor(2.0)
    call(x, scale)
    call.close()
    assert not call._buffers
    torch.testing.assert_close(call(x, scale).y, linear(x) * 2)
    assert recorder.recorded == 2


@pytest.fixture
def replayed(pipeline, learner, recorder):
    guidance = GuidanceConfig(omega=0.1, every=2)
    options = {"steps": 5, "guidance": guidance, "compile": False, "eta": 0.3}
    return GuidedSampler(pipeline, learner, cuda_graphs=recorder, **options)


def test_a_captured_sampler_makes_the_eager_images(replayed, pipeline, learner, recorder):
    eager = GuidedSampler(
        pipeline, learner, steps=5, guidance=replayed.guidance, compile=False, eta=0.3
    )
    expected = torch.cat([b.images for b in eager.stream([0, 1, 2, 0, 1], batch_size=2)])
    images = torch.cat([b.images for b in replayed.stream([0, 1, 2, 0, 1], batch_size=2)])
    assert int((images.int() - expected.int()).abs().max()) <= 1
    # guided, plain, decoding: for all steps and batches, the partial one included
    assert recorder.recorded == 3
    assert not replayed.runner.fallbacks
    replayed.close()
    assert recorder.closed == 1


def test_a_captured_sampler_sees_an_update_of_the_learner(replayed, learner, recorder):
    before = replayed.generate([0, 1, 2]).images
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.neg_()
    assert not torch.equal(before, replayed.generate([0, 1, 2]).images)
    assert recorder.recorded == 3


def test_a_released_sampler_captures_anew_and_makes_the_same_images(replayed, recorder):
    before = replayed.generate([0, 1, 2]).images
    replayed.release()
    assert recorder.closed == 1
    assert recorder.alive == 0
    assert replayed.runner.batch_size == 3, "steps stay prepared"
    assert torch.equal(before, replayed.generate([0, 1, 2]).images)
    assert (recorder.recorded, recorder.alive) == (6, 3)


def test_a_release_compiles_nothing_anew(pipeline):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    sampler = GuidedSampler(pipeline, steps=2, compile=True)
    sampler.runner.backend = backend
    before = sampler.generate([0, 1]).images
    count = len(compiled)
    sampler.release()
    assert torch.equal(before, sampler.generate([0, 1]).images)
    assert len(compiled) == count > 0


def test_the_watch_notices_a_host_read():
    with Watch() as watch:
        torch.ones(3).sum().item()
    assert watch.reads == ["aten::_local_scalar_dense"]
