"""Several processes as one run: torchrun's ranks, what each of them makes, and how they agree.

    torchrun --nproc-per-node 8 -m dpfast run imagenet1k-sd15 --pipeline FOLDER --validation FOLDER

    torchrun    the processes that torchrun started, as ``Ranks``; without it one process alone,
                which nothing costs
    rendezvous  how they find each other in torchrun's store, which remembers earlier starts
    ranks       what belongs to which rank, and how ranks agree
    heartbeat   who waits for whom, and when a rank counts as dead
    groups      every collective of this package, and which of them may be in flight together
    recorder    the collectives of a process in their order, for tests and rehearsals

Work is dealt in batches: batch k of a round, or of a set of real images, belongs to rank (turn + k)
mod ranks. A batch holds the same samples on any number of ranks, so the images are the same bits.
Everything that decides (accuracies, patience, the order of training) is a function of what all
ranks know, and every rank decides alike.
"""

from dpfast.parallel.heartbeat import TIMEOUT, RankError
from dpfast.parallel.ranks import ALONE, Ranks
from dpfast.parallel.torchrun import process_group, versions

__all__ = [
    "ALONE",
    "TIMEOUT",
    "RankError",
    "Ranks",
    "process_group",
    "versions",
]
