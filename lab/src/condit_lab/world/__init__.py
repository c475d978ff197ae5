"""The larger icon world: many families of icons and art, one concept in many styles, captions in two languages."""

from __future__ import annotations

from condit_lab.world.store import World

__all__ = ["World"]
