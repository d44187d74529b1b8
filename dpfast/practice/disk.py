"""The bytes that a run still has to write, against what its disk has: asked before the first sample
and before every round.

    samples       of the rounds to come: what a saved one has taken so far, before the first an
                  estimate by its kind
    scratch       what the source holds of a round while it is made (``Source.scratch``)
    mapped files  of the pool, where host and device memory do not hold it (``mapped``)
    checkpoints   as many as lie there at once (``most_checkpoints``)

The file system's own number counts: a quota beside it is not seen.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dpfast.config import Practice, Recipe
from dpfast.errors import InputError
from dpfast.files import listed
from dpfast.parallel import Ranks
from dpfast.planning.disk import most_checkpoints
from dpfast.pool import codecs, shards
from dpfast.pool.memory_tiers import readable
from dpfast.pool.placement import Placement
from dpfast.pool.pool import SamplePool
from dpfast.pool.protocol import Pool
from dpfast.practice.loop_state import LoopState
from dpfast.practice.run_paths import unbegun
from dpfast.sources.source import Source


def checkpoint_bytes(model: nn.Module) -> int:
    """Returns bytes of one checkpoint: weights, their average, two moments of AdamW for each
    parameter that is trained.
    """
    state = sum(value.numel() * value.itemsize for value in model.state_dict().values())
    trained = (value for value in model.parameters() if value.requires_grad)
    return 2 * state + 2 * sum(value.numel() * value.itemsize for value in trained)


def samples_to_come(source: Source, practice: Practice, state: LoopState, size: int) -> int:
    """Counts the most samples that a loop makes beyond the ``size`` ones of its complete rounds."""
    limits = (practice.maximum_rounds, None if source.moments is None else len(source.moments))
    most = min((limit for limit in limits if limit is not None), default=None)
    rounds = state.additions
    total = size
    if state.round < 0:
        total += source.initial_samples
    elif state.frozen:
        return 0
    while (count := source.available(total)) and (most is None or rounds < most):
        total += count
        rounds += 1
    return total - size


@dataclass(frozen=True)
class Needs:
    """Bytes that are still to be written: of ``count`` samples, of what a source holds of a round,
    of the pool's mapped files, of checkpoints.
    """

    count: int
    samples: int
    scratch: int
    mapped: int
    checkpoints: int

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        pool: Pool,
        shape: tuple[int, ...],
        count: int,
        *,
        scratch: int,
        saved: Sequence[shards.Shard],
        checkpoint: int,
        checkpoints: Path,
    ) -> Needs:
        """Returns the needs of a loop that makes ``count`` samples more, on all ranks.

        shape: (C, H, W) of what the pool stores. scratch: bytes that the source holds. saved:
        shards that are there, of one rank. checkpoint: bytes of one; checkpoints: their folder.
        """
        ranks = pool.ranks.size
        made = sum(shard.samples for shard in saved)
        each = codecs.saved_bytes(recipe.pool.codec, shape, recipe.pool.save_samples)
        if made:
            each = -(-sum(shard.bytes for shard in saved) // made)
        there = sum(path.stat().st_size for path in listed(checkpoints, "*.safetensors"))
        kept = most_checkpoints(recipe, -(-count // recipe.practice.round_samples))
        return cls(
            count=count,
            samples=count * each,
            scratch=scratch,
            mapped=ranks * _mapped(pool.local, shape, -(-count // ranks)),
            checkpoints=max(kept * checkpoint - there, 0),
        )

    @property
    def total(self) -> int:
        """The sum of all bytes."""
        return self.samples + self.scratch + self.mapped + self.checkpoints

    def refusal(self, folder: Path, when: str) -> str | None:
        """Returns the reason why ``folder`` cannot take it, in one line; None where it can."""
        free = shutil.disk_usage(folder).free
        if self.total <= free:
            return None
        anew = (
            ", or begin anew without it and with other fields, as --save-samples jpeg"
            if unbegun(folder)
            else ""
        )
        mapped = f", mapped files {readable(self.mapped)}" if self.mapped else ""
        held = f", held while a round is made {readable(self.scratch)}" if self.scratch else ""
        return (
            f"out = {str(folder)!r}: {when} needs {readable(self.total)} of disk ({self.count} "
            f"samples {readable(self.samples)}{held}{mapped}, checkpoints "
            f"{readable(self.checkpoints)}), "
            f"{readable(free)} are free; make room and go on with --resume{anew}"
        )


def check_disk(ranks: Ranks, needs: Needs | None, folder: Path, when: str) -> None:
    """Raises one ``InputError`` on all ranks where the first one, which has ``needs``, finds too
    little room.
    """
    refusal = ranks.broadcast_object(None if needs is None else needs.refusal(folder, when))
    if refusal is not None:
        raise InputError(refusal)


def _mapped(local: SamplePool, shape: tuple[int, ...], count: int) -> int:
    """Returns bytes of files that a rank's pool maps for ``count`` samples more."""
    if not local.tiers.file_bytes:
        return 0
    total = len(local) + count
    planned = Placement.of(
        total, shape, local.codec, tiers=local.tiers, chunk_bytes=local.chunk_bytes
    )
    here = local.in_tier().get("file", 0)
    return max(planned.in_tier["file"] - here, 0) * planned.bytes_per_sample
