"""The chances of a batch: their statistics, their keys, and mixing by hand."""

import pytest
import torch

from dpfast.feed.augment import Augment, Mix


def test_crops_have_the_areas_and_ratios_that_were_asked_for():
    boxes = Augment(crop=0.25).draw(20_000, (96, 128), seed=1, number=0).boxes
    top, left, height, width = boxes.T
    assert bool(
        (top >= 0).all()
        & (left >= 0).all()
        & (top + height <= 96).all()
        & (left + width <= 128).all()
    )
    assert torch.equal(boxes, boxes.round())
    area, ratio = height * width / (96 * 128), width / height
    assert 0.24 < float(area.min()) < 0.27
    assert 0.74 < float(ratio.min()) < 0.77
    assert 1.31 < float(ratio.max()) < 1.36
    # all of these fit at the first try: uniform in area, in log ratio and in place
    small = area < 0.5
    assert float(area[small].mean()) == pytest.approx(0.375, abs=0.005)
    assert float(ratio[small].log().mean()) == pytest.approx(0.0, abs=0.01)
    assert float((top / (96 - height))[small].mean()) == pytest.approx(0.5, abs=0.01)


def test_an_image_that_no_box_fits_gets_the_largest_in_its_middle():
    boxes = Augment(crop=0.99).draw(50, (10, 100), seed=1, number=0).boxes
    assert boxes.unique(dim=0).tolist() == [[0.0, 43.0, 10.0, 13.0]]


def test_flips_and_shifts_are_uniform():
    draw = Augment(flip=True, shift=2).draw(10_000, (8, 8), seed=0, number=5)
    assert abs(float(draw.flips.float().mean()) - 0.5) < 0.02
    assert torch.unique(draw.boxes[:, 0], return_counts=True)[0].tolist() == [-2, -1, 0, 1, 2]
    assert torch.bincount((draw.boxes[:, 1] + 2).long()).min() > 1800
    assert bool((draw.boxes[:, 2:] == 8).all())


def test_a_draw_is_a_function_of_seed_and_number():
    augment = Augment(flip=True, crop=0.1, mixup=0.2, cutmix=1.0)
    a, b = (augment.draw(64, (32, 32), seed=2, number=9) for _ in range(2))
    assert torch.equal(a.boxes, b.boxes)
    assert a.mix == b.mix
    for seed, number in ((3, 9), (2, 10)):
        assert not torch.equal(a.boxes, augment.draw(64, (32, 32), seed=seed, number=number).boxes)


def test_nothing_is_drawn_where_nothing_is_asked_for():
    draw = Augment().draw(4, (8, 8), seed=0, number=0)
    assert (draw.boxes, draw.flips, draw.mix) == (None, None, None)
    assert Augment(size=(8, 8)).draw(4, (8, 8), seed=0, number=0).boxes is None
    assert (
        Augment(size=(4, 4)).draw(2, (8, 6), seed=0, number=0).boxes.tolist() == [[0, 0, 8, 6]] * 2
    )


def test_mixing_by_hand():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 4).clone()
    labels = torch.tensor([0, 1, 2, 2])
    mixed, targets = Mix(0.75).apply(images.clone(), labels, 3)
    torch.testing.assert_close(mixed[:, 0, 0, 0], torch.tensor([0.75, 1.25, 1.75, 2.25]))
    torch.testing.assert_close(targets[0], torch.tensor([0.75, 0, 0.25]))
    torch.testing.assert_close(targets[3], torch.tensor([0.25, 0, 0.75]))
    cut, targets = Mix(0.75, (0, 1, 1, 3)).apply(images.clone(), labels, 3)
    assert cut[0, 0].tolist() == [[0, 3, 3, 0], [0, 0, 0, 0]]
    assert cut[3, 0].tolist() == [[3, 0, 0, 3], [3, 3, 3, 3]]
    torch.testing.assert_close(targets[1], torch.tensor([0, 0.75, 0.25]))


def test_cutmix_cuts_the_share_that_it_reports():
    mixes = [Augment(cutmix=1.0).draw(2, (20, 30), seed=0, number=n).mix for n in range(500)]
    for mix in mixes:
        top, bottom, left, right = mix.region
        assert 0 <= top <= bottom <= 20
        assert 0 <= left <= right <= 30
        assert mix.share == pytest.approx(1 - (bottom - top) * (right - left) / 600)
    both = [
        Augment(cutmix=1.0, mixup=0.2).draw(2, (20, 30), seed=0, number=n).mix.region is None
        for n in range(500)
    ]
    assert 200 < sum(both) < 300


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"crop": 0.0}, "crop"),
        ({"shift": -1}, "shift"),
        ({"mixup": -0.1}, "mixup"),
        ({"size": (0, 4)}, "size"),
    ],
)
def test_bad_input_is_named(options, named):
    with pytest.raises(ValueError, match=f"{named} = "):
        Augment(**options)


def test_a_size_that_is_no_pair_is_named():
    with pytest.raises(TypeError, match=r"size must be \(height, width\) in pixels, got 224"):
        Augment(size=224)
