"""The changes of a batch by chance, drawn in one place for every loader.

A draw is a function of (seed, number of the batch): Philox with that key. Loaders only carry it
out, so that all of them show the learner the same crops in the same order, and a position restores
them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast.config import Learner
from dpfast.errors import InputError
from dpfast.feed.own_augment import OwnAugment, augment_at, augmented
from dpfast.feed.rand_augment import MAGNITUDES, OPERATIONS, rand_augment
from dpfast.ops import check
from dpfast.pool.batch import BatchFormat

TRIES = 10  # boxes drawn for one crop until one lies inside its image, as in torchvision
MOST_SHIFT = 1 << 16  # pixels, more than any image has
RATIOS = (3 / 4, 4 / 3)  # of a box's width and height
ERASED = (0.02, 1 / 3)  # shares of an image's area, as of torchvision and of Zhong et al. 2020
ERASED_RATIOS = (0.3, 3.3)


@dataclass(frozen=True)
class Mix:
    """One mixture for a whole batch: sample i takes ``share`` of itself and the rest of sample B -
    1 - i.

    region: (top, bottom, left, right) in pixels that the other sample fills (cutmix), or None where
    pixels are averaged (mixup).
    """

    share: float
    region: tuple[int, int, int, int] | None = None

    def apply(self, images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Mixes floating images (B, C, H, W) in place; int64 labels (B,) become (B, classes)
        float32 probabilities.

        Raises ``InputError`` for a label that is not below ``classes``; on a GPU, which nobody
        waits for, the device asserts.
        """
        if labels.device.type == "cpu" and int(labels.max()) >= classes:
            raise InputError(f"classes = {classes}: the batch has the label {int(labels.max())}")
        if self.region is None:
            images.mul_(self.share).add_(images.flip(0), alpha=(1 - self.share) / self.share)
        else:
            top, bottom, left, right = self.region
            images[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
        targets = F.one_hot(labels, classes).float()
        return images, targets.lerp(targets.flip(0), 1 - self.share)


@dataclass(frozen=True)
class Crops:
    """The chances of a batch's boxes, which are the same whatever sizes its images have.

    areas: (B, TRIES) shares of an image's area; ratios: (B, TRIES) of width and height; places:
    (B, 2) in [0, 1) of what a box leaves free; shifts: (B, 2) pixels.
    """

    areas: np.ndarray | None = None
    ratios: np.ndarray | None = None
    places: np.ndarray | None = None
    shifts: np.ndarray | None = None

    def part(self, rows: np.ndarray) -> Crops:
        """Returns the chances of the samples in ``rows`` of the batch."""
        parts = (self.areas, self.ratios, self.places, self.shifts)
        return Crops(*(None if part is None else part[rows] for part in parts))

    def boxes(self, sizes: np.ndarray) -> Tensor:
        """Returns (B, 4) float32 of (top, left, height, width) in images of (B, 2) heights and
        widths.
        """
        boxes = np.zeros((len(sizes), 4))
        boxes[:, 2:] = sizes
        if self.areas is not None:
            self._place(boxes)
        if self.shifts is not None:
            boxes[:, :2] += self.shifts
        return torch.from_numpy(boxes.astype(np.float32))

    def _place(self, boxes: np.ndarray) -> None:
        """Turns boxes that are whole images into those of a random share of the area and a random
        ratio, at a random place, in whole pixels.
        """
        assert self.areas is not None
        assert self.ratios is not None
        assert self.places is not None
        height, width = boxes[:, 2:3].copy(), boxes[:, 3:].copy()
        area = self.areas * height * width
        heights = np.round(np.sqrt(area / self.ratios))
        widths = np.round(np.sqrt(area * self.ratios))
        fits = (heights <= height) & (widths <= width) & (heights > 0) & (widths > 0)
        chosen = np.arange(len(fits)), fits.argmax(1)
        boxes[:, 2], boxes[:, 3] = heights[chosen], widths[chosen]
        free = np.concatenate([height, width], 1) - boxes[:, 2:]
        boxes[:, :2] = np.floor(self.places * (free + 1))
        none = ~fits.any(1)
        if none.any():  # the largest box in the middle whose ratio is allowed
            height, width = height[none, 0], width[none, 0]
            tallest = np.minimum(height, np.round(width / RATIOS[0]))
            widest = np.minimum(width, np.round(height * RATIOS[1]))
            middle = (height - tallest) // 2, (width - widest) // 2
            boxes[none] = np.stack([*middle, tallest, widest], 1)


@dataclass(frozen=True)
class AugmentationDraw:
    """The chances of one batch, on the CPU; None for none.

    boxes: (B, 4) float32 of (top, left, height, width) in pixels, in images of the size that was
    drawn for; flips: (B,) bool; crops: what the boxes were made of; operations, signs: (B, n)
    int64 of RandAugment; erased: (B, 4) int64 (top, bottom, left, right) in pixels of the batch,
    empty where nothing is erased; seeds: (B,) int64 of the user's own augmentation.
    """

    boxes: Tensor | None
    flips: Tensor | None
    mix: Mix | None
    crops: Crops | None = None
    operations: Tensor | None = None
    signs: Tensor | None = None
    erased: Tensor | None = None
    seeds: Tensor | None = None

    def part(self, rows: Tensor) -> AugmentationDraw:
        """Returns the chances of the samples in ``rows`` (b,) of the batch."""
        crops = None if self.crops is None else self.crops.part(rows.numpy())

        def of(each: Tensor | None) -> Tensor | None:
            return None if each is None else each[rows]

        return AugmentationDraw(
            of(self.boxes),
            of(self.flips),
            self.mix,
            crops,
            of(self.operations),
            of(self.signs),
            of(self.erased),
            of(self.seeds),
        )

    def boxes_in(self, sizes: Tensor) -> Tensor:
        """Returns ``boxes`` in images of these (B, 2) int64 heights and widths, by the same
        chances; all of an image where nothing is cropped.
        """
        return (self.crops or Crops()).boxes(sizes.numpy())


@dataclass(frozen=True, kw_only=True)
class Augment:
    """The augmentations that a loader applies; by default none.

    Args:
        flip: True mirrors half of the samples left to right.
        shift: Most pixels by which a sample moves each way; the border is repeated.
        crop: Smallest share of the area that a random resized crop keeps (Szegedy et al. 2015:
            0.08); 1: none.
        size: (height, width) of a batch; None: that of the pool's images.
        rand_augment: Number of RandAugment's operations that change an image
            (``dpfast.feed.rand_augment``); 0: none.
        magnitude: Magnitude of RandAugment's operations, 0 to 30.
        own: An augmentation of the user's own (``dpfast.feed.own_augment``).
        erase: Share of the samples of which a box is erased: 0, the middle of the scale; 2 to 33 %
            of the area (Zhong et al. 2020).
        repeats: Times that a sample is in a batch, each with other chances (Hoffer et al. 2020);
            must divide the batch size.
        mixup: Alpha of mixup's Beta distribution (Zhang et al. 2018); 0: none.
        cutmix: Alpha of CutMix's Beta distribution (Yun et al. 2019); 0: none. With both, a batch
            gets one of the two, each half of the time.

    Raises:
        InputError: For an argument out of range, which the message names.
        TypeError: For an argument of another type, and a size that is no pair of integers.

    Examples:
        >>> import dpfast
        >>> dpfast.Augment(flip=True, mixup=0.2).mixes
        True
    """

    flip: bool = False
    shift: int = 0
    crop: float = 1.0
    size: tuple[int, int] | None = None
    rand_augment: int = 0
    magnitude: float = 9.0
    own: OwnAugment | None = None
    erase: float = 0.0
    repeats: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0

    @classmethod
    def of(cls, learner: Learner) -> Augment:
        """Returns the augmentations of a recipe's learner.

        Raises:
            InputError: For an import path that leads nowhere.
        """
        own = learner.augment
        return cls(
            flip=learner.flip,
            shift=learner.shift,
            crop=learner.crop,
            rand_augment=learner.rand_augment,
            magnitude=learner.rand_magnitude,
            own=None if own is None else augment_at(own),
            erase=learner.erase,
            repeats=learner.aug_repeats,
            mixup=learner.mixup,
            cutmix=learner.cutmix,
        )

    def __post_init__(self) -> None:
        if not isinstance(self.flip, bool):
            raise TypeError(f"flip must be True or False, got {self.flip!r}")
        check.whole("shift", self.shift, "at least 0 pixels", low=0)
        if self.shift > MOST_SHIFT:
            raise InputError(f"shift = {self.shift}: expected at most {MOST_SHIFT} pixels")
        check.number("crop", self.crop)
        if not 0 < self.crop <= 1:
            raise InputError(f"crop = {self.crop}, expected a share of the area in (0, 1]")
        check.whole("rand_augment", self.rand_augment, "at least 0 operations", low=0)
        check.whole("repeats", self.repeats, "at least 1")
        for name, high in (("magnitude", MAGNITUDES), ("erase", 1.0)):
            value = getattr(self, name)
            check.number(name, value)
            if not 0 <= value <= high:
                raise InputError(f"{name} = {value}, expected 0 to {high:g}")
        if not (self.own is None or callable(self.own)):
            raise TypeError(f"own must be a function of images and seeds, got {self.own!r}")
        if self.size is not None and not (
            isinstance(self.size, (tuple, list))
            and len(self.size) == 2
            and all(isinstance(s, Integral) and not isinstance(s, bool) for s in self.size)
        ):
            raise TypeError(f"size must be (height, width) in pixels, got {self.size!r}")
        if self.size is not None and min(self.size) < 1:
            raise InputError(f"size = {self.size}, expected at least one pixel each way")
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            check.number(name, alpha)
            if alpha < 0:
                raise InputError(f"{name} = {alpha}, expected an alpha of at least 0")

    @property
    def mixes(self) -> bool:
        """True if the samples of a batch are mixed, so that labels become probabilities."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def changes(self) -> bool:
        """True if images change after they were gathered, each by itself."""
        return self.rand_augment > 0 or self.erase > 0 or self.own is not None

    def resamples(self, image: tuple[int, int] | None) -> bool:
        """Returns True if a batch of images of (height, width) needs boxes.

        Args:
            image: (height, width) of the pool's images; None: of any sizes.
        """
        return self.shift > 0 or self.crop < 1 or self.size not in (None, image)

    def draw(
        self, batch: int, image: tuple[int, int], *, seed: int, number: int
    ) -> AugmentationDraw:
        """Returns the chances of batch ``number``.

        Args:
            batch: Images in the batch.
            image: (height, width) of the pool's images.
            seed: Key of all chances.
            number: Number of the batch, from 0.
        """
        if not (self.flip or self.mixes or self.changes or self.resamples(image)):
            # a generator takes longer to make than a small batch
            return AugmentationDraw(None, None, None)
        random = np.random.Generator(np.random.Philox(key=(seed << 64) + number))
        flips = torch.from_numpy(random.random(batch) < 0.5) if self.flip else None
        crops = self._crops(random, batch) if self.resamples(image) else None
        boxes = None if crops is None else crops.boxes(np.tile(image, (batch, 1)))
        size = self.size or image
        mix = self._mix(random, size)
        return AugmentationDraw(boxes, flips, mix, crops, **self._changes(random, batch, size))

    def _changes(
        self, random: np.random.Generator, batch: int, size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Returns the chances of what happens to images of (height, width) after they were
        gathered.
        """
        found: dict[str, np.ndarray] = {}
        if self.rand_augment:
            shape = (batch, self.rand_augment)
            found["operations"] = random.integers(len(OPERATIONS), size=shape)
            found["signs"] = 1 - 2 * random.integers(2, size=shape)
        if self.erase:
            found["erased"] = _erased(random, batch, size, self.erase)
        if self.own is not None:
            found["seeds"] = random.integers(1 << 62, size=batch)
        return {name: torch.from_numpy(values) for name, values in found.items()}

    def change(self, images: Tensor, draw: AugmentationDraw, form: BatchFormat) -> Tensor:
        """Changes each image of a batch by itself: RandAugment, the user's own, erasing.

        Args:
            images: (B, C, H, W) in ``form``; they may be changed in place.
            draw: Chances of the batch.
            form: Scale, dtype and memory layout of the batch.

        Returns:
            (B, C, H, W) in ``form``.
        """
        if draw.operations is not None:
            assert draw.signs is not None
            mean, std = (
                torch.tensor(each, device=images.device).view(1, -1, 1, 1)
                for each in form.per_channel(images.shape[1])
            )
            bytes_ = images.float().mul(std).add_(mean).mul_(255).round_().clamp_(0, 255)
            values = rand_augment(bytes_, draw.operations, draw.signs, self.magnitude)
            images.copy_(values.div_(255).sub_(mean).div_(std))
        if self.own is not None:
            assert draw.seeds is not None
            images = augmented(self.own, images, draw.seeds)
        if draw.erased is not None:
            images.masked_fill_(_inside(draw.erased.to(images.device), images.shape[2:]), 0.0)
        return images

    def _crops(self, random: np.random.Generator, batch: int) -> Crops:
        areas = ratios = places = shifts = None
        if self.crop < 1:
            areas = random.uniform(self.crop, 1, (batch, TRIES))
            low, high = (math.log(ratio) for ratio in RATIOS)
            ratios = np.exp(random.uniform(low, high, (batch, TRIES)))
            places = random.random((2, batch)).T
        if self.shift:
            shifts = random.integers(-self.shift, self.shift + 1, (batch, 2))
        return Crops(areas, ratios, places, shifts)

    def _mix(self, random: np.random.Generator, size: tuple[int, int]) -> Mix | None:
        if not self.mixes:
            return None
        if not self.cutmix or (self.mixup and random.random() < 0.5):
            share = float(random.beta(self.mixup, self.mixup))
            # the pairs are symmetric: the larger share names the sample
            return Mix(max(share, 1 - share))
        height, width = size
        side = math.sqrt(1 - random.beta(self.cutmix, self.cutmix))
        top, bottom = _cut(int(random.integers(height)), side * height, height)
        left, right = _cut(int(random.integers(width)), side * width, width)
        share = 1 - (bottom - top) * (right - left) / (height * width)
        return Mix(share, (top, bottom, left, right))


def _erased(
    random: np.random.Generator, batch: int, size: tuple[int, int], share: float
) -> np.ndarray:
    """Returns (B, 4) boxes of (top, bottom, left, right) in images of (height, width), for a share
    of them: the first of ``TRIES`` that fits; zeros for the others.
    """
    height, width = size
    chosen = random.random(batch) < share
    low, high = (math.log(ratio) for ratio in ERASED_RATIOS)
    areas = random.uniform(*ERASED, (batch, TRIES)) * height * width
    ratios = np.exp(random.uniform(low, high, (batch, TRIES)))
    places = random.random((2, batch))
    heights = np.round(np.sqrt(areas * ratios)).astype(np.int64)
    widths = np.round(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (heights < height) & (widths < width)
    first = np.arange(batch), fits.argmax(1)
    tall, wide = (each[first] * (chosen & fits.any(1)) for each in (heights, widths))
    top = np.floor(places[0] * (height - tall + 1)).astype(np.int64)
    left = np.floor(places[1] * (width - wide + 1)).astype(np.int64)
    return np.stack([top, top + tall, left, left + wide], 1)


def _inside(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Returns (B, 1, H, W) bool, True within boxes of (top, bottom, left, right)."""
    rows, columns = (torch.arange(each, device=boxes.device) for each in size)
    top, bottom, left, right = boxes[:, :, None].unbind(1)
    down = (rows >= top) & (rows < bottom)
    across = (columns >= left) & (columns < right)
    return (down[:, :, None] & across[:, None, :])[:, None]


def _cut(centre: int, length: float, limit: int) -> tuple[int, int]:
    """Returns the ends of a stretch of [0, limit), cut at its ends."""
    first = round(centre - length / 2)
    last = round(centre + length / 2)
    return min(max(first, 0), limit), min(max(last, 0), limit)
