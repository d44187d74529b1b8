"""The bytes that a run has on the disk at its end, and the seconds that saving takes."""

from __future__ import annotations

from dataclasses import dataclass

from dpfast.config import Recipe
from dpfast.planning.simulation import job_of
from dpfast.planning.stages import Stages
from dpfast.pool import codecs
from dpfast.pool.memory_tiers import readable
from dpfast.pool.placement import Placement
from dpfast.sources.prune import held_bytes

# A checkpoint of 1.37 GB was written with its checksum and fsync in 3.6 to 4.9 s (a virtual
# machine's disk, two cores: docs/records/scaling.md); a node's own drives are faster.
WRITTEN = 1.37e9 / 4.9  # bytes/s


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes of one run in its folder, of all ranks together.

    samples: saved; each: of one of them, 0 where none is saved; checkpoint: of one; kept: how many
    lie there at once, with the one that is being written; initial: of the weights that a pretrained
    learner begins with, which the folder keeps; files: of the pool's mapped part, until
    the run ends; held: of the source "prune" while it makes its largest round, of all hosts' memory
    where no sample is saved. checkpoints: how many are written; seconds: that writing one takes;
    share: of the run's seconds that all of them take, beside the loop.
    """

    samples: float
    each: int
    images: str
    checkpoint: int
    kept: int
    initial: int
    files: float
    held: int
    checkpoints: int
    seconds: float
    share: float

    @property
    def total(self) -> float:
        held = self.held if self.each else 0
        return self.samples + self.kept * self.checkpoint + self.initial + self.files + held

    def lines(self) -> list[str]:
        """Returns sentences for a reader: bytes by kind, what checkpoints take of the time, and
        where candidates are held.
        """
        samples = (
            f"samples {readable(self.samples)} ({self.each} bytes each, {self.images})"
            if self.each
            else "no sample"
        )
        initial = f", pretrained weights {readable(self.initial)}" if self.initial else ""
        mapped = f", mapped files of the pool {readable(self.files)}" if self.files else ""
        return [
            f"disk: {readable(self.total)} a run: {samples}, "
            f"checkpoints {readable(self.kept * self.checkpoint)} ({self.kept} of "
            f"{readable(self.checkpoint)}){initial}{mapped}",
            f"  {self.checkpoints} checkpoints are written beside the loop, "
            f"{self.seconds:.2g} s each: {self.share:.2%} of the seconds",
            *([self._held()] if self.held else []),
        ]

    def _held(self) -> str:
        where = "on the disk" if self.each else "in the memory of all hosts"
        return f"  prune holds {readable(self.held)} {where} while a round is made"


def most_checkpoints(recipe: Recipe, rounds: int) -> int:
    """Counts the checkpoints of a source that lie on the disk at once, ``rounds`` rounds later;
    none without saved samples.

    The newest ones, the last one before the cool-down, the one that is being written, and with
    ``keep_rounds`` one of every round.
    """
    practice = recipe.practice
    if recipe.pool.save_samples == "none":
        return 0
    return practice.checkpoints_kept + 2 + (rounds if practice.keep_rounds else 0)


def plan_disk(
    recipe: Recipe, pool: Placement, stages: Stages, samples: int, seconds: float, training: float
) -> Disk:
    """Plans the disk of one source that ends with ``samples`` after ``seconds``, of which
    ``training`` go by between additions.

    A checkpoint comes at the first evaluation after which saving is at most ``checkpoint_share`` of
    the seconds, after ``checkpoint_minutes`` at the latest, before and after every round, and at
    the end.
    """
    practice, config, learner = recipe.practice, recipe.pool, stages.learner
    each = codecs.saved_bytes(config.codec, pool.shape, config.save_samples)
    took = learner.state / WRITTEN
    rounds = len(job_of(recipe, samples).rounds)
    evaluations = practice.iterations / practice.interval(recipe.learner.batch_size)
    between = max(took / practice.checkpoint_share, training / evaluations)
    between = min(between, 60 * practice.checkpoint_minutes or training / evaluations)
    kept = most_checkpoints(recipe, rounds)
    written = int(training / between) + 2 * (rounds + 1) + 1 if kept else 0
    return Disk(
        samples=float(samples * each),
        each=each,
        images=config.save_samples if config.codec == "pixels" else config.codec,
        checkpoint=learner.state,
        kept=kept,
        initial=4 * (learner.parameters + learner.buffers) if recipe.learner.pretrained else 0,
        held=_held(recipe, stages, samples),
        files=float(pool.devices * pool.in_tier["file"] * pool.bytes_per_sample),
        checkpoints=written,
        seconds=took,
        share=written * took / seconds if seconds else 0.0,
    )


def _held(recipe: Recipe, stages: Stages, samples: int) -> int:
    practice = recipe.practice
    if "prune" not in practice.sources:
        return 0
    largest = min(practice.round_samples, samples - practice.initial_samples)
    latents = stages.latent if recipe.pool.codec == "latents" else None
    return largest * held_bytes(stages.image, latents)
