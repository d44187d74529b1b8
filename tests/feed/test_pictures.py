"""Pools of JPEG files that are not ours: of any size, colour and orientation. Both loaders show the
same pixels of each, in the same boxes, or refuse it with the same words.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dpfast.errors import InputError
from dpfast.feed import dali_installed, make_loader
from dpfast.feed.augment import Augment
from dpfast.feed.loader import LoaderError
from dpfast.ops.crop import resample
from dpfast.pool.batch import BatchFormat
from dpfast.pool.pool import SamplePool
from tests.data.pictures import KINDS, TURN, jpeg, photo, with_note

pytestmark = pytest.mark.skipif(not dali_installed(), reason="DALI is not installed")

BYTES = BatchFormat(mean=0.0, std=1 / 255, channels_last=False)
LOADERS = ("torch", "dali")


def pool_of(files):
    """A pool of files, whose labels are their places."""
    pool = SamplePool("jpeg")
    pool.append_images(files, range(len(files)))
    return pool


@pytest.fixture
def make():
    made = []

    def new(kind, pool, **options):
        made.append(make_loader(kind, pool, **{"seed": 3, "form": BYTES} | options))
        return made[-1]

    yield new
    for loader in made:
        loader.close()


def in_order(batch):
    images, labels = batch
    return images[labels.argsort()]


def shown_by_pillow(file, channels=3):
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    rows = np.asarray(picture.convert("RGB" if channels == 3 else "L"))
    return torch.from_numpy(rows.reshape(*rows.shape[:2], channels).transpose(2, 0, 1).copy())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_both_loaders_show_what_pillow_shows(kind, make):
    """Whichever comes first: beside the file of that kind is a coloured one of its size."""
    file = KINDS[kind]
    wanted = shown_by_pillow(file)
    other = jpeg(photo(*wanted.shape[1:], seed=1))
    for files in ([file, other], [other, file]):
        for loader in LOADERS:
            images = in_order(next(make(loader, pool_of(files), batch_size=2)))
            for image, data in zip(images, files, strict=True):
                torch.testing.assert_close(image, shown_by_pillow(data).float(), rtol=0, atol=1e-3)


def test_a_pool_of_grey_files_is_grey(make):
    files = [jpeg(photo(12, 9, seed=i)[..., 0]) for i in range(4)]
    for loader in LOADERS:
        images = in_order(next(make(loader, pool_of(files), batch_size=4)))
        assert images.shape == (4, 1, 12, 9)
        assert torch.equal(images[2].round().byte(), shown_by_pillow(files[2], 1))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_grey_pool_that_gets_colours_needs_a_new_loader(loader, make):
    grey, coloured = jpeg(photo(12, 9)[..., 0]), jpeg(photo(12, 9))
    pool = pool_of([grey, grey])
    old = make(loader, pool, batch_size=2)
    assert next(old)[0].shape[1] == 1
    pool.append_images([coloured, coloured], [2, 3])
    with pytest.raises(InputError, match="make a new loader"):
        next(old)
    assert next(make(loader, pool, batch_size=4))[0].shape == (4, 3, 12, 9)


@pytest.mark.parametrize(
    "augment",
    [
        Augment(size=(24, 20)),
        Augment(crop=0.08, size=(24, 20), flip=True),
        Augment(crop=0.5, shift=3, size=(24, 20)),
        Augment(size=(32, 32)),  # that of the first picture
    ],
    ids=["whole", "crop", "crop-shift", "first"],
)
@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "channels-first"])
def test_each_box_is_drawn_in_its_own_picture(augment, last, make):
    """The boxes of a batch, in pictures of five sizes, one of them turned."""
    sizes = [(32, 32), (128, 96), (20, 300), (64, 64), (7, 5)]
    files = [jpeg(photo(*size, seed=i)) for i, size in enumerate(sizes)]
    files.append(jpeg(photo(40, 100, seed=9), exif=TURN[6]))
    pool = pool_of(files)
    form = BatchFormat(mean=0.0, std=1 / 255, channels_last=last)
    both = [make(kind, pool, augment=augment, batch_size=6, form=form) for kind in LOADERS]
    for number in range(4):
        (ours, labels), (dali, same) = (next(loader) for loader in both)
        assert torch.equal(labels, same)
        assert ours.stride() == dali.stride()
        torch.testing.assert_close(ours, dali, rtol=0, atol=2e-3)  # 4e-4 measured, of 255
        draw = augment.draw(6, (32, 32), seed=3, number=number)
        whole = [shown_by_pillow(files[label]) for label in labels.tolist()]
        shapes = torch.tensor([image.shape[1:] for image in whole])
        for row, (image, box) in enumerate(zip(whole, draw.boxes_in(shapes), strict=True)):
            _, height, width = image.shape
            assert box[2] <= height
            assert box[3] <= width
            flip = None if draw.flips is None else draw.flips[row : row + 1]
            wanted = resample(image[None].double(), box[None], augment.size, flip)
            torch.testing.assert_close(ours[row].double(), wanted[0], rtol=0, atol=2e-3)


def test_pictures_of_one_size_have_the_boxes_that_pixels_have():
    augment = Augment(crop=0.08, shift=2)
    draw = augment.draw(50, (40, 30), seed=1, number=2)
    assert torch.equal(draw.boxes_in(torch.tensor([[40, 30]] * 50)), draw.boxes)
    rows = torch.tensor([7, 3])
    assert torch.equal(draw.part(rows).boxes_in(torch.tensor([[40, 30]] * 2)), draw.boxes[rows])


def test_a_pool_knows_whether_every_decoder_shows_its_files_alike():
    plain, turned = jpeg(photo(12, 9)), jpeg(photo(12, 9), exif=TURN[3])
    pool = pool_of([plain, plain])
    assert pool.snapshot.alike == (12, 9)
    for files in ([turned], [jpeg(photo(9, 12))], [plain, turned]):
        mixed = pool_of([plain])
        mixed.append_images(files, range(len(files)))
        assert mixed.snapshot.alike is None
        mixed.append_images([plain], [0])
        assert mixed.snapshot.alike is None
    assert pool_of([turned]).snapshot.alike is None


@pytest.mark.parametrize("augment", [Augment(), Augment(crop=0.5), Augment(shift=1)])
@pytest.mark.parametrize("loader", LOADERS)
def test_several_sizes_need_the_size_of_a_batch(augment, loader, make):
    pool = pool_of([jpeg(photo(32, 32))] * 3 + [jpeg(photo(64, 48))])
    made = make(loader, pool, batch_size=4, augment=augment)
    for _ in range(2):
        with pytest.raises(InputError, match=r"pictures of 32 x 32 and 64 x 48 .*size="):
            next(made)
    made.pool = pool_of([jpeg(photo(32, 32))] * 4)
    assert next(made)[0].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_file_that_is_cut_off_is_named_and_the_loader_goes_on(loader, make):
    whole = jpeg(photo(32, 32))
    made = make(loader, pool_of([whole] * 3 + [whole[:-400]]), batch_size=4)
    for _ in range(2):
        with pytest.raises(InputError, match=r"^sample 3 of the pool: cannot be read .*truncated"):
            next(made)
    made.pool = pool_of([whole] * 4)
    assert next(made)[0].shape == (4, 3, 32, 32)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"no image", "begins with b'no'"),
        (b"", "begins with b''"),
        (b"\xff\xd8 no image", "damaged at byte 2"),
        (jpeg(photo(8, 8))[:40], "cut off"),
        (jpeg(photo(8, 8)).replace(b"\0\x08\0\x08", b"\0\0\0\x08"), "8 x 0 pixels"),
        (jpeg(photo(8, 8)).replace(b"\0\x08\0\x08", b"\xff\xff\xff\xff"), "65535 x 65535"),
    ],
)
def test_what_is_no_jpeg_file_never_comes_into_a_pool(data, named):
    pool = pool_of([jpeg(photo(8, 8))])
    with pytest.raises(InputError, match=f"payload 1 of 2.*{named}"):
        pool.append_images([jpeg(photo(8, 8)), data], [0, 1])
    assert len(pool) == 1


@pytest.mark.parametrize("raised", [RuntimeError("a device is gone"), StopIteration()])
@pytest.mark.parametrize("part", ["share_outputs", "release_outputs", "feed_input", "schedule_run"])
def test_an_error_of_dali_is_a_loader_error_and_the_loader_goes_on(part, raised, make):
    """Behind its outputs as well, where it ended a loop like a finished one; ``close`` says
    nothing.
    """
    pool = SamplePool()
    pool.append_images(torch.arange(8).byte()[:, None, None, None].expand(8, 3, 4, 4), range(8))
    made, twin = (make("dali", pool, batch_size=4) for _ in range(2))
    next(made)

    def fail(*_, **__):
        raise raised

    setattr(made._dali.pipeline, part, fail)
    seen = []
    with pytest.raises(LoaderError) as caught:
        seen.extend(made)
    assert caught.value.__cause__ is raised
    after = [next(twin) for _ in range(1 + len(seen) + 3)][-3:]
    for (images, labels), (same, same_labels) in zip(
        [next(made) for _ in range(3)], after, strict=True
    ):
        assert torch.equal(labels, same_labels)
        assert torch.equal(images, same)
    setattr(made._dali.pipeline, part, fail)
    made.close()
    assert next(made)[0].shape == (4, 3, 4, 4)  # a closed loader begins again where it was


def test_a_second_exif_segment_does_not_end_the_process(make):
    """DALI 2.4 dies of it, of one file in a pool."""
    file = with_note(with_note(jpeg(photo(10, 14)), TURN[3]), TURN[6])
    images = next(make("dali", pool_of([file, file]), batch_size=2))[0]
    assert images.shape == (2, 3, 14, 10)
