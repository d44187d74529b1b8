"""A trial of the learner before a sample is made: does it train, and can it be saved?

A learner is anybody's code. One that guides and predicts may still return auxiliary logits in
training, fail on a batch of one, or keep what no file of weights takes; without a trial a run finds
that out behind its initial samples, or at its end.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor, nn

from dpfast.config import Learner
from dpfast.errors import InputError, first_line
from dpfast.hardware.device import is_gpu
from dpfast.hardware.out_of_memory import release
from dpfast.learn.models import NewLearner, check_tensors, overlaps
from dpfast.learn.precision import autocast
from dpfast.learn.trainer import Trainer, even_part
from dpfast.practice.checkpoint import DTYPES, file_pieces

ROWS = 2  # images of a trial: the fewest among which a batch norm finds a variance
STEPS = 100  # of which a trial takes the first, at the learning rate of a warm-up
CLOSE = 1e-3  # of two predictions by the same weights; a GPU need not give the same bits


def trial_rows(config: Learner, ranks: int) -> int:
    """Returns the number of images of a trial: ``ROWS``, or fewer where a micro-batch of the run
    has fewer.
    """
    share = config.batch_size // ranks
    size = even_part(share, config.micro_batch)
    return min(ROWS, share % size or size)


@dataclass(frozen=True, kw_only=True)
class LearnerTrial:
    """Builds a learner, trains it by one step, saves and loads it, and asks it for predictions.

    All of it happens to copies, and the states of random generators are put back. It takes the
    device's memory of a training step of ``rows`` images, and the host's of two checkpoints.

    what: how errors call the learner; kind: their class. config: of the training. image: (C, H, W)
    of what the learner is shown; classes: K of its logits (B, K). device: where it is.
    """

    what: str
    kind: type[InputError]
    config: Learner
    image: Sequence[int]
    classes: int
    device: torch.device
    rows: int

    def run(self, new_learner: NewLearner) -> None:
        """Raises ``kind``, in one line, for a learner that fails, and for one that its saved state
        does not bring back.
        """
        if self.device.type == "meta":  # a rehearsal: nothing there has a value
            return
        with _undisturbed(self.device):
            with self._refusing("it cannot be built"):
                given = new_learner()
            self._check_tensors(given)
            learnt = [weakref.ref(weights) for weights in _learnt(given)]
            with self._refusing("it cannot be copied"):
                model = copy.deepcopy(given)
            del given
            saved, before = self._trained(model)
            del model
            self._release()
            with self._refusing("it cannot be built again"):
                fresh = new_learner()
            if {id(weights) for weights in _learnt(fresh)} & {id(ref()) for ref in learnt}:
                raise self._error("two of them share weights; expected that each is built anew")
            after = self._loaded(fresh, saved)
            if not all(map(_close, before, after)):
                raise self._error(
                    "it predicts otherwise once its weights are saved and loaded; expected that "
                    "all that training changes is a parameter or a buffer"
                )
        self._release()

    def _check_tensors(self, model: nn.Module) -> None:
        """Refuses tensors that cannot be trained, averaged or saved."""
        if not _learnt(model):
            raise self._error("expected a module with parameters that can be trained")
        check_tensors(self.what, model)
        with self._refusing("it has no state_dict"):
            state = model.state_dict()
        for name, kept in state.items():
            if not isinstance(kept, Tensor):
                raise self._error(
                    f"{name} is a {type(kept).__name__}, and a file of weights takes tensors "
                    "alone; expected a tensor of get_extra_state"
                )
            if kept.dtype not in DTYPES:
                raise self._error(f"{name} is of {kept.dtype}, which no file of weights takes")

    def _trained(self, model: nn.Module) -> tuple[bytes, list[Tensor]]:
        """Trains ``model`` by a step; returns what a checkpoint would hold of it, as a file, and
        its predictions.
        """
        shared = [(*pair, pair[1][1].clone()) for pair in overlaps([*model.named_buffers()])]
        with self._refusing(f"in training it fails on images of shape {self._shape}"):
            trainer = Trainer(model, replace(self.config, compile=False), iterations=STEPS)
            images = self._images()
            with autocast(trainer.bf16, self.device):
                logits = trainer.model(images)
        self._check_logits(logits, "in training ")
        with self._refusing(f"in training it fails on images of shape {self._shape}"):
            labels = torch.arange(self.rows, device=self.device) % self.classes
            loss = float(trainer.step(images, labels))
        if not math.isfinite(loss):
            raise self._error(f"its loss is {loss} at the first step, expected a finite number")
        for (one, _), (other, value), old in shared:
            if not torch.equal(value, old):
                raise self._error(
                    f"{one} and {other} share memory, and training changes it; expected memory of "
                    "their own"
                )
        with self._refusing("it cannot be saved"):
            saved = b"".join(file_pieces(trainer.state_dict()))
        return saved, self._predictions(trainer)

    def _loaded(self, fresh: nn.Module, saved: bytes) -> list[Tensor]:
        """Loads what ``_trained`` has saved, and returns the predictions again."""
        with self._refusing("it cannot be loaded after it was saved"):
            trainer = Trainer(fresh, replace(self.config, compile=False), iterations=STEPS)
            trainer.load_state_dict(load(saved))
        return self._predictions(trainer)

    def _predictions(self, trainer: Trainer) -> list[Tensor]:
        """Returns the logits of both weights for the same images, as they are evaluated and
        guide.
        """
        found = []
        images = self._images()
        for which in ("ema", "raw"):
            with (
                self._refusing(f"it fails on images of shape {self._shape}"),
                autocast(trainer.bf16, self.device),
                torch.no_grad(),
            ):
                logits = trainer.weights(which).eval()(images.clone())
            self._check_logits(logits)
            found.append(logits.float().cpu())
        return found

    def _check_logits(self, logits: object, when: str = "") -> None:
        images = f"for {self.rows} images" if self.rows > 1 else "for an image"
        expected = f"expected ({self.rows}, {self.classes})"
        if not isinstance(logits, Tensor):
            raise self._error(
                f"{when}it gives a {type(logits).__name__}; expected logits of shape (B, K), "
                "without those of auxiliary heads; of an output of transformers that is its .logits"
            )
        if tuple(logits.shape) != (self.rows, self.classes):
            raise self._error(f"{when}its logits are {tuple(logits.shape)} {images}, {expected}")
        if not bool(logits.isfinite().all()):
            raise self._error(f"{when}its logits are not finite {images} of noise")

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.rows, *self.image)

    def _images(self) -> Tensor:
        """Returns noise in the form of a batch: (rows, C, H, W) float32 in [-1, 1], channels
        last.
        """
        drawn = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, self._shape, generator=drawn, dtype=torch.uint8)
        images = pixels.to(self.device).float().div(127.5).sub(1.0)
        return images.contiguous(memory_format=torch.channels_last)

    def _release(self) -> None:
        if is_gpu(self.device):
            release(self.device)

    def _error(self, why: str) -> InputError:
        return self.kind(f"{self.what}: {why}")

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """Turns what the learner's code raises into an error that says ``what`` it could not do."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            raise self._error(f"{what}: {first_line(error)}") from error


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Puts the states of the random generators back that a learner may draw from."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if is_gpu(device) else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _learnt(model: nn.Module) -> list[nn.Parameter]:
    return [weights for weights in model.parameters() if weights.requires_grad]


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=CLOSE, atol=CLOSE)
