"""The order of the training samples: passes over the pool, each a keyed permutation of it.

No list of indices exists anywhere: the sample at place p of a pass over n samples is a function of
(seed, epoch, p, n), ``dpfast.ops.permutation``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpfast.errors import InputError
from dpfast.ops import check
from dpfast.ops.permutation import permutation

STREAM = 0x6F726472  # of the keys; the noise of samples uses small stream numbers
FRESH_STREAM = STREAM + 1  # of the passes over the newest samples alone
SHARE_BITS = 32  # of the fixed-point share of the newest samples


class Order:
    """Shuffled passes over a pool that grows: (seed, epoch, position) -> indices. The state is four
    integers.

    A pass covers every sample once. When the pool has grown, a new pass over all of it begins, so
    that a new sample can be in the very next batch and the choice stays uniform over the current
    pool, as in the paper.

    fresh_weight: how much more often than another sample one of the newest is drawn (``fresh`` of
    ``next``). 1 is the paper's uniform choice. Otherwise every batch mixes a pass over the newest
    with a pass over the rest, in the fixed proportion that the weight gives.

    repeats: so many times each sample of a batch is in it, one behind the other; a pass takes so
    many times as long.

    Raises ``TypeError`` for a seed, a batch size or repeats that are no integers and a weight that
    is no number, ``InputError`` for a seed outside [0, 2^64), a batch size below 1, a weight that
    is not finite and above 0, and repeats that do not divide the batch size.
    """

    def __init__(
        self, seed: int, batch_size: int, *, fresh_weight: float = 1.0, repeats: int = 1
    ) -> None:
        check.whole("seed", seed, "0 to 2^64 - 1", low=0)
        if seed >= 1 << 64:
            raise InputError(f"seed = {seed}: expected 0 to 2^64 - 1")
        check.whole("batch_size", batch_size, "at least 1")
        check.number("fresh_weight", fresh_weight)
        if fresh_weight <= 0:
            raise InputError(f"fresh_weight = {fresh_weight}, expected a number above 0")
        check.whole("repeats", repeats, "at least 1")
        if batch_size % repeats:
            raise InputError(
                f"repeats = {repeats}: expected a divisor of the batch size, {batch_size}"
            )
        self.seed = seed
        self.batch_size = int(batch_size)
        self.repeats = repeats
        self.fresh_weight = fresh_weight
        self.epoch = self.position = self.size = self.fresh = 0

    def next(
        self, size: int, fresh: int = 0, *, batches: int = 1, share: float | None = None
    ) -> Tensor:
        """Returns (batches * batch_size,) int64 indices into a pool of ``size`` samples, the last
        ``fresh`` of them the newest.

        The same as of so many calls for one batch. Where a pass ends, a batch goes on with the
        next. share: of the last ``fresh`` in every batch, in place of ``fresh_weight``; the same
        one for a pool of the same size. Raises ``InputError`` for an empty pool and for ``fresh``
        outside [0, size].
        """
        if size < 1:
            raise InputError("the pool is empty: expected a sample before the first batch")
        if not 0 <= fresh <= size:
            raise InputError(f"fresh = {fresh}, expected 0 to {size}, the pool's samples")
        weighted = (self.fresh_weight != 1 or share is not None) and 0 < fresh < size
        fresh = fresh if weighted else 0
        if (size, fresh) != (self.size, self.fresh):
            # Passes of different sizes never share an epoch, so a key is used for one permutation
            # only.
            self.epoch += -(
                -self.position // max(min(self.fresh, self.size - self.fresh) or self.size, 1)
            )
            self.position = 0
            self.size = size
            self.fresh = fresh
        first = self.position
        count = batches * self.batch_size // self.repeats
        self.position += count
        if not weighted:
            drawn = self._passes(first, count, size, STREAM)
        else:
            if share is None:
                share = self.fresh_weight * fresh / (self.fresh_weight * fresh + size - fresh)
            drawn = self._mixed(first, count, round((1 << SHARE_BITS) * share))
        return drawn if self.repeats == 1 else drawn.repeat_interleave(self.repeats)

    def _passes(self, first: int, count: int, size: int, stream: int) -> Tensor:
        """Returns the draws ``first`` to ``first + count`` of endless passes over ``size``
        samples.
        """
        parts = []
        while count:
            epoch, place = divmod(first, size)
            part = min(count, size - place)
            parts.append(
                permutation(
                    place, part, size, seed=self.seed, epoch=self.epoch + epoch, stream=stream
                ),
            )
            first = first + part
            count = count - part
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _mixed(self, first: int, count: int, share: int) -> Tensor:
        """Returns the draws ``first`` to ``first + count``, t of them one of the newest where
        floor(t * share) steps up. share: of 2^SHARE_BITS.
        """
        old = self.size - self.fresh
        drawn = [t * share >> SHARE_BITS for t in range(first, first + count + 1)]
        newest = torch.tensor(drawn[1:]) > torch.tensor(drawn[:-1])
        news = drawn[-1] - drawn[0]
        batch = torch.empty(count, dtype=torch.int64)
        batch[newest] = (
            old + self._passes(drawn[0], news, self.fresh, FRESH_STREAM) if news else batch[newest]
        )
        if news < count:
            batch[~newest] = self._passes(first - drawn[0], count - news, old, STREAM)
        return batch

    def state_dict(self, *, before: int = 0) -> dict[str, int]:
        """Returns the position, or that of ``before`` batches earlier in the same call of
        ``next``.
        """
        position = self.position - before * self.batch_size // self.repeats
        return {"epoch": self.epoch, "position": position, "size": self.size, "fresh": self.fresh}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from a position."""
        self.epoch = state["epoch"]
        self.position = state["position"]
        self.size = state["size"]
        self.fresh = state["fresh"]
