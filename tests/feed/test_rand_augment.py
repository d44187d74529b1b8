"""RandAugment does to a tensor what Pillow does to a picture, image by image."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from dpfast.feed.rand_augment import OPERATIONS, rand_augment

NAMES = (
    *("identity", "shear x", "shear y", "translate x", "translate y", "rotate"),
    *("brightness", "colour", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
SIZE = (13, 17)  # height and width


def pictures():
    """Noise, a dark gradient with few levels, and one colour: (3, 3, 13, 17) uint8."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randint(256, (3, *SIZE), generator=generator)
    slope = torch.arange(SIZE[1]).expand(3, *SIZE) // 2 * torch.tensor([3, 2, 5]).view(3, 1, 1) + 20
    return torch.stack([noise, slope, torch.full((3, *SIZE), 77)]).to(torch.uint8)


def pillow(image: Image.Image, name: str, strength: float) -> Image.Image:
    """The operation by Pillow, at a signed strength in [-1, 1], as torchvision asks for it."""
    width, height = image.size

    def warped(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)

    enhancers = {
        "brightness": ImageEnhance.Brightness,
        "colour": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "sharpness": ImageEnhance.Sharpness,
    }
    if name in enhancers:
        return enhancers[name](image).enhance(1 + 0.9 * strength)
    return {
        "identity": lambda: image,
        "shear x": lambda: warped(1, 0.3 * strength, 0, 0, 1, 0),
        "shear y": lambda: warped(1, 0, 0, 0.3 * strength, 1, 0),
        "translate x": lambda: warped(1, 0, int(150 / 331 * width * strength), 0, 1, 0),
        "translate y": lambda: warped(1, 0, 0, 0, 1, int(150 / 331 * height * strength)),
        "rotate": lambda: image.rotate(-30 * strength, Image.Resampling.NEAREST),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * abs(strength))),
        "solarize": lambda: ImageOps.solarize(image, 255 * (1 - abs(strength))),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }[name]()


def changed(images, number, magnitude, sign=1):
    rows = torch.full((len(images), 1), number)
    return rand_augment(images.float(), rows, sign * torch.ones_like(rows), magnitude)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [5.0, 9.0, 30.0])
@pytest.mark.parametrize("number", range(len(OPERATIONS)))
def test_each_operation_is_pillows(number, magnitude, sign):
    images = pictures()
    found = changed(images, number, magnitude, sign)
    assert bool((found == found.round()).all())
    for image, ours in zip(images, found, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        theirs = pillow(picture, NAMES[number], sign * magnitude / 30)
        theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1).float()
        differs = (ours - theirs).abs()
        if number in (1, 2, 5):  # places that lie on the border of two pixels, up to rounding
            assert float((differs > 0).float().mean()) < 0.02
        else:
            assert float(differs.max()) == 0


def test_grey_images_are_changed_like_grey_pictures_and_keep_their_colour():
    images = pictures()[:, :1]
    for number, name in enumerate(NAMES):
        found = changed(images, number, 9.0)
        picture = Image.fromarray(images[0, 0].numpy())
        theirs = torch.from_numpy(np.array(pillow(picture, name, 0.3))).float()
        assert float(((found[0, 0] - theirs).abs() > 1).float().mean()) < 0.02, name


def test_an_image_does_not_depend_on_its_batch_and_gets_operations_of_its_own():
    images = pictures()[[0, 0, 0, 0, 1, 2]].float()
    operations = torch.tensor([[1, 13], [13, 1], [8, 0], [0, 0], [5, 6], [12, 3]])
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [1, 1], [-1, -1], [1, 1]])
    whole = rand_augment(images, operations, signs, 9.0)
    for row in range(6):
        alone = slice(row, row + 1)
        one = rand_augment(images[alone], operations[alone], signs[alone], 9.0)
        assert torch.equal(one[0], whole[row])
    assert torch.equal(whole[3], images[3])
    assert not torch.equal(whole[0], whole[1]), "the order of operations counts"


def test_images_of_one_pixel_and_of_no_contrast_stay_finite():
    for images in (
        torch.full((2, 3, 1, 1), 200),
        torch.zeros(2, 1, 2, 9),
        torch.full((1, 1, 8, 8), 255),
    ):
        for number in range(len(OPERATIONS)):
            found = changed(images, number, 30.0)
            assert found.shape == images.shape
            assert float(found.min()) >= 0
            assert float(found.max()) <= 255
