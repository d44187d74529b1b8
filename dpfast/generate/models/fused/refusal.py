"""Why a module of diffusers stays as it is."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """A module has an option that its fused form does not know; the message names it."""


def need(condition: object, reason: str) -> None:
    """Raises ``Refusal`` unless ``condition`` holds."""
    if not condition:
        raise Refusal(reason)


def expect(module: Any, **values: Any) -> None:
    """Raises ``Refusal`` for an attribute that is there and has another value."""
    for name, value in values.items():
        found = getattr(module, name, value)
        need(found == value, f"{name} = {found!r}")
