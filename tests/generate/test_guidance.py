"""The guidance gradient against plain autograd, and what guidance must not do."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dpfast.errors import InputError
from dpfast.generate import criteria
from dpfast.generate.bounded import BoundedPath
from dpfast.generate.guidance import GuidanceConfig, GuidancePath, interval_steps, predict_x0
from dpfast.generate.preflight import try_criterion
from dpfast.generate.sampler import GuidedSampler
from dpfast.learn.models import Committee


@pytest.fixture
def path(pipeline, learner):
    return GuidancePath(
        denoiser=pipeline.denoiser, decoder=pipeline.guidance_decoder, learner=learner
    )


@pytest.fixture
def inputs():
    torch.manual_seed(2)
    labels = torch.arange(5) % 3
    return torch.randn(5, 4, 8, 8), torch.tensor(300), labels, torch.tensor(0.8), torch.tensor(0.6)


def plain_entropy(logits, labels):
    p = logits.softmax(1)
    return -(p * p.log()).sum(1)


def plain_margin(logits, labels):
    ordered = logits.sort(dim=1, descending=True).values
    return ordered[:, 1] - ordered[:, 0]


def plain_loss(logits, labels):
    return -logits.log_softmax(1)[torch.arange(len(labels)), labels]


@pytest.mark.parametrize("through", ["denoiser", "latent"])
@pytest.mark.parametrize(
    ("criterion", "plain"),
    [
        ("entropy", plain_entropy),
        ("loss", plain_loss),
        ("margin", plain_margin),
        (
            lambda logits, labels: logits.square().sum(1),
            lambda logits, labels: logits.square().sum(1),
        ),
    ],
    ids=["entropy", "loss", "margin", "function"],
)
def test_gradient_is_that_of_plain_autograd(criterion, plain, through, path, inputs, pipeline):
    x, t, labels, _, _ = inputs
    path = dataclasses.replace(path, criterion=criteria.named(criterion), through=through)
    model, tiny = pipeline.denoiser.model, pipeline.guidance_decoder.model

    leaf = x.clone().requires_grad_()
    expected_prediction = model(leaf, timestep=t.expand(5), class_labels=labels).sample
    held = expected_prediction.detach() if through == "latent" else None
    x0 = (leaf - 0.6 * (expected_prediction if held is None else held)) / 0.8
    expected_value = plain(path.learner(tiny.decode(x0).sample), labels)
    (expected,) = torch.autograd.grad(expected_value.sum(), leaf)

    gradient, prediction, value = path.gradient(*inputs, held)
    torch.testing.assert_close(prediction, expected_prediction.detach())
    torch.testing.assert_close(value, expected_value.detach(), rtol=1e-5, atol=1e-6)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-4


def test_a_small_step_along_the_gradient_raises_entropy_of_every_sample(path, inputs):
    x, *rest = inputs
    gradient, _, before = path.gradient(x, *rest)
    scale = x.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)
    _, _, after = path.gradient(x + 1e-3 * scale.view(-1, 1, 1, 1) * gradient, *rest)
    assert bool((after > before).all())


@pytest.mark.parametrize("chunk", [1, 2, 5, 8])
def test_chunks_of_any_size_give_the_same(chunk, path, inputs):
    whole = path.gradient(*inputs)
    for one, other in zip(whole, BoundedPath.of(path, chunk=chunk).gradient(*inputs), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_the_learner_keeps_its_gradients_and_weights(path, inputs):
    before = [p.clone() for p in path.learner.parameters()]
    path.gradient(*inputs)
    assert all(p.requires_grad and p.grad is None for p in path.learner.parameters())
    assert all(torch.equal(p, q) for p, q in zip(path.learner.parameters(), before, strict=True))


def test_images_are_resized_to_the_learner(path, inputs):
    seen = []

    def learner(images):
        seen.append(tuple(images.shape))
        return images.flatten(1)[:, :3]

    dataclasses.replace(path, learner=learner, image_size=(12, 12)).gradient(*inputs)
    assert seen == [(5, 1, 12, 12)]


@pytest.mark.parametrize("kind", ["epsilon", "v", "sample", "flow"])
def test_predict_x0_inverts_every_parametrisation(kind):
    x0, noise = torch.randn(2, 4), torch.randn(2, 4)
    alpha, sigma = (
        (torch.tensor(0.7), torch.tensor(0.3))
        if kind == "flow"
        else (torch.tensor(0.8), torch.tensor(0.6))
    )
    prediction = {
        "epsilon": noise,
        "v": alpha * noise - sigma * x0,
        "sample": x0,
        "flow": noise - x0,
    }[kind]
    torch.testing.assert_close(
        predict_x0(alpha * x0 + sigma * noise, prediction, alpha, sigma, kind), x0
    )


def test_margin_is_zero_on_the_border_and_negative_inside():
    logits = torch.tensor([[2.0, 2.0, 0.0], [3.0, 1.0, 0.0]])
    assert criteria.margin(logits, torch.zeros(2, dtype=torch.int64)).tolist() == [0.0, -2.0]


def test_disagreement_is_the_divergence_of_the_members():
    sure = torch.tensor([[40.0, 0.0, 0.0], [0.0, 40.0, 0.0], [0.0, 0.0, 0.0]])
    logits = torch.stack([sure[[0, 0]], sure[[0, 1]], sure[[2, 2]], sure[[0, 2]]])
    # the mean of sure and unsure, whose entropies are 0 and log 3
    p = torch.tensor([2 / 3, 1 / 6, 1 / 6])
    mixed = float(-(p * p.log()).sum() - torch.tensor(3.0).log() / 2)
    # log 2 where two are sure and differ
    expected = torch.tensor([0.0, 2.0, 0.0, 0.0]).log().nan_to_num(neginf=0.0)
    expected[3] = mixed
    torch.testing.assert_close(criteria.disagreement(logits, None), expected, rtol=1e-4, atol=1e-5)
    _, gradient = criteria.value_and_gradient(
        criteria.disagreement, logits, torch.zeros(4, dtype=torch.int64)
    )
    assert gradient.shape == logits.shape
    assert bool(gradient.isfinite().all())
    with pytest.raises(
        ValueError, match=r"members of a committee: expected logits \(B, M, K\), got \(4, 3\)"
    ):
        criteria.disagreement(logits[:, 0], None)


def test_a_committee_guides_to_where_its_members_differ(path, inputs, pipeline, learner):
    torch.manual_seed(4)
    other = copy.deepcopy(learner)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    committee = Committee(learner, other).eval()
    apart = dataclasses.replace(path, learner=committee, criterion=criteria.disagreement)
    x, timestep, labels, alpha, sigma = inputs
    gradient, _, before = apart.gradient(x, timestep, labels, alpha, sigma)
    size = (1e-2 * x.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    _, _, after = apart.gradient(x + size * gradient, timestep, labels, alpha, sigma)
    assert bool((after > before).all()), (before, after)

    guidance = GuidanceConfig(criterion="disagreement")
    batch = GuidedSampler(pipeline, committee, steps=3, guidance=guidance, compile=False).generate(
        [0, 1]
    )
    with torch.no_grad():
        first = criteria.entropy(learner(batch.images.float().div(127.5).sub(1)), labels)
    torch.testing.assert_close(batch.entropy, first)
    with pytest.raises(ValueError, match="members of a committee"):
        GuidedSampler(pipeline, learner, guidance=guidance).generate([0])


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (
            lambda logits, labels: logits.detach().sum(1),
            "criterion gives values without a gradient",
        ),
        (lambda logits, labels: logits.argmax(1).float(), "criterion gives values without a gradi"),
        (lambda logits, labels: None, r"criterion fails on logits of shape \(2, 3\): "),
        (lambda logits: logits.sum(1), r"criterion fails on logits of shape \(2, 3\): .* 2 were"),
        (
            lambda logits, labels: logits.sum(),
            r"values of shape \(\) for 2 samples, expected \(2,\)",
        ),
    ],
    ids=["detached", "no gradient", "None", "arity", "shape"],
)
def test_a_criterion_that_cannot_guide_is_named(criterion, message, pipeline, learner):
    with pytest.raises(InputError, match=message):
        try_criterion(criterion, torch.zeros(2, 3))
    sampler = GuidedSampler(pipeline, learner, guidance=GuidanceConfig(criterion=criterion))
    with pytest.raises(InputError, match=message):
        sampler.stream([0])


@pytest.mark.parametrize("name", sorted(set(criteria.CRITERIA) - {"disagreement"}))
@torch.inference_mode()
def test_a_named_criterion_passes_its_check_at_equal_logits(name):
    try_criterion(criteria.CRITERIA[name], torch.zeros(2, 3))


def test_the_fused_entropy_is_the_differentiable_one():
    logits, labels = torch.randn(4, 7), torch.arange(4)
    value, gradient = criteria.value_and_gradient(criteria.entropy, logits, labels)
    other, expected = criteria.value_and_gradient(plain_entropy, logits, labels)
    torch.testing.assert_close(value, other)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(
        criteria.loss(logits, labels), F.nll_loss(logits.log_softmax(1), labels, reduction="none")
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"every": 3}, {0, 3, 6, 9}),
        ({"every": 1, "until": 0.5}, {0, 1, 2, 3, 4}),
        ({"every": 4, "until": 0.5}, {0, 4}),
        (
            {"every": 3, "start": 0.2, "until": 0.9},
            {2, 5, 8},
        ),  # the count begins inside the interval
        (
            {"every": 1, "start": 0.3, "until": 0.6},
            {3, 4, 5},
        ),  # 0.3 * 10 is not 3 in floating point
    ],
)
def test_guided_steps(config, expected):
    assert GuidanceConfig(**config).steps(10) == expected


def test_intervals_that_touch_share_no_step():
    for total in range(1, 60):
        for cut in (0.1, 0.25, 1 / 3, 0.5, 0.7):
            assert [*interval_steps(total, 0, cut), *interval_steps(total, cut, 1)] == list(
                range(total)
            )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"omega": float("nan")}, "omega = nan: expected a finite number"),
        ({"every": 0}, "every = 0"),
        ({"start": 0.5, "until": 0.5}, r"\(start, until\) = \(0.5, 0.5\)"),
        ({"start": 0.6, "until": 0.2}, r"\(start, until\) = \(0.6, 0.2\)"),
        ({"start": -0.1}, r"\(start, until\)"),
        ({"mode": "strong"}, "mode = 'strong': expected one of relative, score"),
        ({"through": "decoder"}, "through = 'decoder'"),
        ({"criterion": "energy"}, "criterion = 'energy': expected one of entropy, loss, margin"),
        ({"anchor": -0.5}, "anchor = -0.5: expected at least 0"),
        ({"anchor": float("nan")}, "anchor = nan: expected a finite number"),
        ({"anchor": float("inf")}, "anchor = inf: expected a finite number"),
        ({"omega": -1e39}, r"omega = -1e\+39: expected a finite number of float32"),
        ({"anchor": "0.5"}, "anchor must be a number, got '0.5'"),
        ({"anchor": True}, "anchor must be a number, got True"),
        ({"anchor": None}, "anchor must be a number, got None"),
        ({"anchor": 0.5, "omega": -0.1}, "anchor = 0.5: expected 0 with omega = -0.1"),
    ],
)
def test_a_wrong_configuration_is_named(wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        GuidanceConfig(**wrong)
