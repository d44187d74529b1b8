"""The criteria that guidance raises: a value for each sample, from the learner's logits and the
sample's label.

A criterion is one differentiable function ``(logits (B, K), labels (B,)) -> values (B,)`` whose
value i depends on row i alone. ``functools.partial(F.cross_entropy, reduction="none")`` is one;
those below are known by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dpfast import ops
from dpfast.config import imported, is_import_path
from dpfast.errors import InputError

Criterion = Callable[[Tensor, Tensor], Tensor]


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the prediction entropy in nats, whatever the label: the paper's criterion."""
    return ops.entropy(logits)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy of the label in nats: also raised by a confident mistake."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the runner-up's logit minus the winner's: at most 0, and 0 on the border between two
    classes.
    """
    top = logits.topk(2, dim=1).values
    return top[:, 1] - top[:, 0]


def disagreement(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the distance between the members of a committee: logits (B, M, K), one row a member
    (``dpfast.learn.models.Committee``).

    H(mean_m p_m) - mean_m H(p_m) in nats, the Jensen-Shannon divergence of the predictions, at most
    log M: query by committee with the measure of BALD (Houlsby et al. 2011, arXiv 1112.5745).
    Raises ``InputError`` for one learner's logits.
    """
    if logits.dim() != 3:
        raise InputError(
            "criterion 'disagreement' compares the members of a committee: "
            f"expected logits (B, M, K), got {tuple(logits.shape)}"
        )
    logs = logits.float().log_softmax(2)
    mean = logs.exp().mean(1)
    return -torch.xlogy(mean, mean).sum(1) + (logs.exp() * logs).sum(2).mean(1)


CRITERIA: dict[str, Criterion] = {
    "entropy": entropy,
    "loss": loss,
    "margin": margin,
    "disagreement": disagreement,
}


def named(criterion: str | Criterion) -> Criterion:
    """Returns the criterion of that name, or of that import path ("package.module:name"), or the
    function itself.

    Raises ``InputError`` for an unknown name and for a path that leads to no function,
    ``TypeError`` for what is neither.
    """
    if not isinstance(criterion, str):
        if not callable(criterion):
            raise TypeError(f"criterion must be a name or a function, got {criterion!r}")
        return criterion
    if is_import_path(criterion):
        found: Criterion = imported("criterion", criterion)
        if not callable(found) or isinstance(found, type):
            what = "class" if isinstance(found, type) else type(found).__name__
            raise InputError(f"criterion = {criterion!r}: is a {what}, expected a function")
        return found
    if criterion not in CRITERIA:
        raise InputError(
            f"criterion = {criterion!r}: expected one of {', '.join(CRITERIA)}, "
            "package.module:name or a function"
        )
    return CRITERIA[criterion]


def value_and_gradient(
    criterion: Criterion, logits: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the values (B,) and their gradient with respect to the logits (B, K); entropy has
    both from one operation.
    """
    if criterion is entropy:
        return ops.entropy_and_grad(logits)
    value, backward = torch.func.vjp(lambda z: criterion(z, labels), logits)  # type: ignore[misc]
    return value, backward(torch.ones_like(value))[0]
