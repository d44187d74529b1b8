"""Shifts, folders and ImageNet-style sets: determinism, class subsets, and refusals before any
work.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from dpfast import imagenet
from dpfast.data.real import RealSet
from dpfast.errors import InputError
from dpfast.evaluate.sets import evaluate_sets, evaluation_sets
from dpfast.evaluate.shifts import SHIFTS, shift

IDS = imagenet.load().ids


@pytest.mark.parametrize("name", SHIFTS)
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 24, 40), (2, 40, 21)])
def test_a_shift_depends_on_the_image_and_its_id_alone(name, shape):
    images = torch.randint(
        0, 256, (6, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    together = shift(images, name, 3)
    alone = torch.cat([shift(images[i : i + 1], name, 3, ids=torch.tensor([i])) for i in range(6)])
    assert together.shape == images.shape
    assert together.dtype == torch.uint8
    # a pixel may round the other way: the order of a convolution's sums depends on the batch
    assert (together.int() - alone.int()).abs().max() <= 1
    assert not torch.equal(together, images)


@pytest.mark.parametrize("name", SHIFTS)
def test_severity_moves_images_further(name):
    grid = torch.linspace(0, 20, 32)
    image = (127 * (1 + grid.sin().outer(grid.cos()))).to(torch.uint8).expand(8, 1, 32, 32)
    distance = [(shift(image, name, s).float() - image.float()).square().mean() for s in (1, 5)]
    assert distance[1] > 1.2 * distance[0] > 0


def test_noise_and_directions_follow_the_seed():
    image = torch.full((4, 1, 16, 16), 128, dtype=torch.uint8)
    assert not torch.equal(shift(image, "noise", 2, seed=1), shift(image, "noise", 2, seed=2))
    spread = (shift(image.expand(4, 8, 16, 16), "noise", 2).float() - 128).std() / 255
    assert float(spread) == pytest.approx(0.08, rel=0.05)


def test_a_bad_shift_is_named():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="fog"):
        shift(image, "fog", 1)
    with pytest.raises(ValueError, match="severity = 6"):
        shift(image, "blur", 6)
    with pytest.raises(TypeError, match="float32"):
        shift(image.float(), "blur", 1)


def grey(label):
    return Image.fromarray(np.full((8, 8), 10 * label, np.uint8))


def folder(root, names):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        grey(i % 25).save(root / name / "one.png")
    return root


def real(channels=1):
    return RealSet(torch.zeros(2, channels, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))


def test_every_way_to_call_a_class(tmp_path):
    classes = ("T-shirt/top", "Dress", "Bag", "Coat")
    root = folder(tmp_path / "mine", ["Dress", "T-shirt-top", "2", "0003-Coat"])
    (found,) = evaluation_sets((str(root),), real(), classes)
    labels = {
        int(i[0, 0, 0]): int(y)
        for images, ys in found.batches()
        for i, y in zip(images, ys, strict=True)
    }
    assert labels == {0: 1, 10: 0, 20: 2, 30: 3}
    (row,) = evaluate_sets(
        lambda x: torch.nn.functional.one_hot(torch.full((len(x),), 2), 4) * 9.0, [found]
    )
    assert (row.name, row.images, row.classes, row.result.top1) == ("mine", 4, 4, 0.25)


def test_unknown_classes_are_named(tmp_path):
    root = folder(tmp_path / "mine", ["Dress", "Hat", "Glove"])
    with pytest.raises(InputError, match="Glove, Hat"):
        evaluation_sets((str(root),), real(), ("Dress", "Bag"))
    with pytest.raises(InputError, match="neither a folder"):
        evaluation_sets(("shfts",), real(), ("Dress", "Bag"))
    with pytest.raises(InputError, match="not those of ImageNet"):
        evaluation_sets((f"imagenet-r={root}",), real(), ("Dress", "Bag"))
    with pytest.raises(InputError, match="blur comes twice"):
        evaluation_sets(("shifts", "blur"), real(), ("Dress", "Bag"))


def test_imagenet_lists_its_classes():
    data = imagenet.load()
    assert len(set(data.ids)) == 1000
    assert len(data.r) == len(data.a) == 200
    assert (data.ids[0], data.ids[-1]) == ("n01440764", "n15075141")
    # ostrich is in ImageNet-R, not in -A; stingray in both; tench in neither
    assert ["n01518878" in data.r, "n01518878" in data.a] == [True, False]
    assert "n01498041" in data.r & data.a
    assert "n01440764" not in data.r | data.a
    assert data.ids_of(data.names) == data.ids
    assert data.ids_of([name.split(",")[0] for name in data.names]) == data.ids
    assert data.ids_of(["Dress"]) is None
    with pytest.raises(InputError, match="crane"):
        data.ids_of(["crane", "tench"])


@pytest.mark.parametrize("subset", ["r", "a"])
def test_a_learner_chooses_among_the_200_classes_of_a_subset(tmp_path, subset):
    inside = sorted(imagenet.load().subset(subset))
    root = folder(tmp_path / "any-name", inside)
    (found,) = evaluation_sets((str(root),), real(), IDS)
    assert found.among is not None
    assert {IDS[i] for i in found.among} == set(inside)
    outside = next(i for i, w in enumerate(IDS) if w not in inside)
    best = found.among[7]

    def model(images):
        logits = torch.zeros(len(images), 1000)
        logits[:, outside], logits[:, best] = 9, 5
        return logits

    (row,) = evaluate_sets(model, [found])
    assert (row.classes, row.images) == (200, 200)
    assert row.result.top1 == pytest.approx(1 / 200)


def test_imagenet_sets_by_name(tmp_path):
    root = folder(tmp_path / "r", sorted(imagenet.load().r))
    few = [
        *sorted(imagenet.load().r)[:3],
        "n01440764",
    ]  # a learner of four classes, three of them in ImageNet-R
    (found,) = evaluation_sets((f"imagenet-r={root}",), real(), few)
    (row,) = evaluate_sets(lambda x: torch.zeros(len(x), 4), [found])
    assert (row.images, row.classes) == (3, 3)
    with pytest.raises(InputError, match="imagenet-a has 200 classes; the folder lacks"):
        evaluation_sets((f"imagenet-a={root}",), real(), IDS)
    v2 = folder(tmp_path / "v2", [str(i) for i in range(1000)])
    (found,) = evaluation_sets((f"imagenet-v2={v2}",), real(), few)
    assert sorted(label for _, labels in found.batches() for label in labels.tolist()) == [
        0,
        1,
        2,
        3,
    ]
