"""Schedule, trainer and learner factory."""

import functools

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from dpfast.config import Learner
from dpfast.errors import InputError
from dpfast.learn.compiling import WhenItPays
from dpfast.learn.models import Committee, build_learner
from dpfast.learn.trainer import Trainer, wsd
from dpfast.practice.checkpoint import save_weights


def test_wsd_warms_up_stays_and_cools_down():
    factors = [wsd(s, total=100, warmup=0.1, cooldown=0.2) for s in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[:10] == sorted(factors[:10])
    assert set(factors[10:81]) == {1.0}
    assert factors[80:] == sorted(factors[80:], reverse=True)
    assert factors[90] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.01
    assert wsd(0, total=10, warmup=0.0, cooldown=0.0) == 1.0


def toy(steps=60, **options):
    torch.manual_seed(0)
    trainer = Trainer(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), Learner(lr=0.05, **options), iterations=steps
    )
    images = torch.randn(48, 1, 4, 4)
    labels = images.flatten(1)[:, :3].argmax(1)
    return trainer, [float(trainer.step(images, labels)) for _ in range(steps)]


def test_training_lowers_the_loss_and_ends_at_rate_zero():
    trainer, losses = toy()
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.rate < 1e-6
    assert trainer.cooling
    assert not trainer.warming


def test_ema_follows_the_weights_by_its_decay():
    trainer, _ = toy(steps=200, ema_decay=0.9)  # (1 + n) / (10 + n) has passed 0.9
    image, label = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    old = trainer.ema.module[1].weight.clone()
    trainer.step(image, label)
    torch.testing.assert_close(
        trainer.ema.module[1].weight, 0.9 * old + 0.1 * trainer.model[1].weight.detach()
    )


def test_the_gradient_is_clipped_to_its_norm():
    def norm(**options):
        trainer, _ = toy(steps=1, **options)
        return float(torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm())

    assert norm() > 0.2
    assert norm(clip_grad_norm=0.1) == pytest.approx(0.1, rel=1e-4)
    assert norm(clip_grad_norm=100.0) == norm()


def test_the_norm_that_is_told_is_that_of_the_newest_step_before_it_was_clipped():
    free, clipped = toy(steps=3)[0], toy(steps=1, clip_grad_norm=0.1)[0]
    found = torch.stack([p.grad.norm() for p in free.model.parameters()]).norm()
    assert free.grad_norm() == pytest.approx(float(found))
    assert clipped.grad_norm() == pytest.approx(toy(steps=1)[0].grad_norm())
    free.release()
    assert free.grad_norm() is None


def test_the_rate_that_is_told_is_that_of_the_newest_step():
    trainer, _ = toy(steps=1)
    for _ in range(3):
        before = trainer.rate
        trainer.step(torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]))
        assert trainer.newest_rate == before == trainer.optimizer.param_groups[0]["lr"]


def test_bf16_is_of_the_forward_alone():
    trainer, losses = toy(precision="bf16")
    seen = []
    trainer.model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.step(torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]))
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses[-1] < 0.5 * losses[0]
    exact = toy(precision="fp32")[1]
    assert 0 < abs(losses[0] - exact[0]) < 0.01
    assert toy(precision="auto")[1] == exact  # on a CPU


def test_a_compiled_learner_is_compiled_once_and_learns_the_same(monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend=counter, fullgraph=True)
    )
    _, losses = toy(compile=True)
    assert counter.frame_count == 1
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(toy()[1]), rtol=1e-4, atol=1e-5)


class Event:
    """A place in the queue of a GPU that takes ``step`` seconds for a step and lies five steps
    behind.
    """

    steps, step = 0, 0.0

    def record(self):
        self.at = Event.steps

    def query(self):
        return Event.steps >= self.at + 5

    def elapsed_time(self, end):
        return 1e3 * Event.step * (end.at - self.at)


@pytest.mark.parametrize(
    ("step", "iterations", "pays"), [(0.1, 40_000, True), (0.1, 30_000, False), (4e-3, 1200, False)]
)
def test_a_step_is_compiled_where_that_pays_within_the_steps_that_are_left(step, iterations, pays):
    ask, said = WhenItPays(Event), []
    Event.step = step
    for Event.steps in range(200):
        said.append(ask(iterations - Event.steps))
    assert said.count(True) == pays
    assert not any(said[:64]), "the queue has not reached the end of what is timed"


def test_what_does_not_compile_goes_on_without_unless_it_was_asked_for(monkeypatch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    (trainer, _), (eager, _) = toy(steps=9), toy(steps=9)
    answers = iter((True, False))
    trainer._pays = lambda left: next(answers)
    for _ in range(2):
        images, labels = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
        assert float(trainer.step(images, labels)) == float(eager.step(images, labels))
    assert "the learner's step does not compile and goes on without" in caplog.text
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        toy(steps=3, compile=True)


def test_a_committee_gives_the_logits_of_its_members_live():
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    committee, x = Committee(first, second), torch.randn(5, 4)
    assert committee(x).shape == (5, 2, 3)
    with torch.no_grad():
        second.bias.add_(1.0)
    torch.testing.assert_close(committee(x)[:, 1], second(x))


def test_a_restored_trainer_goes_on_to_the_same_bits_in_any_memory_layout(tmp_path):
    def trainer_of():
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))
        return Trainer(
            nn.Sequential(*layers).to(memory_format=torch.channels_last),
            Learner(lr=0.05),
            iterations=9,
        )

    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    whole, first, second = trainer_of(), trainer_of(), trainer_of()
    for number in range(6):
        whole.step(images, labels)
        (first if number < 3 else second).step(images, labels)
        if number == 2:
            # which keeps no strides
            save_weights(first.state_dict(), tmp_path / "state.safetensors")
            second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    state = second.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())


def test_training_is_the_same_twice():
    assert toy()[1] == toy()[1]


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (
            "transformers:RegNetForImageClassification",
            {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]},
        ),
        (
            "transformers:ResNetForImageClassification",
            {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]},
        ),
        ("tests.learn.test_learn:factory", {"width": 5}),
    ],
)
def test_learners_map_images_to_logits(spec, options):
    model = build_learner(spec, classes=7, channels=1, **options)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)


def factory(*, classes, channels, width):
    return nn.Sequential(
        nn.Conv2d(channels, width, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


@pytest.mark.parametrize(
    ("spec", "options", "named"),
    [
        ("transformers:NoSuchNet", {}, "NoSuchNet"),
        ("transformers:RegNetForImageClassification", {"widht": 3}, "widht"),
        ("no_such_package:factory", {}, "no_such_package"),
        ("tests.learn.test_learn:missing", {}, "missing"),
    ],
)
def test_an_unknown_learner_is_named(spec, options, named):
    with pytest.raises(InputError, match=named):
        build_learner(spec, classes=7, channels=1, **options)
