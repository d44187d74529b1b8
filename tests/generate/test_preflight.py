"""What a sampler refuses of a learner before it samples: what mixes the samples of a batch, what
chance decides, and what could never guide.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpfast.errors import InputError
from dpfast.generate.guidance import LearnerPath
from dpfast.generate.models.decoder import IdentityDecoder
from dpfast.generate.preflight import check_modules, try_criterion, try_learner
from dpfast.learn.models import Committee

CPU = torch.device("cpu")


def classifier(*inner):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), *inner, nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
    ).eval()


def tried(learner, classes=3, decoder=None, **options):
    path = LearnerPath(decoder=decoder or IdentityDecoder(), learner=learner, **options)
    return try_learner(path, (1, 8, 8), classes, CPU)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class OverTheBatch(nn.Module):
    """Attention that takes the batch for the sequence."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        rows = x.mean((2, 3))[:, None]
        return x + self.attention(rows, rows, rows)[0][:, 0, :, None, None]


@pytest.mark.parametrize(
    "inner",
    [
        nn.BatchNorm2d(8),
        nn.BatchNorm2d(8, momentum=None),
        nn.SyncBatchNorm(8),
        nn.InstanceNorm2d(8),
        nn.GroupNorm(2, 8),
        nn.Dropout(0.5),
        Function(lambda x: F.dropout(x, 0.5, training=False)),
        Function(lambda x: x / x.abs().amax((1, 2, 3), keepdim=True)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_learner_whose_predictions_are_of_one_image_each_is_taken(inner):
    assert tried(classifier(inner)) == 3


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_a_batch_norm_without_running_statistics_is_refused_by_name(kind):
    learner = classifier(kind(8, track_running_stats=False))
    message = rf"its module '1', a {kind.__name__}, keeps no running statistics"
    with pytest.raises(InputError, match=message):
        check_modules(learner)
    with pytest.raises(InputError, match=r"its module 'members\.1\.1'"):
        tried(Committee(classifier(nn.BatchNorm2d(8)), learner).eval())


@pytest.mark.parametrize(
    "inner",
    [
        nn.Dropout(0.5),
        nn.BatchNorm2d(8),
        nn.BatchNorm2d(8, momentum=None),
        nn.MultiheadAttention(8, 2, dropout=0.5),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_module_left_in_training_mode_is_refused_by_name(inner):
    learner = classifier(nn.Sequential(inner))
    learner[1][0].train()
    name = type(inner).__name__
    with pytest.raises(InputError, match=rf"its module '1\.0', a {name}, is in training mode"):
        tried(learner)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda x: F.dropout(x, 0.5, training=True), "changes from call to call"),
        (lambda x: x + 0.1 * torch.rand_like(x), "changes from call to call"),
        (lambda x: x - x.mean(0), "changes with the other images of its batch"),
        (lambda x: x / x.abs().amax(), "changes with the other images of its batch"),
        (lambda x: x.cumsum(0), "changes with the other images of its batch"),
        (lambda x: x - x.roll(1, 0), "changes with the other images of its batch"),
    ],
    ids=["dropout", "noise", "mean", "largest", "earlier ones", "neighbour"],
)
def test_a_function_that_mixes_or_guesses_is_found_by_comparing(function, what):
    with pytest.raises(InputError, match=rf"its module '1\.0', a Function, .* {what}"):
        tried(classifier(nn.Sequential(Function(function))))
    plain = nn.Linear(64, 3)
    with pytest.raises(InputError, match=f"its prediction for an image {what}"):
        tried(lambda images: function(plain(images.flatten(1))))


def test_attention_over_the_batch_is_found_by_comparing():
    with pytest.raises(InputError, match=r"module '1', a OverTheBatch, .* other images"):
        tried(classifier(OverTheBatch()))


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits + 1e4,
        lambda logits: 0 * logits,
        lambda logits: torch.cat([logits[:, :2], logits[:, 2:] - torch.inf], 1),
        lambda logits: logits.bfloat16(),
    ],
    ids=["far from 0", "a head of zeros", "a class that is masked", "bf16"],
)
def test_odd_logits_of_one_image_each_are_taken(change):
    plain = nn.Linear(64, 3)
    assert tried(lambda images: change(plain(images.flatten(1)))) == 3


def test_trying_a_learner_out_moves_no_random_numbers():
    learner = classifier(nn.BatchNorm2d(8))
    before = torch.get_rng_state()
    tried(learner)
    assert torch.equal(torch.get_rng_state(), before)


def test_logits_that_are_nan_are_refused():
    with pytest.raises(InputError, match="learner gives logits that are NaN"):
        tried(lambda images: images.flatten(1)[:, :3] * float("nan"))


def test_a_decoder_that_overflows_is_named_with_its_dtype():
    with pytest.raises(InputError, match="decoder: in float16 it gives images that are not finite"):
        tried(classifier(), decoder=lambda latents: (latents.half() + 6e4) * 2)


def gini(logits, labels):
    return 1 - logits.softmax(1).square().sum(1)


@pytest.mark.parametrize(
    ("criterion", "what"),
    [
        (lambda z, y: gini(z, y) - gini(z, y).mean(), "with the other samples"),
        (lambda z, y: gini(z, y) * y.float().mean(), "with the other samples"),
        (lambda z, y: gini(z, y) / z.detach().norm(), "with the other samples"),
        (lambda z, y: gini(z.cumsum(0), y), "with the other samples"),
        (lambda z, y: gini(F.dropout(z), y), "from call to call"),
    ],
    ids=["mean", "labels", "norm", "earlier ones", "dropout"],
)
def test_a_criterion_that_mixes_or_guesses_is_refused(criterion, what):
    try_criterion(gini, torch.zeros(2, 5))
    with pytest.raises(InputError, match=f"what it gives for a sample changes {what}"):
        try_criterion(criterion, torch.zeros(2, 5))


@pytest.mark.parametrize("criterion", ["entropy", "loss", "margin", "disagreement", "own"])
def test_a_single_logit_is_refused(criterion):
    """Its softmax is 1, its entropy 0 and the gradient of that 0: nothing would guide."""
    from dpfast.generate import criteria

    own = functools.partial(F.cross_entropy, reduction="none")
    chosen = own if criterion == "own" else criteria.CRITERIA[criterion]
    learner = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).eval()
    if criterion == "disagreement":
        learner = Committee(learner, learner).eval()
    for classes in (None, 1):
        with pytest.raises(InputError, match="the softmax of a single logit is always 1"):
            tried(learner, classes, criterion=chosen)


def test_a_criterion_that_reads_a_single_logit_guides():
    learner = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).eval()
    assert tried(learner, None, criterion=lambda z, y: -z[:, 0].square()) == 1


def test_an_unconditional_generator_asks_for_class_names():
    with pytest.raises(InputError, match="which has one class unless class_names say more"):
        tried(classifier(), classes=1)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_frozen_script_guides_though_it_has_no_modes():
    script = torch.jit.freeze(torch.jit.trace(classifier(), torch.zeros(1, 1, 8, 8)))
    check_modules(script)
    assert tried(script) == 3
