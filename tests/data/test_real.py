"""The embedded real images: the split, and refusal of files that are not what they claim."""

import gzip

import pytest
import torch

from dpfast.data.fashion import CLASSES, read_idx
from dpfast.data.real import load_real
from dpfast.errors import InputError


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
