"""The memory that a device holds in each phase of a run: the sum of everything that lives at the
same time.

The pool's part, the generator's weights and the learner's state are there all the time. Beside them
there are the batches and captured graphs of a sampler while samples are made, and what the backward
pass needs while the learner trains; each phase gives back what the next one does not need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dpfast.hardware.peaks import Peaks
from dpfast.planning.stages import Stages

# Counted are the tensors that live at one moment. On a GPU there is more: the allocator's reserve
# (blocks that are free and too small for what comes next) and the workspaces of convolutions. What
# it had reserved at most over what is counted, beside the weights, on one H200
# (benchmarks/results/models.jsonl): 37.6 GB for 16 guided samples of Stable Diffusion 1.5 at 512 px
# and 19.6 GB for 32 of DiT-XL/2, eager. Captured graphs keep a pool of their own: 21.0 GB with them
# for DiT-XL/2, not measured for Stable Diffusion.
RESERVED = {"unet": 1.85, "transformer": 1.90}
GRAPHS = 1.08
TRAINING_RESERVED = 1.1  # the same of a training step and of evaluation: stated
# of a GPU's memory; the rest is for its context, NCCL's buffers and others' processes: stated
USABLE = 0.9
# batches of images that a loader has on the device: the one in work and those that are prepared
AHEAD = 3


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one device in a phase, by kind."""

    phase: str
    kinds: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


def usable(device: Peaks) -> float:
    """Returns bytes of a device that a run may plan with."""
    return device.memory * (USABLE if device.gpu else 1.0)


def sampling_bytes(stages: Stages, device: Peaks, batch: int, *, guided: bool) -> float:
    """Returns bytes of a batch of samples and the graphs captured for it, beside the weights."""
    fixed, each = stages.guided_bytes if guided else stages.unguided_bytes
    reserve = (
        RESERVED["transformer" if stages.transformer else "unet"] * GRAPHS if device.gpu else 1.0
    )
    return (fixed + each * batch) * reserve


def training_bytes(
    stages: Stages, device: Peaks, *, share: int, micro_batch: int, ranks: int
) -> float:
    """Returns bytes of a training step of ``share`` images in micro-batches, with the loader's
    batches, beside weights and state.
    """
    held = stages.learner.memory(
        min(micro_batch, share), accumulated=micro_batch < share or ranks > 1
    )
    batches = AHEAD * share * 4 * math.prod(stages.image)
    return held * (TRAINING_RESERVED if device.gpu else 1.0) + batches


def evaluation_bytes(stages: Stages, device: Peaks, batch: int) -> float:
    """Returns bytes of a batch of images that is evaluated, beside weights and state."""
    fixed, each = stages.learner.evaluation_held
    return (fixed + each * batch) * (TRAINING_RESERVED if device.gpu else 1.0)


def footprints(
    stages: Stages,
    device: Peaks,
    *,
    pool: float,
    batch: int,
    share: int,
    micro_batch: int,
    evaluated: int,
    ranks: int,
    generates: bool = True,
    guided: bool,
) -> tuple[Footprint, ...]:
    """Returns the footprint of every phase of a run.

    pool: bytes of the samples on this device; batch: samples that a sampler makes at once; share:
    images of a training step on this device; evaluated: images of a batch; ranks: that train;
    generates, guided: whether samples are made, and whether there are guided ones.
    """
    learner = stages.learner
    always = {
        "pool": pool,
        "generator": float(stages.weights),
        "learner, average and moments": float(learner.state),
    }
    made = {"unguided samples": False} if generates else {}
    made |= {"guided samples": True} if guided else {}
    training = training_bytes(stages, device, share=share, micro_batch=micro_batch, ranks=ranks)
    judged = evaluation_bytes(stages, device, evaluated)
    return (
        *(
            Footprint(
                phase=name,
                kinds=always
                | {"batch and graphs": sampling_bytes(stages, device, batch, guided=which)},
            )
            for name, which in made.items()
        ),
        Footprint(
            phase="training", kinds=always | {"activations, gradients and batches": training}
        ),
        Footprint(
            phase="evaluation",
            kinds=always | {"gradients": float(learner.gradients), "activations": judged},
        ),
    )
