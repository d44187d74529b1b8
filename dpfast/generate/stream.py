"""Many samples as a stream of batches: how large they are, whether they run compiled, what happens
without memory.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from dpfast.generate import preflight as probing
from dpfast.generate.runtime.batching import FIRST, LARGEST, BatchSizer
from dpfast.generate.step import Variant
from dpfast.hardware.out_of_memory import attempt, release
from dpfast.samples import SampleBatch

if TYPE_CHECKING:
    from dpfast.generate.sampler import GuidedSampler

log = logging.getLogger(__name__)


def in_batches(
    sampler: GuidedSampler,
    make: Callable[[slice], SampleBatch],
    total: int,
    batch_size: int | Literal["auto"],
    variants: Sequence[Variant],
) -> Iterator[SampleBatch]:
    """Yields what ``make`` makes of the parts of ``total`` samples, in order, each once.

    variants: of a trajectory's steps; batch_size: "auto" doubles the batch while it pays. A batch
    that does not fit into memory is made again in halves, and ``sampler.fitting`` remembers what
    did fit.
    """
    execution, tuner, done, retries = sampler.execution, sampler.tuner, 0, 0
    guided = any(variant.guided for variant in variants)
    sizer = _sizer(sampler, batch_size, total, variants)
    while done < total:
        if not sizer.searching:
            compile = tuner.decide(execution, sizer.size, total - done)
            if compile or sampler.recorder is not None:
                execution.prepare(sizer.size, compile=compile)
            else:
                execution.close()
        started = time.perf_counter()
        batch, failure = attempt(functools.partial(make, slice(done, done + sizer.size)))
        if batch is None:
            assert failure is not None
            sizer.out_of_memory(failure)
            sampler.close()
            release(sampler.pipeline.device)
            log.warning("out of memory: going on with batches of %d", sizer.size)
            sampler.fitting[guided] = sizer.size
            retries += 1
            continue
        if len(batch) == sizer.size:
            seconds = time.perf_counter() - started
            sizer.report(seconds)
            tuner.report(execution, len(batch), seconds)
        done += len(batch)
        yield replace(batch, retries=retries) if retries else batch
        retries = 0


def _sizer(
    sampler: GuidedSampler,
    batch_size: int | Literal["auto"],
    total: int,
    variants: Sequence[Variant],
) -> BatchSizer:
    guided = any(variant.guided for variant in variants)
    prepared, fitting = sampler.execution.batch, sampler.fitting.get(guided, LARGEST)
    if batch_size == "auto" and prepared is not None:  # found by an earlier stream
        return BatchSizer(prepared, limit=prepared, search=False)
    if batch_size == "auto" and total > FIRST:
        whole = (variant for variant in variants if variant.features != "reuse")
        dearest = max(whole, key=lambda variant: (variant.guided, variant.cfg))
        limit = probing.largest_batch(sampler.execution.parts, sampler.table, dearest)
        return BatchSizer(FIRST, limit=min(fitting, limit))
    size = max(
        1,
        total
        if batch_size == "auto" or (batch_size > total and prepared != batch_size)
        else batch_size,
    )
    return BatchSizer(size, limit=sampler.fitting.get(guided, size), search=False)
