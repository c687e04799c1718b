"""What is wrong before the first step is caught there, and the message says what it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict

from rlhf_cli.data.records import Facts
from rlhf_cli.data.trees import Batch, Tree
from rlhf_cli.errors import NumberError
from rlhf_cli.models import backbone as backbone_module
from rlhf_cli.models.backbone import BASE, Backbone
from rlhf_cli.models.passes import Passes
from rlhf_cli.objectives.bradley_terry import BradleyTerry
from rlhf_cli.objectives.dpo import Dpo
from rlhf_cli.objectives.kto import Kto
from rlhf_cli.objectives.sft import Sft
from rlhf_cli.ranks import Ranks
from rlhf_cli.training.invariants import check_start
from tests.models.tiny_backbone import draw_trees, make, make_backbone

ALONE = Ranks(expected=False)
TREES = draw_trees(6, branches=2)
JUDGED = [tree._replace(facts=Facts(label=bool(i % 2))) for i, tree in enumerate(TREES)]


def check(backbone: Backbone, objective: Any, trees: list[Tree] = TREES) -> None:
    check_start(Passes(backbone, 60, ALONE), objective, trees, reference_is_start=True)


def with_reference(**options: Any) -> Backbone:
    """A policy with a random adapter, and its frozen copy as the reference."""
    backbone = make_backbone(make(), **options)
    state = {n: t.clone() for n, t in get_peft_model_state_dict(backbone.peft, adapter_name="policy").items()}
    backbone.add_lora("reference", backbone.peft.peft_config["policy"], state, trained=False)
    return backbone


def stored(backbone: Backbone, trees: list[Tree]) -> list[Tree]:
    """The trees with the policy's own values, one tree a pass, as a store would bring them."""
    found = []
    with torch.no_grad():
        for tree in trees:
            (batch,) = backbone.batches([tree], 10_000)
            values = backbone.logps("policy", batch)[0].numpy()
            ends = np.cumsum([len(response) for response in tree.responses])[:-1]
            found.append(tree._replace(reference=tuple(np.split(values, ends))))
    return found


@pytest.mark.parametrize(("objective", "trees"), [(Dpo(), TREES), (Kto(), JUDGED)])
def test_a_right_start_passes(objective: Any, trees: list[Tree]) -> None:
    backbone = with_reference()
    check(backbone, objective, trees)
    check(backbone, objective, stored(backbone, trees))
    check(make_backbone(make()), Sft(), draw_trees(6, earlier=True))
    check(make_backbone(make(), role="reward"), BradleyTerry())


def test_dropout_in_the_reference() -> None:
    backbone = with_reference(dropout=0.3)
    original = backbone.model.eval
    backbone.model.eval = lambda: (original(), _dropout_on(backbone))[0]
    with pytest.raises(NumberError, match=r"the policy and its reference differ: log-ratios .*\n.*is dropout on in it\?"):
        check(backbone, Dpo())


def _dropout_on(backbone: Backbone) -> None:
    """A frozen adapter gets no dropout layer: here somebody gives it one, and forgets to turn it off."""
    for name, module in backbone.model.named_modules():
        if name.endswith("lora_dropout"):
            module["reference"] = torch.nn.Dropout(0.3).train()


def test_dropout_in_the_policy() -> None:
    backbone = make_backbone(make(), dropout=0.3)
    backbone.model.eval = backbone.model.train
    with pytest.raises(NumberError, match=r"two passes over the same rows give different numbers.*\n.*dropout is on\?"):
        check(backbone, Sft())


def test_the_bare_base_as_reference() -> None:
    backbone = make_backbone(make())
    backbone.alias["reference"] = BASE
    with pytest.raises(NumberError, match=r"where 0 is right\n.*bare base model, without the adapter that"):
        check(backbone, Dpo())


def test_another_adapter_as_reference() -> None:
    backbone = with_reference()
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if "lora_B.reference" in name:
                parameter.add_(0.01)
    with pytest.raises(NumberError, match="the reference has other weights than the policy starts from"):
        check(backbone, Dpo())


def test_stored_values_of_other_tokens() -> None:
    """A roll within a response keeps its sum: only the tokens tell."""
    backbone = make_backbone(make())
    trees = stored(backbone, TREES)
    shifted = [tree._replace(reference=tuple(np.roll(values, 1) for values in tree.reference or ())) for tree in trees]
    with pytest.raises(NumberError, match="or its values belong to other tokens"):
        check(backbone, Dpo(), shifted)


def _change(field: str, value: Callable[[Batch], torch.Tensor]) -> Callable[[Batch], Batch]:
    return lambda batch: dataclasses.replace(batch, **{field: value(batch)})


FAULTS = {
    "positions that restart at the response": _change("positions", lambda batch: batch.positions * (batch.branch == 0)),
    "positions that count through the row": _change(
        "positions", lambda batch: torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
    ),
    "a loss mask that is shifted by one": _change("source", lambda batch: (batch.source - 1).clamp(min=0)),
    "targets of the next token": _change("target", lambda batch: batch.target.roll(1)),
    "branches that see each other": _change("branch", lambda batch: batch.branch.clamp(max=1)),
    "trees that see each other": _change("tree", lambda batch: batch.tree * 0),
}


@pytest.mark.parametrize("role", ["policy", "reward"])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_masks_and_positions(fault: str, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if role == "reward" and ("mask" in fault or "targets" in fault):
        pytest.skip("a score has neither a loss mask nor targets")
    backbone = make_backbone(make(), attention="sdpa", role=role)
    build = backbone_module.build_batch
    monkeypatch.setattr(backbone_module, "build_batch", lambda trees, rows: FAULTS[fault](build(trees, rows)))
    # All trees in one row, or the last fault would have nobody to see.
    backbone.kernel = dataclasses.replace(backbone.kernel, layout="long")
    objective = BradleyTerry() if role == "reward" else Dpo()
    message = r"packed rows and single ones give different numbers, by up to .*\n.*the mask, the positions or the targets"
    with pytest.raises(NumberError, match=message):
        check_start(Passes(backbone, 4096, ALONE), objective, TREES, reference_is_start=False)


def test_a_score_read_at_another_token(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_backbone(make(), role="reward")
    build = backbone_module.build_batch
    shift = _change("last", lambda batch: batch.last - 1)
    monkeypatch.setattr(backbone_module, "build_batch", lambda trees, rows: shift(build(trees, rows)))
    with pytest.raises(NumberError, match="packed rows and single ones give different numbers"):
        check(backbone, BradleyTerry())
