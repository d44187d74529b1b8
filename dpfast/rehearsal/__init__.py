"""A run at its true size, without its devices and its data: ``dpfast rehearse``.

    device     tensors without numbers: what a GPU would hold, by phase and kind, and when the host
               would wait for it
    autocast   bf16 for such tensors
    graphs     what captured graphs hold
    ranks      one rank of many, without the others
    standins   everything that takes the place of a GPU's own parts
    walk       one rank of the real loop, at the published sizes, with what repeats cut short
    timeline   the seconds of the whole run: rounds, evaluations, checkpoints, a slow rank
    rehearsal  all of it for a recipe, and what would go wrong

What is counted is what a run holds in tensors. What it reaches on a GPU, only a GPU shows.
"""

from dpfast.rehearsal.rehearsal import Rehearsal, rehearse

__all__ = ["Rehearsal", "rehearse"]
