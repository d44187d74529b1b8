"""The cost of samples, counted and measured: samples made, denoiser forwards, FLOPs and seconds."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpfast.generate.protocol import Sampler
from dpfast.generate.sampler import GuidedSampler
from dpfast.hardware.flops import count_flops
from dpfast.parallel import Ranks
from dpfast.samples import SampleBatch

log = logging.getLogger(__name__)
SLOW = 1.05  # times the median rank's seconds a sample from which on a rank is named


@dataclass(frozen=True)
class Price:
    """The cost of one sample.

    Attributes:
        forwards: Forwards of the denoiser, two in a step with classifier-free guidance.
        flops: FLOPs of everything.
    """

    forwards: float
    flops: float

    def minus(self, part: Price) -> Price:
        """Returns the price of what is left when ``part`` of the work is not done."""
        return Price(self.forwards - part.forwards, self.flops - part.flops)


UNCOUNTED = Price(0.0, 0.0)  # of a sample whose making nobody can count: its seconds are all


@dataclass
class Cost:
    """The work that a source has spent.

    Attributes:
        samples: Samples made, kept or not.
        forwards: Forwards of the denoiser, counted.
        flops: FLOPs of everything, counted.
        seconds: Seconds, measured.
        skipped: Guided steps of single samples that went unguided, their gradient not finite.
        retries: Batches that ran out of memory and were made anew in smaller ones.
    """

    samples: int = 0
    forwards: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    retries: int = 0

    def add(self, samples: int, price: Price, seconds: float) -> None:
        """Pays for ``samples`` samples at ``price`` each, which took ``seconds`` together."""
        self.samples += samples
        self.seconds += seconds
        self.pay(samples, price)

    def take(self, batch: SampleBatch, price: Price, seconds: float) -> None:
        """Pays for a batch that was made, and notes what happened on the way."""
        self.add(len(batch), price, seconds)
        self.skipped += batch.skipped
        self.retries += batch.retries

    def pay(self, times: int, price: Price) -> None:
        """Pays ``times`` times a price for work that ends in no sample."""
        self.forwards += times * price.forwards
        self.flops += times * price.flops

    def timed(
        self, batches: Iterator[SampleBatch], price: Price = UNCOUNTED
    ) -> Iterator[SampleBatch]:
        """Gives ``batches`` on, each paid for by its price and by the time that its making took."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.take(batch, price, time.perf_counter() - started)
            yield batch

    def since(self, before: Cost) -> Cost:
        """Returns the cost that was spent after ``before``."""
        return Cost(
            **{name: value - getattr(before, name) for name, value in self.state_dict().items()}
        )

    def share(self, before: Cost, ranks: Ranks) -> None:
        """Adds up what all ranks have spent after ``before``; seconds are those of the slowest,
        which is named.
        """
        if ranks.alone:
            return
        spent = ranks.all_gather_object(self.since(before).state_dict())
        self.load_state_dict(before.state_dict())
        self.take_all(spent)
        slow = slowest(spent)
        if slow is not None and ranks.first:
            log.warning(
                "rank %d took %.0f %% longer for a sample "
                "than the median rank, and all wait for it",
                slow[0],
                100 * slow[1] - 100,
            )

    def take_all(self, spent: Sequence[Mapping[str, Any]]) -> None:
        """Adds what several ranks have spent side by side, as ``state_dict`` gives it."""
        for name, before in self.state_dict().items():
            values = [each[name] for each in spent]
            setattr(self, name, before + (max(values) if name == "seconds" else sum(values)))

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that was spent, for JSON."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what ``state_dict`` gave, in the place of what was spent so far."""
        self.__dict__.update(state)


def slowest(spent: Sequence[Mapping[str, Any]]) -> tuple[int, float] | None:
    """Returns the rank that took longest for a sample, and how many times as long as the median
    one; None within ``SLOW``.

    The median is the lower one: that of two ranks is the faster one, and not a mean with the slow
    one in it.
    """
    each = {
        rank: spend["seconds"] / spend["samples"]
        for rank, spend in enumerate(spent)
        if spend["samples"]
    }
    typical = statistics.median_low(each.values()) if each else 0.0
    rank = max(each, key=each.__getitem__, default=0)
    return (rank, each[rank] / typical) if typical and each[rank] > SLOW * typical else None


def price(sampler: GuidedSampler, make: Callable[[], object]) -> Price:
    """Calls ``make``, which makes one sample or a part of it, and counts: rows through the
    denoiser, and FLOPs by torch's formulas.

    Samples of one sampler take the same steps, so what one costs, each costs. The sampler must run
    eagerly: compiled or captured steps do the same work without telling a counter.
    """
    rows = 0

    def count(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal rows
        rows += len(arguments[0] if arguments else named["hidden_states"])

    denoiser: Any = sampler.pipeline.denoiser
    sampler.runner.check_learner()  # on images of its own, which are not of the sample
    hook = denoiser.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        counted = count_flops(make)
    finally:
        hook.remove()
    return Price(float(rows), counted)


class Prices:
    """``price``, asked for once with classifier-free guidance and once without: a round may switch
    it off.

    make: makes what is priced at a ``cfg_scale``; None: one sample, ``guided`` or not. The samples
    of a sampler of one's own are ``UNCOUNTED``.
    """

    def __init__(
        self,
        sampler: Sampler,
        make: Callable[[float], object] | None = None,
        *,
        guided: bool = True,
    ) -> None:
        self.sampler, self.make = sampler, make
        self.omega = None if guided else 0.0
        self._known: dict[bool, Price] = {}

    def at(self, cfg_scale: float) -> Price:
        """Returns the price of one sample in a round of this scale."""
        sampler = self.sampler
        if not isinstance(sampler, GuidedSampler):
            return UNCOUNTED
        if (cfg_scale != 1) not in self._known:
            one = partial(sampler.generate, [0], omega=self.omega, cfg_scale=cfg_scale)
            make = one if self.make is None else partial(self.make, cfg_scale)
            self._known[cfg_scale != 1] = price(sampler, make)
        return self._known[cfg_scale != 1]


def pruning_ratio(unguided: Tensor, entropy: float) -> float:
    """Returns the number of unguided samples that a source would make to keep one, so that the kept
    ones' mean entropy is ``entropy``.

    unguided: (n,) entropies of unguided samples under the same learner, nats. The mean of their top
    k falls with k; the ratio is n/k where it equals ``entropy``, interpolated in k. At least 1; n
    where even the single highest one is below ``entropy``, which then is a lower bound.
    """
    means = unguided.double().sort(descending=True).values.cumsum(0) / torch.arange(
        1, len(unguided) + 1
    )
    if entropy >= float(means[0]):
        return float(len(unguided))
    if entropy <= float(means[-1]):
        return 1.0
    k = int((means >= entropy).sum())  # means[k - 1] >= entropy > means[k]
    above = float(means[k - 1])
    below = float(means[k])
    return len(unguided) / (k + (above - entropy) / (above - below))
