"""What a model is loaded as."""

from __future__ import annotations

import pytest
import torch

from rlhf_cli.models.load import resolve_dtype


@pytest.mark.parametrize(("has", "emulates", "wanted"), [(True, True, torch.bfloat16), (False, True, torch.float32)])
def test_auto_is_bfloat16_where_the_gpu_has_it_and_does_not_emulate_it(
    has: bool, emulates: bool, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return has or (emulates and including_emulation)

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_dtype("auto", torch.device("cuda")) == wanted
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("float16", torch.device("cuda")) == torch.float16
