"""Real images from folders: the halves, a folder of its own for the test, and what is refused
before any work.
"""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from dpfast import imagenet
from dpfast.data.real import check_real, count_real, load_real
from dpfast.errors import InputError

CLASSES = ("cat", "red bicycle")


def folder(path, classes=CLASSES, count=3):
    for label, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), color=100 * label + i).save(path / name / f"{i}.png")
    return path


def test_a_folder_is_split_within_each_class(tmp_path):
    real = load_real(str(folder(tmp_path)), classes=CLASSES, shape=(1, 8, 8))
    assert real.validation.images[:, 0, 0, 0].tolist() == [0, 2, 100, 102]
    assert real.test.images[:, 0, 0, 0].tolist() == [1, 101]
    assert real.test.labels.tolist() == [0, 1]
    assert count_real(str(tmp_path / "not there"), classes=4) == (100, 100)
    assert count_real(str(tmp_path)) == (3, 3)  # of six files; the plan does not look at classes


def test_no_image_of_a_class_is_left_out_because_of_its_name(tmp_path):
    """Of 24 files eight were read, where the others were called .tif."""
    for label, name in enumerate(CLASSES):
        (tmp_path / name).mkdir()
        for i, kind in enumerate(("png", "tif", "gif", "jfif")):
            picture = Image.new("L", (8, 8), color=100 * label + 9 * i)
            picture.save(tmp_path / name / f"{i}.{kind}", "JPEG" if kind == "jfif" else None)
    real = load_real(str(tmp_path), classes=CLASSES, shape=(1, 8, 8))
    assert real.validation.images[:, 0, 0, 0].tolist() == [0, 18, 100, 118]
    assert real.test.images[:, 0, 0, 0].tolist() == [9, 27, 109, 127]
    (tmp_path / "cat" / "x.heic").write_bytes(b"")
    with pytest.raises(InputError, match=r"x\.heic: images of this kind are not read"):
        load_real(str(tmp_path), classes=CLASSES, shape=(1, 8, 8))


def test_a_held_out_folder_leaves_the_validation_whole(tmp_path):
    first, second = folder(tmp_path / "a"), folder(tmp_path / "b", count=1)
    real = load_real(str(first), held_out=str(second), classes=CLASSES, shape=(1, 8, 8))
    assert (len(real.validation), len(real.test)) == (6, 2) == count_real(str(first), str(second))
    assert real.validation.images.dtype == torch.uint8


def test_what_cannot_be_is_refused_by_name(tmp_path):
    with pytest.raises(
        InputError, match=r"validation = 'imagenet-val': no such folder; .*--validation FOLDER"
    ):
        check_real("imagenet-val")
    with pytest.raises(InputError, match=r"held_out = .*no sub-folders"):
        check_real("fashion", str(tmp_path))
    one = folder(tmp_path / "one", count=1)
    with pytest.raises(InputError, match=r"held_out = .*'fashion' holds test images of its own"):
        check_real("fashion", str(one))
    with pytest.raises(InputError, match="held_out = 'fashion': no such folder"):
        check_real(str(one), "fashion")
    with pytest.raises(InputError, match=r"'cat' has one image, expected two or more"):
        load_real(str(one), classes=CLASSES, shape=(1, 8, 8))
    with pytest.raises(InputError, match=r"validation = .*no images of 'dog'"):
        load_real(str(one), classes=(*CLASSES, "dog"), shape=(1, 8, 8))
    with pytest.raises(InputError, match=r"validation = .*does not know: red bicycle"):
        load_real(str(one), classes=("cat",), shape=(1, 8, 8))


@pytest.mark.parametrize(("name", "count"), [("imagenet100", 100), ("imagenet1k", 1000)])
def test_the_classes_of_a_named_set_are_those_of_imagenet(name, count):
    names = imagenet.named(name)
    ids = imagenet.load().ids_of(names)
    assert len(names) == count == len(set(ids))
    assert ids[0] == {"imagenet100": "n02869837", "imagenet1k": "n01440764"}[name]


def test_a_panorama_of_ninety_megapixels_is_read_without_a_word(tmp_path):
    """Pillow warns of it as of a bomb, which it takes it for at twice the size."""
    Image.new("1", (9504, 9504), 1).save(tmp_path / "large.png")
    code = """
import sys
from pathlib import Path
from dpfast.data.folders import read_image
print(read_image(Path(sys.argv[1]), (1, 8, 8)).unique().tolist())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path / "large.png"],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("[255]\n", "")
