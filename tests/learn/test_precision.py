"""The learner's precision: the same where it trains, is evaluated and guides."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from dpfast.evaluate.measures import predict
from dpfast.learn.precision import Autocast, in_bf16, in_precision
from dpfast.practice.experiment import DeliberatePractice
from tests.practice.conftest import recipe  # noqa: F401 - a fixture
from tests.practice.small import REAL
from tests.practice.test_loop import with_


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
@pytest.mark.parametrize("source", ["dp", "prune"])
def test_every_forward_pass_of_a_run_has_the_learners_precision(recipe, precision, dtype, source):  # noqa: F811
    recipe = with_(
        with_(recipe, "practice", sources=(source,), iterations=30), "learner", precision=precision
    )
    practice, seen = DeliberatePractice(recipe, real=REAL), {}

    def look(module, inputs, output):
        if type(module).__name__ == "RegNetConvLayer":
            seen.setdefault((module.training, torch.is_grad_enabled()), set()).add(output.dtype)

    hook = register_module_forward_hook(look)
    try:
        practice.run(progress=False)
    finally:
        hook.remove()
    assert (True, True) in seen, "it trained"
    assert (False, False) in seen, "it was evaluated, and guided"
    assert all(dtypes == {dtype} for dtypes in seen.values()), seen


def test_auto_is_bf16_on_a_gpu_that_has_it(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda able=able: able)
        assert in_bf16("auto", gpu) == able
    assert not in_bf16("auto", cpu)
    assert in_bf16("bf16", cpu)
    model = nn.Linear(3, 3)
    assert in_precision(model, "fp32", gpu) is model


def test_a_classifier_under_autocast_is_read_live_and_trains_where_it_does():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    rounded, images = Autocast(model), torch.randint(0, 256, (5, 1, 2, 2), dtype=torch.uint8)
    assert rounded.training
    model.eval()
    assert not rounded.training
    before = predict(rounded, images)
    assert before.dtype == torch.float32
    assert not model.training, "predict puts back what was"
    with torch.no_grad():
        model[1].bias.add_(1.0)
    torch.testing.assert_close(predict(rounded, images), before + 1, atol=0.02, rtol=0)
