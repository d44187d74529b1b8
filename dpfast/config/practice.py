"""The section ``[practice]`` of a recipe: the loop of Algorithm 1 and its rivals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from dpfast.config.imported import FORM
from dpfast.config.kinds import ImportPath
from dpfast.config.option import option
from dpfast.config.section import Section, require

SourceName = Literal["dp", "static", "prune", "dynamic", "mix", "real", "pool"]
SOURCES: tuple[SourceName, ...] = get_args(SourceName)  # in the order in which they run
AT_ONCE: tuple[SourceName, ...] = ("static", "real", "pool")  # those that add no round
READ: tuple[SourceName, ...] = ("real", "pool")  # those that make nothing


@dataclass(frozen=True, kw_only=True)
class Practice(Section, name="practice"):
    """Algorithm 1: the number of samples, the moments of new ones, and the sources beside it."""

    initial_samples: int = option(
        1500,
        unit="samples",
        low=1,
        common=True,
        help="samples before training begins, the paper's N",
    )
    round_samples: int = option(
        750,
        unit="samples",
        low=1,
        common=True,
        help="samples of an addition, the paper's P",
    )
    maximum_samples: int = option(
        6000,
        unit="samples",
        low=1,
        common=True,
        help="samples after which none are added",
    )
    maximum_rounds: int | None = option(
        None,
        unit="rounds",
        low=0,
        unset="as many as maximum_samples allows",
        help="additions after which no more are made",
    )
    iterations: int = option(
        1500, unit="steps", low=10, common=True, help="optimiser steps of the run"
    )
    evaluate_every: int = option(
        25,
        low=1,
        common=True,
        help="steps or passes (evaluate_unit) between two evaluations, the paper's tau",
    )
    evaluate_unit: Literal["steps", "passes"] = option(
        "steps",
        help="steps of the optimiser, or passes over the initial samples, as in the paper",
    )
    patience: int = option(
        2,
        unit="evaluations",
        low=1,
        common=True,
        help="evaluations without a new best after which "
        "samples are added, the paper's T_max at the start",
    )
    patience_growth: Literal["coverage", "pool", "round", "fixed"] = option(
        "coverage",
        help="how patience grows with the pool; coverage: "
        "at least a quarter of the pool over the initial samples; pool: "
        "in proportion to the pool; round: by one a round; fixed: not at all",
    )
    add_at: tuple[int, ...] = option(
        (),
        unit="steps",
        low=1,
        unset="when patience ends",
        help="optimiser steps after which samples are added, in place of patience, rising; the "
        "learner is evaluated after them too",
    )
    omega_rounds: tuple[float, ...] = option(
        (),
        unset="omega",
        help="omega of round 1, 2, ...; the last one holds for all later rounds",
    )
    anchor_rounds: tuple[float, ...] = option(
        (), low=0, unset="anchor", help="anchor of round 1, 2, ..., the same way"
    )
    cfg_scale_rounds: tuple[float, ...] = option(
        (),
        low=0,
        unset="cfg_scale",
        help="cfg_scale of round 1, 2, ..., the same way",
    )
    every_rounds: tuple[int, ...] = option(
        (), unit="steps", low=1, unset="every", help="every of round 1, 2, ..., the same way"
    )
    start_rounds: tuple[float, ...] = option(
        (),
        unit="fraction",
        low=0,
        below=1,
        unset="start",
        help="start of round 1, 2, ..., the same way",
    )
    until_rounds: tuple[float, ...] = option(
        (),
        unit="fraction",
        above=0,
        high=1,
        unset="until",
        help="until of round 1, 2, ..., the same way",
    )
    through_rounds: tuple[Literal["denoiser", "latent"], ...] = option(
        (), unset="through", help="through of round 1, 2, ..., the same way"
    )
    criterion_rounds: tuple[
        Literal["entropy", "loss", "margin", "disagreement"] | ImportPath, ...
    ] = option((), unset="criterion", help="criterion of round 1, 2, ..., the same way")
    fresh_weight: float = option(
        1.0,
        above=0,
        help="how much more often a sample of the newest round is drawn than others; 1: the paper",
    )
    allot: Literal["equal", "difficulty"] = option(
        "equal",
        help="labels of new samples: as many of each class, or by the classes' validation error",
    )
    class_counts: str = option(
        "",
        unit="file",
        unset="as many of each class",
        help="samples of each class that the pool fills towards, in proportion: a file with a "
        "class, by name or id, and its count a line, maximum_samples or more in all",
    )
    early_candidates: float = option(
        1.0,
        low=1,
        help="dp: trajectories that are begun for each sample, of which the easiest are stopped "
        "early; 1: none is",
    )
    early_until: float = option(
        0.4,
        unit="fraction",
        above=0,
        below=1,
        help="dp: the easiest candidates are stopped after the last guided step before this "
        "fraction of the steps",
    )
    restart: float = option(
        0.0,
        unit="fraction",
        low=0,
        below=1,
        help="dp: the fraction of the steps at which new "
        "samples begin, from samples of the pool; 0: from noise",
    )
    oversample: float = option(
        4.0,
        low=1,
        help="prune: candidates for each sample that is kept; 1 prunes nothing",
    )
    prune_within: Literal["class", "overall"] = option(
        "class",
        help="prune: whether the highest entropies are kept of each class, or of all samples",
    )
    sources: tuple[SourceName | ImportPath, ...] = option(
        ("dp", "static"),
        common=True,
        help="what makes samples, a run each, compared in one table; dp: Deliberate Practice, "
        "static: a pool that does not grow, prune: the best of many candidates, dynamic: "
        "additions without guidance, mix: real images beside those that are made (mix_with), real: "
        "real images alone, pool: the samples of another run (pool_from); one of yours: called "
        "with initial_samples, it gives a dpfast.Source",
    )
    real: str = option(
        "",
        unit="folder",
        unset="none",
        common=True,
        help="real and mix: images to train on, a folder with a sub-folder a class; the real "
        "images of validation and held_out are never trained on",
    )
    mix_with: Literal["dp", "static", "dynamic"] = option(
        "dp",
        help="mix: what makes the samples beside the real images, as the source of that name",
    )
    real_share: float = option(
        0.5,
        unit="fraction",
        above=0,
        high=1,
        help="mix: the share of the samples before training that are real images; 1: all, and the "
        "others come in rounds",
    )
    real_in_batch: tuple[float, ...] = option(
        (),
        unit="fraction",
        above=0,
        below=1,
        unset="as in the pool",
        help="mix: the share of a training batch that are real images, before round 1, 2, ...; the "
        "last one holds from then on",
    )
    pool_from: str = option(
        "",
        unit="folder",
        unset="none",
        help="pool: whose samples are trained on: of a run, a saved or exported pool, or another's "
        "dataset",
    )
    pool_rounds: tuple[int, ...] = option(
        (),
        unit="rounds",
        low=0,
        unset="all",
        help="pool: the rounds whose samples are taken, 0 for the initial ones",
    )
    reuse: str = option(
        "",
        unit="run",
        unset="none",
        help="folder of a run of the same generator and seed, whose unguided samples are taken in "
        "place of making them again",
    )
    yardstick_samples: int = option(
        250,
        unit="samples",
        low=1,
        help="unguided samples, in no pool, with whose entropy that of a round is compared",
    )
    checkpoint_share: float = option(
        0.01,
        unit="fraction",
        above=0,
        high=1,
        help="largest share of the run's time that saving checkpoints takes",
    )
    checkpoint_minutes: float = option(
        10.0,
        unit="minutes",
        low=0,
        help="largest age of the newest checkpoint while "
        "the learner trains; 0: one at every evaluation",
    )
    checkpoints_kept: int = option(
        2,
        low=1,
        help="how many of a source's newest checkpoints are kept",
    )
    keep_rounds: bool = option(
        False,
        help="keep the checkpoints at the ends of rounds as well, for --branch-at",
    )
    overlap: int = option(
        0,
        unit="ranks",
        low=0,
        help="so many of several ranks only generate, "
        "while the others train; 0: all do both in turn",
    )
    overlap_staleness: int = option(
        1000,
        unit="steps",
        low=1,
        help="with overlap: optimiser steps between a learner and the addition of what it guided",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sources", in_running_order(self.sources))

    def check(self) -> None:
        initial, most = self.initial_samples, self.maximum_samples
        wanted = f"at least initial_samples ({initial})"
        require(most >= initial, "maximum_samples", most, wanted)
        in_time = self.evaluate_unit != "steps" or self.evaluate_every <= self.iterations
        wanted = f"at most iterations ({self.iterations})"
        require(in_time, "evaluate_every", self.evaluate_every, wanted)
        both = self.early_candidates > 1 and self.restart
        wanted = f"0 with early_candidates = {self.early_candidates:g}: one of the two"
        require(not both, "restart", self.restart, wanted)
        rising = all(first < second for first, second in pairwise(self.add_at))
        require(rising, "add_at", ",".join(map(str, self.add_at)), "rising steps, each once")
        targets, within = self.class_counts, self.prune_within
        wanted = "'equal' with class_counts, which say the labels"
        require(not targets or self.allot == "equal", "allot", self.allot, wanted)
        alike = not targets or "prune" not in self.sources or within == "class"
        require(alike, "prune_within", within, "'class' with class_counts")
        rounds = self.rounds_within(self.maximum_samples)
        wanted = (
            f"at most {rounds} steps, for the rounds that maximum_samples ({most}) and "
            "maximum_rounds allow"
        )
        require(len(self.add_at) <= rounds, "add_at", ",".join(map(str, self.add_at)), wanted)
        for name, needs in (("real", ("real", "mix")), ("pool_from", ("pool",))):
            given, asking = getattr(self, name), [each for each in needs if each in self.sources]
            wanted = "a folder, which the source "
            wanted += " and the source ".join(map(repr, asking)) + " trains on"
            require(bool(given) or not asking, name, given, wanted)
        rounds_once = len(set(self.pool_rounds)) == len(self.pool_rounds)
        text = ",".join(map(str, self.pool_rounds))
        require(rounds_once, "pool_rounds", text, "rounds, each once")
        mixed = "mix" in self.sources
        alone = not mixed or not self.real_in_batch or self.fresh_weight == 1
        wanted = "1 with real_in_batch, which says how samples are drawn"
        require(alone, "fresh_weight", self.fresh_weight, wanted)
        require(not mixed or not self.overlap, "overlap", self.overlap, "0 with sources = 'mix'")
        real, first = self.mixed_real(self.before_training), self.before_training
        wanted = f"enough for one real image among {first} samples"
        require(not mixed or real > 0, "real_share", self.real_share, wanted)
        with_others = real < first or self.mix_with != "static" or not mixed
        wanted = "below 1 with mix_with = 'static', which adds none later"
        require(with_others, "real_share", self.real_share, wanted)
        once = self.sources and len(set(self.sources)) == len(self.sources)
        wanted = f"one or more of {', '.join((*SOURCES, FORM))}, each once"
        require(bool(once), "sources", ",".join(self.sources), wanted)

    def interval(self, batch_size: int) -> int:
        """Returns the optimiser steps between two evaluations."""
        if self.evaluate_unit == "steps":
            return self.evaluate_every
        return -(-self.evaluate_every * self.initial_samples // batch_size)

    def evaluations(self, batch_size: int) -> list[int]:
        """Returns the optimiser steps after which the learner is evaluated, rising."""
        interval = self.interval(batch_size)
        return sorted({*range(interval, self.iterations + 1, interval), *self.add_at})

    def rounds_within(self, samples: int) -> int:
        """Returns additions that lead to ``samples``, as far as ``maximum_rounds`` allows."""
        rounds = max(0, -(-(samples - self.initial_samples) // self.round_samples))
        return rounds if self.maximum_rounds is None else min(rounds, self.maximum_rounds)

    @property
    def takes_all_at_once(self) -> bool:
        """True if no round is added: by sources such as "static", which no other one has told its
        size.
        """
        still = (*AT_ONCE, "mix") if self.mix_with == "static" else AT_ONCE
        return all(name in still for name in self.sources)

    @property
    def before_training(self) -> int:
        """The samples that the source "mix" has before training, where no other source says its
        size.
        """
        return self.maximum_samples if self.mix_with == "static" else self.initial_samples

    def mixed_real(self, first: int) -> int:
        """Returns how many of the ``first`` samples of "mix" before training are real images."""
        return round(self.real_share * first)

    @property
    def guides(self) -> bool:
        """True if some source makes guided samples."""
        return "dp" in self.sources or ("mix" in self.sources and self.mix_with == "dp")

    @property
    def may_guide(self) -> bool:
        """False if no source makes guided samples; one of the user's own may."""
        return self.guides or any(name not in SOURCES for name in self.sources)

    @property
    def generates(self) -> bool:
        """True if some source makes samples, and does not only read them."""
        return any(name not in READ for name in self.sources)

    @property
    def most_samples(self) -> int:
        """Samples at the end of a run that adds as many rounds as it may."""
        if self.takes_all_at_once:
            return self.maximum_samples
        rounds = len(self.add_at) or self.rounds_within(self.maximum_samples)
        return min(self.initial_samples + rounds * self.round_samples, self.maximum_samples)


def in_running_order(sources: Sequence[str]) -> tuple[str, ...]:
    """Returns sources as they run, however they were said: so that one recipe is written in one
    way. Those of the user's own run last.
    """
    own = (each for each in sources if each not in SOURCES)
    return (*(name for name in SOURCES if name in sources), *own)
