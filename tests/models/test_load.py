"""What a model is loaded as, and what is not loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from rlhf_cli import sections
from rlhf_cli.errors import UsageError
from rlhf_cli.models.load import load_config, quiet_libraries, resolve_dtype
from rlhf_cli.models.memory import estimate
from tests.data.tiny_tokenizer import tiny_tokenizer
from tests.models.families import make_config
from tests.models.tiny_backbone import SHAPE


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


SEEN = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
IMAGES = {
    "gemma3": hf.Gemma3Config(
        text_config=SHAPE | {"model_type": "gemma3_text", "head_dim": 8},
        vision_config=SEEN | {"patch_size": 14},
        mm_tokens_per_image=4,
    ),
    "mistral3": hf.Mistral3Config(
        text_config=SHAPE | {"model_type": "mistral"},
        vision_config=SEEN | {"model_type": "pixtral", "head_dim": 8, "patch_size": 14},
    ),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_model_of_images_is_refused_and_its_text_part_is_not(kind: str, tmp_path: Path) -> None:
    """The lines of docs/models.md give a model of text with the same logits."""
    quiet_libraries()
    torch.manual_seed(0)
    whole = hf.AutoModelForImageTextToText.from_config(IMAGES[kind]).eval()
    whole.save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    with pytest.raises(
        UsageError, match=rf"whole: {kind} takes more than text \(vision_config\), and only models of text are tr"
    ):
        load_config(str(tmp_path / "whole"), None, False)
    for weights in (tmp_path / "whole").glob("*.safetensors"):
        weights.rename(tmp_path / "kept")
    with pytest.raises(UsageError, match=r"docs/models.md shows how to save its text part"):
        load_config(str(tmp_path / "whole"), None, False)
    (tmp_path / "kept").rename(tmp_path / "whole" / "model.safetensors")
    _, lines = (Path(__file__).parents[2] / "docs/models.md").read_text().split("```python\n")
    names: dict[str, Any] = {"PATH": str(tmp_path / "whole"), "DEST": str(tmp_path / "text")}
    exec(lines.split("```")[0], names)
    assert load_config(str(tmp_path / "text"), None, False).model_type == {"gemma3": "gemma3_text", "mistral3": "mistral"}[kind]
    ids = torch.arange(12)[None]
    text = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32).eval()
    assert torch.equal(text(ids).logits, whole(input_ids=ids).logits)


@pytest.mark.parametrize(("rank", "asks", "said"), [(None, True, 1), (None, False, 0), (2, True, 1)])
def test_a_loss_for_even_experts_that_the_config_asks_for_is_said_to_be_left_out(rank: int | None, asks: bool, said: int) -> None:
    config = make_config("mixtral", output_router_logits=asks)
    notices = estimate(config, sections.Model(path=""), rank=rank, dtype=torch.float32).notices
    assert len(notices) == said
    assert ("router_aux_loss_coef): it is not added" in "".join(notices)) == (rank is None and asks)
