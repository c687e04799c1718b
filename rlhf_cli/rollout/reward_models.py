"""Reward models that a recipe names: what they are and how they read, before any weights are loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_cli import sections
from rlhf_cli.data.templates import Template, choose_template, read_format, tokenise
from rlhf_cli.errors import UsageError
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.load import is_classifier, load_config, load_tokenizer, local_folder, read_head
from rlhf_cli.recipe.stages import REWARD_STAGES, TRAINING_STAGES
from rlhf_cli.rollout.rewards import ModelTerm, Reader
from rlhf_cli.runs.manifest import BaseModel, weights_hash
from rlhf_cli.runs.parents import Start, base_model, resolve_start

RECORDED = " or ".join(REWARD_STAGES)
"""The stage whose manifests record the mean and the standard deviation of a reward model's scores."""

POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names under which configurations keep the longest sequence; models without one of them have no limit."""


@dataclass(frozen=True)
class FoundRewardModel:
    """A reward model before its weights are loaded."""

    name: str
    start: Start
    base: BaseModel | None  # None: on the hub, and not fetched by --check
    mean: float  # of its scores, taken off them; 0 and a deviation of 1 where they are used as they are
    std: float
    tokenizer: Any
    template: Template
    reader: Reader

    @property
    def reads(self) -> Literal["tokens", "text"]:
        """The policy's own tokens, or their text in its own tokens and chat template."""
        return "tokens" if self.reader.form is None else "text"

    @property
    def record(self) -> dict[str, Any]:
        """What identifies it, in the manifest and when a run is resumed, and how its scores are made."""
        return {
            "model": str(self.start.adapter or self.start.base),
            "base": self.base.weights_hash if self.base else None,
            "adapter": weights_hash(self.start.adapter) if self.start.adapter else None,
            "mean": self.mean,
            "std": self.std,
            "reads": self.reads,
        }

    def term(self, weight: float, backbone: Backbone, role: str, budget: int) -> ModelTerm:
        """The term of the reward, once its weights are the role's."""
        return ModelTerm(self.name, weight, backbone, role, self.mean, self.std, budget, self.reader)


def find_reward_model(
    reward: sections.Reward,
    name: str,
    place: str,
    *,
    tokenizer: Any,
    template: Template,
    trust_remote_code: bool,
    check: bool,
) -> FoundRewardModel:
    """What `reward.model` names; `tokenizer` and `template` are the policy's, `place` begins every message.

    A run of train-rm, a checkpoint or the model of one, or a sequence classifier with one label. `check`: a hub model is not
    fetched.

    Raises:
        UsageError: it cannot be told what it names, it is a policy, its base has changed, or `normalize` has no figures.
        MachineError: a hub id that cannot be reached.
    """
    assert reward.model is not None
    start = resolve_start(reward.model, reward.revision, place, stages=TRAINING_STAGES)
    _refuse_policy(start, reward.model, place, trust_remote_code)
    mean, std = _figures(start, reward, place)
    try:
        own = load_tokenizer(start.tokenizer, start.revision, trust_remote_code)
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from error
    same = _same_tokenizer(own, tokenizer)
    chosen = template if same and _unknown_template(start, own) else recorded_template(start, own, reward.model, place)
    base = base_model(start) if not check or Path(start.base).exists() else None
    if base is not None:
        _check_head(start, place)
    config = load_config(start.base, start.revision, trust_remote_code).get_text_config().to_dict()
    positions = next((int(config[key]) for key in POSITION_KEYS if config.get(key)), None)
    return FoundRewardModel(
        name=name,
        start=start,
        base=base,
        mean=mean,
        std=std,
        tokenizer=own,
        template=chosen,
        reader=Reader(place, positions, None if same and chosen.hash == template.hash else read_format(own, chosen)),
    )


def _refuse_policy(start: Start, path: str, place: str, trust_remote_code: bool) -> None:
    remedy = f"a reward is judged by a run of {RECORDED}, or by a sequence classifier with one label"
    if start.manifest is not None and start.manifest["stage"] not in REWARD_STAGES:
        raise UsageError(f"{place}: {path} is a run of {start.manifest['stage']}, a policy and not a reward model; {remedy}")
    if not is_reward_model(start, place, trust_remote_code):
        raise UsageError(f"{place}: {path} is a language model, a policy and not a reward model; {remedy}")


def is_reward_model(start: Start, place: str, trust_remote_code: bool) -> bool:
    if start.adapter is not None:
        return bool(json.loads((start.adapter / "adapter_config.json").read_text()).get("task_type") == "SEQ_CLS")
    try:
        return is_classifier(start.base, start.revision, trust_remote_code)
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from error


def _check_head(start: Start, place: str) -> None:
    try:
        read_head(start.adapter or local_folder(start.base, start.revision))
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from error


def _figures(start: Start, reward: sections.Reward, place: str) -> tuple[float, float]:
    """(mean, standard deviation) that its scores are normalised with; (0, 1) where they are not.

    Raises:
        UsageError: `normalize: true` without figures, or a deviation of 0.
    """
    if start.manifest is None:
        if reward.normalize:
            raise UsageError(
                f"{place}: normalize: {reward.model} records no mean and deviation of its scores; set normalize: false, "
                f"or name the folder of a run of {RECORDED}"
            )
        return 0.0, 1.0
    if reward.normalize is False:
        return 0.0, 1.0
    card = start.manifest["reward_model"]
    if card["score_std"] == 0:
        raise UsageError(
            f"{place}: {reward.model} gives every response the same score (its recorded deviation is 0): train it for longer, "
            "or set normalize: false"
        )
    return card["score_mean"], card["score_std"]


def _same_tokenizer(one: Any, other: Any) -> bool:
    """Do both make the same tokens of every text, and end it with the same one?"""
    return serialised(one) == serialised(other)


def serialised(tokenizer: Any) -> tuple[str, str | None, str]:
    """All that decides which tokens it makes of a text, and how a text ends."""
    tokenise(tokenizer, [""])  # forgets padding and truncation left from other calls, which are part of the serialisation
    return tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token, tokenizer.eos_token


def _unknown_template(start: Start, tokenizer: Any) -> bool:
    """No run recorded it and the tokenizer has none, like a checkpoint of a run with `chat_template: none`."""
    return start.template_hash is None and not tokenizer.chat_template


def recorded_template(start: Start, tokenizer: Any, path: str, place: str) -> Template:
    """The chat template that a model was trained with.

    Raises:
        UsageError: its tokenizer has another one.
    """
    try:
        own = choose_template(tokenizer, None)
    except UsageError as error:
        raise UsageError(f"{place}: {path}: {error}") from error
    if start.template_hash in (None, own.hash):
        return own
    without = choose_template(tokenizer, "none")
    if start.template_hash == without.hash:
        return without
    raise UsageError(f"{place}: {path} was trained with another chat template than its tokenizer has; train it again")
