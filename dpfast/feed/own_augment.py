"""An augmentation of the user's own: a function of a batch and of a seed for each of its images.

    def augment(images: Tensor, seeds: Tensor) -> Tensor

images: (B, C, H, W) in [-1, 1], float32 unless a loader was told otherwise, on the run's device,
behind crop, flip and RandAugment and before erasing and mixing; the function may write to them.
seeds: (B,) int64 on the CPU, a function of (the run's seed, the number of the batch, the place in
it). The result has the shape, dtype and device of the images, and is copied: the function may keep
it, and its rows may share memory.

Around the call torch's own generators are seeded with the first of the seeds and put back after it:
transforms of libraries that draw from them run as they are, and a run that goes on sees the same
images. What draws from each image's own seed sees them on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpfast.config import imported
from dpfast.errors import InputError, first_line
from dpfast.hardware.device import is_gpu

OwnAugment = Callable[[Tensor, Tensor], Tensor]


def augment_at(path: str) -> OwnAugment:
    """Returns the function at an import path. Raises ``InputError`` where there is none."""
    found = imported("augment", path)
    if not callable(found) or isinstance(found, type):
        kind = "class" if isinstance(found, type) else type(found).__name__
        raise InputError(
            f"augment = {path!r}: is a {kind}, expected a function of images (B, C, H, W) and seeds"
            " (B,)"
        )
    own: OwnAugment = found
    return own


def augmented(own: OwnAugment, images: Tensor, seeds: Tensor) -> Tensor:
    """Returns ``images`` as the function changes them.

    Raises ``InputError``, in one line, where it raises or gives anything else than images of the
    same shape, dtype and device.
    """
    expected = tuple(images.shape), images.dtype, images.device
    with torch.random.fork_rng([images.device] if is_gpu(images.device) else []):
        torch.manual_seed(int(seeds[0]))
        try:
            changed = own(images, seeds)
        except Exception as error:  # whatever a function of others raises
            raise InputError(f"augment: it fails on {expected[0]}: {first_line(error)}") from error
    if not isinstance(changed, Tensor):
        raise InputError(f"augment: gives a {type(changed).__name__}, expected images (B, C, H, W)")
    found = tuple(changed.shape), changed.dtype, changed.device
    if found != expected:
        words = (", ".join(map(str, each)) for each in (found, expected))
        raise InputError("augment: gives {}; expected {}".format(*words))
    # erasing and mixing write to it
    return changed.detach() if changed is images else changed.detach().clone()


def try_augment(own: OwnAugment, image: Sequence[int], device: torch.device) -> None:
    """Runs the function on two images (C, H, W) of noise, twice.

    Raises ``InputError`` as ``augmented`` does, for values that are not finite, and where the same
    seeds give other images.
    """
    if device.type == "meta":  # a rehearsal: nothing there has a value
        return
    drawn = torch.Generator().manual_seed(0)
    noise = torch.rand(2, *image, generator=drawn).mul(2).sub(1).to(device)
    seeds = torch.tensor([1, 2])
    first, second = (augmented(own, noise.clone(), seeds) for _ in range(2))
    if not bool(first.isfinite().all()):
        raise InputError("augment: gives values that are not finite")
    if not torch.equal(first, second):
        raise InputError(
            "augment: gives other images for the same seeds, so a run could not go on as it was; "
            "expected a function that draws from its seeds or from torch alone"
        )
