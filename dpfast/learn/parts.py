"""The parts of a learner that finetuning tells apart: its head, its layers, and what is frozen.

Parameters go by the names that their library gives them, those of the keys of its files of weights:
"vit.layers.0.attention.q_proj.weight".
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dpfast.errors import InputError
from dpfast.learn.batch_norm import keep_statistics
from dpfast.learn.checkpointing import repeated_blocks

BACKBONE = "backbone"  # all but the head


class Logits(nn.Module):
    """A model of the transformers library, returning its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def library_model(learner: nn.Module) -> nn.Module:
    """Returns the module whose names a user knows: within ``Logits``, the library's own."""
    return learner.model if isinstance(learner, Logits) else learner


def in_head(learner: nn.Module, name: str) -> bool:
    """Returns True if a parameter is of the head, which tells classes apart.

    Of a model of transformers that is all outside of the base model, of one of timm its
    ``get_classifier``, and of any other the last layer with a matrix of weights, by registration.
    """
    model = library_model(learner)
    base = getattr(model, "base_model_prefix", "")
    if isinstance(learner, Logits) and isinstance(getattr(model, base, None), nn.Module):
        return not name.startswith(f"{base}.")
    return any(name.startswith(f"{each}.") for each in _heads(model))


def _heads(model: nn.Module) -> list[str]:
    """Returns the names of the modules that are the head."""
    classifier = getattr(model, "get_classifier", None)
    if callable(classifier):
        found = classifier()
        heads = found if isinstance(found, tuple | list) else (found,)
        return [name for name, module in model.named_modules() if module in heads]
    matrices = [name for name, weights in model.named_parameters() if weights.ndim > 1]
    return [matrices[-1].rpartition(".")[0]] if matrices and "." in matrices[-1] else []


def freeze(learner: nn.Module, names: Sequence[str]) -> None:
    """Takes parameters out of training, in place: they ask for no gradient any more.

    A batch norm that is frozen goes by its running statistics, and leaves them. Dropout stays as it
    is.

    names: ``BACKBONE``, or parameters and modules by the beginning of a name, at a dot.

    Raises ``InputError`` for a name that no parameter has, and where none is left to train.
    """
    if not names:
        return
    model = library_model(learner)
    parameters = dict(model.named_parameters())

    def chosen(name: str, by: str) -> bool:
        if by == BACKBONE:
            return not in_head(learner, name)
        return name == by or name.startswith(f"{by}.")

    for each in names:
        if not any(chosen(name, each) for name in parameters):
            raise InputError(
                f"freeze = {each!r}: the learner has no such parameter; expected {BACKBONE!r}, or "
                f"the beginning of a name such as {next(iter(parameters))!r}"
            )
    for name, weights in parameters.items():
        if any(chosen(name, each) for each in names):
            weights.requires_grad_(False)
    if not any(weights.requires_grad for weights in parameters.values()):
        raise InputError(f"freeze = {','.join(names)!r}: leaves nothing to train")
    keep_statistics(model, lambda norm: any(chosen(f"{norm}.weight", each) for each in names))


def layers(learner: nn.Module) -> dict[nn.Parameter, int]:
    """Returns the layer of each parameter: 0 before the first of the blocks that the learner is a
    stack of, 1 to L in them, L + 1 behind the last one and in the head.

    The blocks are those of ``dpfast.learn.checkpointing``, the convention is BEiT's (Bao et al.
    2022), by the order of registration: of a ViT 0 are its embeddings, and L + 1 are its last norm
    and its head. What lies between two blocks is of the first one's layer.

    Raises ``InputError`` where no module is repeated.
    """
    model = library_model(learner)
    blocks = repeated_blocks(model)
    if len(blocks) < 2:
        raise InputError(
            f"layer_decay: {type(model).__name__} repeats no module in a list of modules of one "
            "class, so it has no layers; expected 1"
        )
    block_of = {weights: at for at, block in enumerate(blocks, 1) for weights in block.parameters()}
    found: dict[nn.Parameter, int] = {}
    last, seen = len(blocks) + 1, 0
    for name, weights in model.named_parameters():
        seen = block_of.get(weights, seen)
        behind = in_head(learner, name) or (weights not in block_of and seen == len(blocks))
        found[weights] = last if behind else seen
    return found
