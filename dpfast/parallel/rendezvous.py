"""The rendezvous of one start's processes in torchrun's store, which outlives them.

The store still holds what the ranks of an earlier start said, and no variable of torchrun tells two
starts apart: its ``TORCHELASTIC_RESTART_COUNT`` counts the failures of one node, so after a process
has failed on one of two nodes the ranks of the other still read the old number. torchrun begins a
start when all processes of the one before have ended. So every process writes a word of its own,
and rank 0 lists the words until all whom it lists have answered:

    join/RANK      a random word after the failures on its node, written over that of an earlier
                   start
    roster         what rank 0 has read there, as JSON; anew when one changes
    START/WORD     a rank has found its word in the roster whose digest is START
    START          rank 0: all have, and START names this start
"""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass
from typing import Any

from dpfast.parallel.heartbeat import POLLS, Clock, RankError, silent


@dataclass(frozen=True)
class Start:
    """A start of the run. name: the same on all ranks, of no other start. again: True but for the
    first one of a run.
    """

    name: str
    again: bool


def meet(
    store: Any,
    rank: int,
    size: int,
    timeout: float,
    *,
    failures: int = 0,
    clock: Clock | None = None,
) -> Start:
    """Returns when all ``size`` ranks of this start are here. failures: on this node, as torchrun
    counts them.

    Raises ``RankError`` after ``timeout`` seconds, with the names of those who are not.
    """
    clock, word = clock or Clock(), f"{failures} {uuid.uuid4().hex}"
    joins = [f"join/{other}" for other in range(size)]
    known = store.check(["roster"])  # not where the node is lost that kept the store
    store.set(joins[rank], word)
    deadline = clock.now() + timeout
    while True:
        roster, name = _roster(store, joins, publish=rank == 0)
        answers = [f"{name}/{other}" for other in roster]
        listed = len(roster) == size and roster[rank] == word
        if listed:
            store.set(answers[rank], "here")
            if rank == 0 and store.check(answers):
                store.set(
                    name, json.dumps(known or any(not other.startswith("0 ") for other in roster))
                )
            if store.check([name]):
                return Start(name, json.loads(store.get(name)))
        if clock.now() >= deadline:
            absent = [
                other
                for other, key in enumerate(answers if listed else joins)
                if not store.check([key])
            ]
            raise RankError(silent(absent or [0], size, timeout))
        clock.sleep(POLLS[1])


def _roster(store: Any, joins: list[str], *, publish: bool) -> tuple[list[str], str]:
    """Returns the words of all ranks and the digest that names them; none while there is no
    roster.
    """
    if publish and store.check(joins):
        store.set("roster", json.dumps([key.decode() for key in store.multi_get(joins)]))
    if not store.check(["roster"]):
        return [], ""
    words = store.get("roster").decode()
    return json.loads(words), hashlib.sha256(words.encode()).hexdigest()[:16]
