"""What happens to images after they were gathered: RandAugment, erasing, repeats, and a function of
the user's own. All of it is a function of the seed and the place in the order.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpfast.config import Learner
from dpfast.errors import InputError
from dpfast.feed.augment import ERASED, Augment
from dpfast.feed.order import Order
from dpfast.feed.own_augment import augment_at, augmented, try_augment
from dpfast.pool.batch import BatchFormat
from tests.feed.test_loader import KINDS, grow, make, pool_of, same, take  # noqa: F401

CPU = torch.device("cpu")


def noisy(images, seeds):
    """Draws from torch's own generator, as libraries do."""
    return images.add_(0.1 * torch.randn(images.shape)).clamp_(-1, 1)


def by_seed(images, seeds):
    """Draws from each image's own seed."""
    drawn = [torch.rand((), generator=torch.Generator().manual_seed(int(each))) for each in seeds]
    return images + torch.stack(drawn).view(-1, 1, 1, 1)


EVERYTHING = Augment(rand_augment=2, erase=0.5, own=noisy, repeats=2, flip=True, mixup=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_position_restores_every_change_exactly(kind, make):  # noqa: F811
    pool = pool_of()
    first, again = (make(kind, pool, augment=EVERYTHING) for _ in range(2))
    take(first, 3)
    state, before = first.state_dict(), torch.get_rng_state()
    rest = take(first, 4)
    assert torch.equal(torch.get_rng_state(), before), "training draws from the same generator"
    torch.rand(5)
    again.load_state_dict(state)
    assert same(take(again, 4), rest)
    assert not same(rest[:1], rest[1:2])


def test_what_was_drawn_before_is_drawn_as_before():
    plain = Augment(flip=True, crop=0.3, shift=1, mixup=0.4, cutmix=1.0)
    more = replace(plain, rand_augment=3, erase=0.4, own=noisy, repeats=4)
    a, b = (each.draw(64, (20, 30), seed=4, number=7) for each in (plain, more))
    assert torch.equal(a.boxes, b.boxes)
    assert torch.equal(a.flips, b.flips)
    assert a.mix == b.mix
    assert (a.operations, a.erased, a.seeds) == (None, None, None)


def test_ranks_see_their_rows_of_the_whole_batch():
    augment = Augment(rand_augment=2, erase=0.7, own=by_seed)
    draw, form = augment.draw(8, (14, 16), seed=1, number=2), BatchFormat()
    images = torch.rand(8, 3, 14, 16) * 2 - 1
    whole = augment.change(images.clone(), draw, form)
    for rows in (torch.arange(4), torch.arange(4, 8), torch.tensor([6, 1])):
        part = augment.change(images[rows].clone(), draw.part(rows), form)
        assert torch.equal(part, whole[rows])


def test_without_an_operation_bytes_stay_bytes_in_every_form():
    images = torch.randint(256, (2, 3, 5, 4)).float()
    for form in (
        BatchFormat(),
        BatchFormat(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1), dtype=torch.float16),
    ):
        augment = Augment(rand_augment=1)
        draw = augment.draw(2, (5, 4), seed=0, number=0)
        draw = replace(draw, operations=torch.zeros(2, 1, dtype=torch.int64))
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in form.per_channel(3))
        scaled = ((images / 255 - mean) / std).to(form.dtype)
        found = augment.change(scaled.clone(), draw, form)
        assert found.dtype == form.dtype
        torch.testing.assert_close(found, scaled, rtol=2e-3, atol=2e-3)


def test_operations_are_drawn_alike_and_in_both_directions():
    draw = Augment(rand_augment=2).draw(14_000, (8, 8), seed=0, number=1)
    counts = torch.bincount(draw.operations.flatten(), minlength=14)
    assert len(counts) == 14
    assert 1800 < int(counts.min()) <= int(counts.max()) < 2200
    assert abs(float(draw.signs.float().mean())) < 0.03
    assert draw.signs.unique().tolist() == [-1, 1]


