"""The guidance gradient against plain autograd, and what guidance must not do."""

import pytest
import torch

from dpfast.generate.guidance import GuidanceConfig, entropy_gradient, predict_x0


def arguments(pipeline, learner, batch=5):
    torch.manual_seed(2)
    x = torch.randn(batch, 4, 8, 8)
    labels = torch.arange(batch) % 3
    alpha, sigma = torch.tensor(0.8), torch.tensor(0.6)
    options = {"denoiser": pipeline.denoiser, "decoder": pipeline.guidance_decoder, "learner": learner}
    return (x, torch.tensor(300), labels, alpha, sigma), options


def test_gradient_is_that_of_plain_autograd(pipeline, learner):
    (x, t, labels, alpha, sigma), options = arguments(pipeline, learner)
    gradient, prediction, value = entropy_gradient(x, t, labels, alpha, sigma, **options)

    leaf = x.clone().requires_grad_()
    expected_prediction = pipeline.denoiser.model(leaf, timestep=t.expand(5), class_labels=labels).sample
    x0 = (leaf - 0.6 * expected_prediction) / 0.8
    p = learner(pipeline.guidance_decoder.tiny.decode(x0).sample).softmax(1)
    expected_value = -(p * p.log()).sum(1)
    (expected,) = torch.autograd.grad(expected_value.sum(), leaf)

    torch.testing.assert_close(prediction, expected_prediction.detach())
    torch.testing.assert_close(value, expected_value.detach(), rtol=1e-5, atol=1e-6)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-4


def test_a_small_step_along_the_gradient_raises_entropy_of_every_sample(pipeline, learner):
    (x, *rest), options = arguments(pipeline, learner)
    gradient, _, before = entropy_gradient(x, *rest, **options)
    scale = x.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)
    _, _, after = entropy_gradient(x + 1e-3 * scale.view(-1, 1, 1, 1) * gradient, *rest, **options)
    assert bool((after > before).all())


def test_samples_do_not_mix(pipeline, learner):
    (x, t, labels, alpha, sigma), options = arguments(pipeline, learner)
    together, _, _ = entropy_gradient(x, t, labels, alpha, sigma, **options)
    alone, _, _ = entropy_gradient(x[3:4], t, labels[3:4], alpha, sigma, **options)
    torch.testing.assert_close(together[3:4], alone, rtol=1e-4, atol=1e-8)


def test_the_learner_keeps_its_gradients_and_weights(pipeline, learner):
    inputs, options = arguments(pipeline, learner)
    before = [p.clone() for p in learner.parameters()]
    entropy_gradient(*inputs, **options)
    assert all(p.requires_grad and p.grad is None for p in learner.parameters())
    assert all(torch.equal(p, q) for p, q in zip(learner.parameters(), before, strict=True))


def test_images_are_resized_to_the_learner(pipeline):
    seen = []

    def learner(images):
        seen.append(tuple(images.shape))
        return images.flatten(1)[:, :3]

    inputs, options = arguments(pipeline, learner)
    entropy_gradient(*inputs, **options, image_size=(12, 12))
    assert seen == [(5, 1, 12, 12)]


@pytest.mark.parametrize("kind", ["epsilon", "v", "sample", "flow"])
def test_predict_x0_inverts_every_parametrisation(kind):
    x0, noise = torch.randn(2, 4), torch.randn(2, 4)
    alpha, sigma = (torch.tensor(0.7), torch.tensor(0.3)) if kind == "flow" else (torch.tensor(0.8), torch.tensor(0.6))
    prediction = {"epsilon": noise, "v": alpha * noise - sigma * x0, "sample": x0, "flow": noise - x0}[kind]
    torch.testing.assert_close(predict_x0(alpha * x0 + sigma * noise, prediction, alpha, sigma, kind), x0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GuidanceConfig(every=3), {0, 3, 6, 9}),
        (GuidanceConfig(every=1, until=0.5), {0, 1, 2, 3, 4}),
        (GuidanceConfig(every=4, until=0.5), {0, 4}),
        (GuidanceConfig(omega=0.0, every=1), set()),
    ],
)
def test_guided_steps(config, expected):
    assert config.steps(10) == expected
