"""Which ids end a response."""

from __future__ import annotations

from typing import Any

from rlhf_cli.data.templates import Template, end_of_turn
from rlhf_cli.models.backbone import Backbone


def end_ids(model: Any, *more: int) -> list[int]:
    """The ids that end a response: those of the model's generation config, which may be a list, and `more`."""
    own = model.generation_config.eos_token_id
    return sorted({*(own if isinstance(own, list) else [own] if own is not None else []), *more})


def stop_ids(backbone: Backbone, tokenizer: Any, template: Template) -> list[int]:
    """The ids that end a response of this model under its template."""
    return end_ids(backbone.model, *end_of_turn(tokenizer, template)[-1:], tokenizer.eos_token_id)
