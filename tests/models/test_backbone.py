"""A row's log-probabilities are those of plain transformers, however it is laid out, on every kernel; roles stay apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.trees import Piece, Tree
from rlhf_cli.errors import NumberError, UsageError
from rlhf_cli.models.backbone import KERNELS, Backbone
from tests.models.tiny_backbone import draw_trees, make, make_backbone, packed_logps, plain_logps

TREES = [*draw_trees(3, branches=2, earlier=True), *draw_trees(2, seed=1, branches=1), *draw_trees(1, seed=2, branches=4)]


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager", "alone"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral", "qwen3"])
def test_logps_do_not_depend_on_layout_or_kernel(name: str, attention: str) -> None:
    backbone = Backbone(make(name), torch.float32, "auto" if attention == "alone" else attention)
    if attention == "alone":
        backbone.kernel = KERNELS["alone"]
        backbone._use(backbone.kernel)
    assert backbone.kernel.layout == {"auto": "long", "alone": "alone"}.get(attention, "packed")
    with torch.no_grad(), backbone.plain_attention() as model:
        wanted = plain_logps(model, TREES)
    for budget in (1, 50, 4096):
        with torch.no_grad():
            found = packed_logps(backbone, TREES, budget)
        assert float((found - wanted).abs().max()) < 1e-5, budget
