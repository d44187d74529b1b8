"""Deliberate Practice: a classifier and the diffusion generator that it steers.

The classifier trains on synthetic images; the generator makes new ones on demand, guided towards
high entropy of the current classifier (arXiv 2502.15588). Each name is imported on its first use.

A run: ``Recipe``, ``DeliberatePractice``, ``Result``; ``RealData`` for real images of one's own,
    ``Callback`` with ``Progress`` and ``Addition``; ``InputError`` and ``RecipeError``.
The sampler: ``Pipeline``, ``GuidedSampler``, ``GuidanceConfig``, ``SampleBatch``; ``OwnPipeline``
    and ``Sampler`` for a generator of one's own.
The guidance in other samplers: ``GuidanceCallback``, ``GuidedDDIMScheduler``,
    ``LearnerGuidance``, ``make_cond_fn``.
The samples: ``SamplePool``, ``Pool``, ``open_pool``; ``Source`` with ``RoundRequest`` and
    ``LoopView`` for samples of any other origin.
The batches: ``make_loader``, ``Loader``, ``Augment``, ``BatchFormat``.
The operations: ``guided_step``, ``entropy``, ``entropy_and_grad``, ``normal``, ``gather_batch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dpfast.version import __version__ as __version__

if TYPE_CHECKING:
    from dpfast.adapters import GuidanceCallback, GuidedDDIMScheduler, LearnerGuidance, make_cond_fn
    from dpfast.config import Recipe
    from dpfast.data.real import RealData
    from dpfast.errors import InputError, RecipeError
    from dpfast.feed import make_loader
    from dpfast.feed.augment import Augment
    from dpfast.feed.loader import Loader
    from dpfast.generate.guidance import GuidanceConfig
    from dpfast.generate.pipelines import Pipeline
    from dpfast.generate.protocol import OwnPipeline, Sampler
    from dpfast.generate.sampler import GuidedSampler
    from dpfast.ops import entropy, entropy_and_grad, gather_batch, guided_step, normal
    from dpfast.pool.batch import BatchFormat
    from dpfast.pool.pool import SamplePool
    from dpfast.pool.protocol import Pool
    from dpfast.pool.reader import open_pool
    from dpfast.practice.callbacks import Addition, Callback, Progress
    from dpfast.practice.experiment import DeliberatePractice
    from dpfast.practice.result import Result
    from dpfast.samples import SampleBatch
    from dpfast.sources.source import LoopView, RoundRequest, Source

# Public name -> its module. Imported on first use: `dpfast --help` and a wrong argument are
# answered without torch.
_HOME = {
    "Recipe": "dpfast.config",
    "InputError": "dpfast.errors",
    "RecipeError": "dpfast.errors",
    "Pipeline": "dpfast.generate.pipelines",
    "GuidanceConfig": "dpfast.generate.guidance",
    "GuidedSampler": "dpfast.generate.sampler",
    "SampleBatch": "dpfast.samples",
    "GuidanceCallback": "dpfast.adapters",
    "GuidedDDIMScheduler": "dpfast.adapters",
    "LearnerGuidance": "dpfast.adapters",
    "make_cond_fn": "dpfast.adapters",
    "entropy": "dpfast.ops",
    "entropy_and_grad": "dpfast.ops",
    "gather_batch": "dpfast.ops",
    "guided_step": "dpfast.ops",
    "normal": "dpfast.ops",
    "Pool": "dpfast.pool.protocol",
    "SamplePool": "dpfast.pool.pool",
    "open_pool": "dpfast.pool.reader",
    "BatchFormat": "dpfast.pool.batch",
    "Augment": "dpfast.feed.augment",
    "Loader": "dpfast.feed.loader",
    "make_loader": "dpfast.feed",
    "Addition": "dpfast.practice.callbacks",
    "Callback": "dpfast.practice.callbacks",
    "Progress": "dpfast.practice.callbacks",
    "LoopView": "dpfast.sources.source",
    "RoundRequest": "dpfast.sources.source",
    "Source": "dpfast.sources.source",
    "OwnPipeline": "dpfast.generate.protocol",
    "Sampler": "dpfast.generate.protocol",
    "RealData": "dpfast.data.real",
    "DeliberatePractice": "dpfast.practice.experiment",
    "Result": "dpfast.practice.result",
}
__all__ = [
    "Addition",
    "Augment",
    "BatchFormat",
    "Callback",
    "DeliberatePractice",
    "GuidanceCallback",
    "GuidanceConfig",
    "GuidedDDIMScheduler",
    "GuidedSampler",
    "InputError",
    "LearnerGuidance",
    "Loader",
    "LoopView",
    "OwnPipeline",
    "Pipeline",
    "Pool",
    "Progress",
    "RealData",
    "Recipe",
    "RecipeError",
    "Result",
    "RoundRequest",
    "SampleBatch",
    "SamplePool",
    "Sampler",
    "Source",
    "entropy",
    "entropy_and_grad",
    "gather_batch",
    "guided_step",
    "make_cond_fn",
    "make_loader",
    "normal",
    "open_pool",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dpfast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