def test_erased_boxes_have_the_share_the_area_and_the_place_that_were_asked_for():
    erased = Augment(erase=0.25).draw(8000, (60, 80), seed=0, number=1).erased
    top, bottom, left, right = erased.T
    area = ((bottom - top) * (right - left)).float() / 4800
    there = area > 0
    assert float(there.float().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(area[there].min()) > ERASED[0] - 0.005
    assert float(area[there].max()) < ERASED[1] + 0.01
    assert int(top.min()) >= 0
    assert int(bottom.max()) == 60
    assert int(right.max()) == 80
    images = torch.ones(3, 2, 4, 5)
    draw = Augment(erase=1.0).draw(3, (4, 5), seed=0, number=0)
    draw = replace(draw, erased=torch.tensor([[1, 3, 0, 2], [0, 0, 0, 0], [0, 4, 4, 5]]))
    found = Augment(erase=1.0).change(images, draw, BatchFormat())
    assert found[0, 1].tolist() == [[1] * 5, [0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [1] * 5]
    assert bool((found[1] == 1).all())
    assert found[2, 0].tolist() == [[1, 1, 1, 1, 0]] * 4


def test_a_box_never_takes_an_image_of_a_pixel():
    images = torch.ones(64, 1, 1, 1)
    draw = Augment(erase=1.0).draw(64, (1, 1), seed=0, number=0)
    assert bool((Augment(erase=1.0).change(images, draw, BatchFormat()) == 1).all())


def test_each_sample_is_as_often_in_a_batch_as_asked_and_passes_cover_all():
    order = Order(3, 12, repeats=3)
    first = order.next(8)
    assert torch.equal(first.view(4, 3), first[::3, None].expand(4, 3))
    assert sorted([*first[::3].tolist(), *order.next(8)[::3].tolist()]) == list(range(8))
    assert torch.equal(Order(3, 4).next(8), first[::3])


def test_repeats_go_on_from_a_position_over_a_growing_pool(make):  # noqa: F811
    pool = pool_of()
    first, again = (make("torch", pool, augment=EVERYTHING, fresh_weight=2.0) for _ in range(2))
    take(first, 2)
    grow(pool, 10)
    take(first, 3)
    state = first.state_dict()
    rest = take(first, 3)
    again.load_state_dict(state)
    assert same(take(again, 3), rest)
    drawn = first.indices_after(state, 3)
    assert torch.equal(drawn.view(4, 2)[:, 0], drawn.view(4, 2)[:, 1])


def test_copies_of_a_sample_are_augmented_otherwise(make):  # noqa: F811
    images, labels = next(make("torch", pool_of(), augment=Augment(crop=0.2, repeats=4)))
    assert torch.equal(labels, labels[::4].repeat_interleave(4))
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    ("part", "error", "said"),
    [
        (lambda: Augment(rand_augment=-1), InputError, "rand_augment = -1: expected at least 0"),
        (lambda: Augment(rand_augment=1.5), TypeError, "rand_augment must be an integer"),
        (lambda: Augment(magnitude=31), InputError, "magnitude = 31, expected 0 to 30"),
        (lambda: Augment(erase=1.2), InputError, "erase = 1.2, expected 0 to 1"),
        (lambda: Augment(erase=float("nan")), InputError, "erase = nan"),
        (lambda: Augment(repeats=0), InputError, "repeats = 0: expected at least 1"),
        (lambda: Augment(own=3), TypeError, "own must be a function of images and seeds, got 3"),
        (
            lambda: Order(0, 8, repeats=3),
            InputError,
            "repeats = 3: expected a divisor of the batch",
        ),
        (
            lambda: Learner(aug_repeats=5),
            InputError,
            "aug_repeats = 5: expected a divisor of learn",
        ),
        (
            lambda: Learner(augment="nowhere"),
            InputError,
            "augment = 'nowhere': expected 'package.m",
        ),
        (lambda: augment_at("nowhere:thing"), InputError, "augment = 'nowhere:thing': cannot impo"),
        (
            lambda: augment_at("math:pi"),
            InputError,
            "augment = 'math:pi': is a float, expected a f",
        ),
        (
            lambda: augment_at("torch:Tensor"),
            InputError,
            "augment = 'torch:Tensor': is a class, ex",
        ),
    ],
)
def test_what_cannot_be_is_one_line_that_names_it(part, error, said):
    with pytest.raises(error, match=f"^{said}"):
        part()


def fails(images, seeds):
    raise KeyError("depth\nand more")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (fails, r"it fails on \(2, 1, 6, 6\): 'depth"),
        (lambda images: images, r"it fails on .*takes 1 positional argument but 2 were given"),
        (lambda images, seeds: None, r"gives a NoneType, expected images \(B, C, H, W\)"),
        (lambda images, seeds: images[:, :, 1:], r"gives \(2, 1, 5, 6\), torch.float32, cpu; expe"),
        (lambda images, seeds: images.double(), r"gives \(2, 1, 6, 6\), torch.float64, cpu; expec"),
        (lambda images, seeds: images / 0, "gives values that are not finite"),
        (
            lambda images, seeds: images + float(np.random.default_rng().random()),
            "gives other images for the same seeds, so a run could not go on",
        ),
    ],
)
def test_a_function_of_ones_own_is_tried_before_a_run(own, said):
    with pytest.raises(InputError, match=f"^augment: {said}") as caught:
        try_augment(own, (1, 6, 6), CPU)
    assert str(caught.value).isprintable()


def test_functions_that_draw_from_torch_or_from_their_seeds_pass():
    for own in (noisy, by_seed):
        try_augment(own, (1, 6, 6), CPU)
    seeds = torch.tensor([4, 9])
    images = torch.zeros(2, 1, 6, 6)
    assert not torch.equal(augmented(noisy, images.clone(), seeds), images)
    one = augmented(noisy, images.clone(), seeds)
    assert not torch.equal(one, augmented(noisy, images.clone(), seeds + 1))


def test_what_a_function_gives_is_copied_before_others_write_to_it():
    """One image for all of a batch, and one that the function keeps."""
    kept = torch.full((4, 1, 6, 6), 0.5)
    for given in (kept[:1].expand(4, -1, -1, -1), kept):
        erasing = Augment(own=lambda images, seeds, given=given: given, erase=0.5)
        draw = erasing.draw(4, (6, 6), seed=3, number=0)
        boxes = draw.erased[:, 1::2] > draw.erased[:, ::2]
        erased = erasing.change(torch.zeros(4, 1, 6, 6), draw, BatchFormat())
        assert torch.equal((erased == 0).flatten(1).any(1), boxes.all(1))
        assert 0 < int(boxes.all(1).sum()) < 4
        assert torch.equal(kept, torch.full((4, 1, 6, 6), 0.5))
