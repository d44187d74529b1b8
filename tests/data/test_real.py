"""The embedded real images: the split, and refusal of files that are not what they claim."""

import gzip

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from dpfast.data import real as real_images
from dpfast.data.fashion import CLASSES, read_idx
from dpfast.data.real import RealData, RealSet, given_real, load_real
from dpfast.errors import InputError
from dpfast.parallel import Ranks


def test_validation_and_test_are_disjoint_halves_of_the_test_images():
    real = load_real("fashion")
    assert real.classes == CLASSES
    assert len(real.validation) == len(real.test) == 5000
    assert real.validation.images.shape == (5000, 1, 32, 32)
    assert real.validation.images.dtype == torch.uint8
    keys = [
        {image.numpy().tobytes() for image in half.images} for half in (real.validation, real.test)
    ]
    assert not keys[0] & keys[1]
    counts = [torch.bincount(half.labels, minlength=10) for half in (real.validation, real.test)]
    assert (counts[0] + counts[1]).tolist() == [1000] * 10
    assert int(counts[0].min()) > 450


def test_an_unknown_set_is_named():
    with pytest.raises(InputError, match="validation = 'cifar'"):
        load_real("cifar")


def test_a_file_that_is_not_idx_is_refused(tmp_path):
    path = tmp_path / "images.gz"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_idx(path)
    path.write_bytes(gzip.compress(b"not an idx file"))
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(path)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2])))
    with pytest.raises(ValueError, match=r"2 bytes.*shape \(9,\)"):
        read_idx(path)


IMAGES = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
LABELS = torch.arange(20) % 2
KINDS = {"classes": ("cat", "dog"), "shape": (1, 8, 8)}


class Labelled(Dataset):
    """One label for all images, of any kind."""

    def __init__(self, label):
        self.label = label

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, number):
        return IMAGES[number], self.label


class Pictures(Dataset):
    """Pictures of PIL and their labels."""

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, i):
        return Image.fromarray(IMAGES[i, 0].numpy()), int(LABELS[i])


@pytest.mark.parametrize(
    "given",
    [(IMAGES, LABELS), (IMAGES / 255, LABELS), TensorDataset(IMAGES, LABELS), Pictures()],
    ids=["tensors", "floats", "dataset", "pictures"],
)
def test_what_a_caller_has_is_split_within_each_class_as_a_folder_is(given):
    real = given_real(given, **KINDS)
    assert real.classes == ("cat", "dog")
    assert torch.equal(
        real.validation.images, IMAGES[LABELS.argsort(stable=True)[::2].sort().values]
    )
    assert real.test.labels.tolist() == [0, 1] * 5
    assert real.test.labels.dtype == torch.int64


def test_of_a_dataset_each_rank_keeps_its_part_and_says_that_it_goes_on(monkeypatch):
    monkeypatch.setattr(real_images, "BATCH", 3)
    whole = given_real((IMAGES, LABELS), **KINDS)
    parts = []
    for rank in range(3):
        beats = []
        ranks = Ranks(rank=rank, size=3)
        ranks.beat = lambda beats=beats: beats.append(1)
        parts.append(given_real(TensorDataset(IMAGES, LABELS), **KINDS, ranks=ranks))
        assert len(beats) == len(IMAGES)
        expected = given_real((IMAGES, LABELS), **KINDS, ranks=ranks)
        assert torch.equal(parts[-1].test.images, expected.test.images)
        assert torch.equal(parts[-1].validation.labels, expected.validation.labels)
    assert [len(part.validation) for part in parts] == [4, 3, 3]
    assert sum(len(part.test) for part in parts) == len(whole.test)


def test_classes_without_names_are_numbered():
    assert RealData.split(IMAGES, LABELS).classes == ("0", "1")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((IMAGES[:, 0], LABELS), r"images of shape \(20, 8, 8\)"),
        (
            (IMAGES, LABELS[:5]),
            r"labels are torch.int64 \(5,\), expected an integer for each of 20 samples",
        ),
        (
            (IMAGES[..., :4], LABELS),
            r"images of shape \(1, 8, 4\), the generator's are \(1, 8, 8\)",
        ),
        ((IMAGES, LABELS + 1), "label 2, expected 0 to 1"),
        ((IMAGES[:1], LABELS[:1]), "'cat' has one image, expected two or more"),
        ((IMAGES, torch.zeros_like(LABELS)), "'dog' has no image, expected two or more"),
        ((IMAGES.float(), LABELS), "images are torch.float32, expected torch.uint8, or floats"),
        ("photos", "real is a str: expected dpfast.RealData"),
        (TensorDataset(IMAGES), "item 0 is no image and label"),
        (Labelled(2.7), "item 0: the label is 2.7, expected a whole number from 0 to 1"),
        (Labelled(torch.tensor(0.5)), r"item 0: the label is tensor\(0.5000\)"),
        (Labelled(None), "item 0: the label is missing"),
        (Labelled("1"), "item 0: the label is '1'"),
        (Labelled(True), "item 0: the label is True"),
        (Labelled(-1), "item 0: the label is -1"),
        (Labelled(2), "item 0: the label is 2"),
        ((IMAGES, LABELS == 1), r"labels are torch.bool \(20,\), expected an integer"),
        ((IMAGES[:0], LABELS[:0]), "no images"),
        (RealData(("cat", "dog"), *[RealSet(IMAGES, LABELS + 1)] * 2), "label 2, expected 0 to 1"),
        (
            RealData(("dog", "cat"), *[RealSet(IMAGES, LABELS)] * 2),
            "the same names in another order",
        ),
        (RealData(("cow", "cat"), *[RealSet(IMAGES, LABELS)] * 2), "class 0 is 'cow'"),
        (
            RealData(("cat", "dog"), RealSet(IMAGES[:0], LABELS[:0]), RealSet(IMAGES, LABELS)),
            "its validation set holds no images",
        ),
        (
            RealData(("cat", "dog"), None, RealSet(IMAGES, LABELS)),
            "its validation set is no RealSet",
        ),
        (
            RealData(("cat", "dog"), *[RealSet(IMAGES.numpy(), LABELS)] * 2),
            "its validation set is no RealSet of tensors",
        ),
        (RealData(("cat",), *[RealSet(IMAGES, LABELS)] * 2), "1 classes, the generator has 2"),
    ],
)
def test_what_is_no_set_of_real_images_is_refused_in_a_line(given, said):
    with pytest.raises(InputError, match=said) as caught:
        given_real(given, **KINDS)
    assert "\n" not in str(caught.value)


def test_arrays_of_numpy_and_lists_of_labels_are_split_like_tensors():
    right = RealData.split(IMAGES, LABELS, ("cat", "dog"))
    for images, labels in ((IMAGES.numpy(), LABELS.numpy()), (IMAGES, LABELS.tolist())):
        found = RealData.split(images, labels, (name for name in ("cat", "dog")))
        assert found.classes == right.classes
        assert torch.equal(found.validation.images, right.validation.images)
        assert torch.equal(found.test.labels, right.test.labels)
    with pytest.raises(InputError, match="labels are a NoneType, expected a tensor"):
        RealData.split(IMAGES, None)
