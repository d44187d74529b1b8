"""The reasons for which a module of diffusers stays as it is."""

from __future__ import annotations

from typing import Any

from torch import nn


class Refusal(Exception):
    """A refusal of a module with an option that its fused form does not know; the message names
    it.
    """


def need(condition: object, reason: str) -> None:
    """Raises ``Refusal`` unless ``condition`` holds."""
    if not condition:
        raise Refusal(reason)


def expect(module: Any, **values: Any) -> None:
    """Raises ``Refusal`` for an attribute that is there and has another value."""
    for name, value in values.items():
        found = getattr(module, name, value)
        need(found == value, f"{name} = {found!r}")


def expect_3x3(convolution: Any) -> None:
    """Raises ``Refusal`` for all but a plain convolution of 3x3 with a bias that keeps the size."""
    need(type(convolution) is nn.Conv2d, f"a {type(convolution).__name__}")
    expect(convolution, kernel_size=(3, 3), padding=(1, 1), stride=(1, 1), dilation=(1, 1))
    expect(convolution, groups=1, padding_mode="zeros")
    need(convolution.bias is not None, "a convolution without a bias")


def expect_no_hooks(module: nn.Module) -> None:
    """Raises ``Refusal`` where a hook, or a forward of its own, changes what a part computes."""
    for part in module.modules():
        hooked = part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
        need(not hooked, f"a hook on a {type(part).__name__}")
