"""Dataclass fields that are recipe keys: what a type cannot say is attached to them. Needs no other module of ours."""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any


def key(
    default: Any = MISSING,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    path: bool = False,
    last: bool = False,
) -> Any:
    """A dataclass field with a one-line help, inclusive bounds, and whether ${ENV} is expanded in it.

    `last`: it is shown and written after the keys that subclasses add.
    """
    metadata = {"help": help, "low": low, "high": high, "path": path, "last": last}
    if default is MISSING:
        return field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
