"""Which ids end a response."""

from __future__ import annotations

from typing import Any


def end_ids(model: Any, *more: int) -> list[int]:
    """The ids that end a response: those of the model's generation config, which may be a list, and `more`."""
    own = model.generation_config.eos_token_id
    return sorted({*(own if isinstance(own, list) else [own] if own is not None else []), *more})
