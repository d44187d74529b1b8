"""The strength of a sample's guidance: by its round, and by its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpfast.config import Guidance
from dpfast.data.class_files import class_strengths
from dpfast.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """omega and anchor of a round's samples, each a number or (K,) float32 by class. anchor: None
    leaves it to the sampler.
    """

    omega: float | Tensor
    anchor: float | Tensor | None = None

    @classmethod
    def of(cls, guidance: Guidance, classes: Sequence[str]) -> Strengths:
        """Returns those of a recipe's [guidance], whose files may name single ones of ``classes``.

        Raises ``InputError`` as ``class_strengths`` does, and for a class with an anchor whose
        omega lowers the criterion.
        """
        file = guidance.omega_classes
        omega = _by_class(
            guidance.omega, class_strengths("omega_classes", file, classes), len(classes)
        )
        file = guidance.anchor_classes
        anchor = _by_class(
            guidance.anchor, class_strengths("anchor_classes", file, classes, low=0), len(classes)
        )
        wrong = (torch.as_tensor(omega) < 0) & (torch.as_tensor(anchor) > 0)
        if bool(wrong.any()):
            label = int(wrong.nonzero()[0]) if wrong.dim() else 0
            found = cls(omega=omega, anchor=anchor).rows(torch.tensor([label]))
            pair = {name: float(value) for name, value in found.items()}
            where = next(n for n in ("anchor_classes", "omega_classes") if getattr(guidance, n))
            raise InputError(
                f"{where} = {getattr(guidance, where)!r}: class {label} ({classes[label]!r}) has "
                f"anchor {pair['anchor']:g} with omega {pair['omega']:g}, which lowers the "
                "criterion; expected anchor 0"
            )
        return cls(omega=omega, anchor=anchor)

    @property
    def guides(self) -> bool:
        """True if any class is guided."""
        return bool(torch.as_tensor(self.omega).any())

    def rows(self, labels: Tensor) -> dict[str, Any]:
        """Returns the arguments omega and anchor of ``GuidedSampler.stream`` for samples with these
        labels (n,): numbers where all classes have one, else (n,) float32.
        """
        found = {"omega": self.omega} | ({} if self.anchor is None else {"anchor": self.anchor})
        return {
            name: value[labels] if isinstance(value, Tensor) else value
            for name, value in found.items()
        }


def _by_class(usual: float, named: dict[int, float], classes: int) -> float | Tensor:
    """Returns (K,) float32, ``usual`` for the classes that are not named; where none is,
    ``usual``.
    """
    if not named:
        return usual
    return torch.tensor([named.get(label, usual) for label in range(classes)])
