"""The sum of all ranks' gradients, in buckets that leave while the backward pass goes on."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dpfast.parallel import Ranks

BUCKET = 25 << 20  # bytes, as in DistributedDataParallel


@dataclass(eq=False)
class Bucket:
    """The gradients of some parameters, one behind the other.

    views: the parts of ``flat``, one a parameter; missing: how many of them this backward pass has
    still to bring.
    """

    parameters: list[nn.Parameter]
    flat: Tensor | None = None
    views: list[Tensor] = field(default_factory=list)
    missing: int = 0

    def clear(self) -> Tensor:
        """Returns ``flat``, filled with zeros."""
        if self.flat is None:
            self.flat = self.parameters[0].new_empty(
                sum(p.numel() for p in self.parameters), requires_grad=False
            )
            parts = self.flat.split([p.numel() for p in self.parameters])
            # strides as those of the parameter: an optimiser's fused kernel walks through both in
            # the order of memory
            self.views = [
                part.as_strided(p.shape, p.stride(), part.storage_offset())
                for p, part in zip(self.parameters, parts, strict=True)
            ]
        return self.flat.zero_()


class Gradients:
    """The gradients of a process alone, where autograd leaves them.

    gradients.begin()
    for part in parts of the batch:
        with gradients.sending(part is the last one):
            loss(part).backward()
    gradients.finish()
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters

    def begin(self) -> None:
        """Begins a step, without any gradient."""
        self.again()

    def again(self) -> None:
        """Begins the step's backward passes anew."""
        for parameter in self.parameters:
            parameter.grad = None

    def sending(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Returns a context for a backward pass. last: the pass brings the last part of every
        gradient.
        """
        return contextlib.nullcontext()

    def finish(self) -> None:
        """Completes the step's gradients."""

    def release(self) -> None:
        """Gives back what the next ``begin`` makes anew."""
        self.again()


class GradientBuckets(Gradients):
    """Makes the ``grad`` of each parameter the sum over ranks, as ``DistributedDataParallel`` makes
    it the mean.

    Within ``sending(True)``, a bucket leaves as soon as its last gradient is there, in one order on
    all ranks; without it gradients add up where they are (DDP's ``no_sync``). So a step sends every
    bucket once, whatever number of parts a rank takes. A rank whose backward pass fails calls
    ``again`` and computes the whole batch anew: what it has sent already was whole and stays, so
    that nobody waits for a rank which runs out of memory, or learns of it. DDP cannot: a backward
    pass that was left leaves it waiting for the rest of its buckets.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], ranks: Ranks, *, bucket_bytes: int = BUCKET
    ) -> None:
        super().__init__(parameters)
        self.ranks = ranks
        self.buckets = [Bucket(group) for group in _groups(parameters, bucket_bytes)]
        self._index = {
            p: index for index, bucket in enumerate(self.buckets) for p in bucket.parameters
        }
        self._work: list[Any] = []  # of the buckets that have been sent, the first ones
        self._sending = False
        # Python finds no cycle through a parameter's hooks: it would live for good
        buckets = weakref.ref(self)

        def arrived(parameter: Tensor) -> None:
            if (held := buckets()) is not None:
                held._arrived(parameter)

        for parameter in self._index:
            parameter.register_post_accumulate_grad_hook(arrived)

    def begin(self) -> None:
        self._work.clear()
        self.again()

    def again(self) -> None:
        """Begins the step's backward passes anew, from zero, for the buckets that have not been
        sent.
        """
        sent, rest = self.buckets[: len(self._work)], self.buckets[len(self._work) :]
        for bucket in rest:
            bucket.clear()
            bucket.missing = len(bucket.parameters)
        for parameter, view in _pairs(rest):
            parameter.grad = view
        for parameter, _ in _pairs(sent):
            parameter.grad = None  # another one, which is dropped

    @contextlib.contextmanager
    def sending(self, last: bool) -> Iterator[None]:
        self._sending = last
        try:
            yield
        finally:
            self._sending = False

    def finish(self) -> None:
        """Sends the rest, that of parameters without a gradient, and waits: on a GPU its stream
        does, not the host.
        """
        for bucket in self.buckets[len(self._work) :]:
            self._send(bucket)
        for work in self._work:
            work.wait()
        for parameter, view in _pairs(self.buckets):
            parameter.grad = view

    def release(self) -> None:
        for bucket in self.buckets:
            bucket.flat, bucket.views = None, []

    def _arrived(self, parameter: Tensor) -> None:
        index = self._index[parameter]  # type: ignore[index]
        if not self._sending or index < len(self._work):
            return
        self.buckets[index].missing -= 1
        while len(self._work) < len(self.buckets) and not self.buckets[len(self._work)].missing:
            self._send(self.buckets[len(self._work)])

    def _send(self, bucket: Bucket) -> None:
        assert bucket.flat is not None
        self._work.append(self.ranks.learn.all_reduce(bucket.flat, wait=False))


def _groups(parameters: Sequence[nn.Parameter], size: int) -> list[list[nn.Parameter]]:
    """Returns the parameters from the last to the first, as their gradients come, in groups of one
    dtype and about ``size``.
    """
    groups: list[list[nn.Parameter]] = []
    held = 0
    for parameter in reversed(parameters):
        if not groups or held + parameter.nbytes > size or parameter.dtype != groups[-1][0].dtype:
            groups.append([])
            held = 0
        groups[-1].append(parameter)
        held += parameter.nbytes
    return groups


def _pairs(buckets: Sequence[Bucket]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for bucket in buckets:
        yield from zip(bucket.parameters, bucket.views, strict=True)
