"""Reward models as terms of a reward: which model a recipe names, how it reads answers, and what its scores are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from rlhf_cli import sections
from rlhf_cli.data.encode import AS_DRAWN, encode
from rlhf_cli.data.records import Record
from rlhf_cli.data.templates import ChatFormat, Template, read_chat_format, tokenise
from rlhf_cli.data.trees import Tree, span
from rlhf_cli.errors import UsageError, prefixed
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.load import is_reward_model, load_config, load_tokenizer, positions_of
from rlhf_cli.models.passes import score_responses
from rlhf_cli.models.placement import FrozenModels, Head
from rlhf_cli.ranks import Ranks
from rlhf_cli.recipe.stages import REWARD_STAGES, TRAINING_STAGES
from rlhf_cli.rollout.rewards import Answers, PolicyText, RewardTerm, check_finite
from rlhf_cli.runs.manifest import BaseModel, Parent, weights_hash
from rlhf_cli.runs.parents import Start, base_model, recorded_template, resolve_start

RECORDED = " or ".join(REWARD_STAGES)
"""The stage whose manifests record the mean and the standard deviation of a reward model's scores."""


@dataclass(frozen=True)
class RewardModel(RewardTerm):
    """A run of train-rm, a checkpoint or the model of one, or a sequence classifier with one label."""

    start: Start
    base: BaseModel | None  # None: on the hub, and not fetched by --check
    mean: float  # of its scores, taken off them; 0 and a deviation of 1 where they are used as they are
    std: float
    tokenizer: Any
    template: Template
    reader: Reader

    kind: ClassVar[str] = "reward model"

    @property
    def needs_weights(self) -> bool:
        return True

    @classmethod
    def find(cls, reward: sections.Reward, name: str, place: str, policy: PolicyText) -> Self:
        """What `reward.model` names.

        UsageError: it cannot be told what it names, it is a policy, its base has changed, or `normalize` has no figures.
        MachineError: a hub id that cannot be reached.
        """
        assert reward.model is not None
        start = resolve_start(reward.model, reward.revision, place, stages=TRAINING_STAGES)
        remedy = f"a reward is judged by a run of {RECORDED}, or by a sequence classifier with one label"
        if start.manifest is not None and start.manifest["stage"] not in REWARD_STAGES:
            stage = start.manifest["stage"]
            raise UsageError(f"{place}: {reward.model} is a run of {stage}, a policy and not a reward model; {remedy}")
        with prefixed(place):
            scores = is_reward_model(str(start.adapter or start.base), start.revision)
        if not scores:
            raise UsageError(f"{place}: {reward.model} is a language model, a policy and not a reward model; {remedy}")
        mean, std = _figures(start, reward, place)
        with prefixed(place):
            tokenizer = load_tokenizer(start.tokenizer, start.revision, policy.trust_remote_code)
        same = serialised(tokenizer) == serialised(policy.tokenizer)
        # No run recorded a template and the tokenizer has none, like a checkpoint of a run with `chat_template: none`.
        unknown = start.template_hash is None and not tokenizer.chat_template
        template = policy.template if same and unknown else recorded_template(start, tokenizer, reward.model, place)
        base = base_model(start) if not policy.check or Path(start.base).exists() else None
        if base is not None:
            with prefixed(place):
                _ = start.head
        positions = positions_of(load_config(start.base, start.revision, policy.trust_remote_code))
        form = None if same and template.hash == policy.template.hash else read_chat_format(tokenizer, template)
        reader = Reader(place, positions, form)
        return cls(name, reward.weight, place, start, base, mean, std, tokenizer, template, reader)

    def load(self, models: FrozenModels, role: str, budget: int) -> RewardModelScorer:
        """Its weights are loaded only where the role has none yet. UsageError: they do not fit."""
        if role not in models.hosts:
            models.add(role, self.start, head=True)
        return RewardModelScorer(self.name, self.weight, models.hosts[role], role, self.mean, self.std, budget, self.reader)

    @property
    def reads(self) -> Literal["tokens", "text"]:
        """The policy's own tokens, or their text in its own tokens and chat template."""
        return "tokens" if self.reader.form is None else "text"

    @property
    def source(self) -> dict[str, Any]:
        return {
            "model": str(self.start.adapter or self.start.base),
            "base": self.base.weights_hash if self.base else None,
            "adapter": weights_hash(self.start.adapter) if self.start.adapter else None,
            "mean": self.mean,
            "std": self.std,
            "reads": self.reads,
        }

    @property
    def words(self) -> str:
        scores = "as they are" if (self.mean, self.std) == (0, 1) else f"less {self.mean:.4g}, over {self.std:.4g}"
        return f"scores {scores}; it reads the policy's {self.reads}"

    @property
    def parent(self) -> Parent | None:
        return self.start.parent

    @property
    def text_form(self) -> tuple[Any, Template]:
        return self.tokenizer, self.template

    def value_start(self) -> tuple[Start, Head] | None:
        """weight · (r − mean)/std, of a model that reads the policy's tokens."""
        if self.reads != "tokens":
            return None
        scale = self.weight / self.std
        return self.start, Head(self.start.head * scale, -self.mean * scale)


@dataclass(frozen=True)
class RewardModelScorer:
    """A reward model with its weights: its score at a response's last token, less `mean` and over `std`."""

    name: str
    weight: float
    backbone: Backbone
    role: str
    mean: float  # 0 and 1: scores as they are
    std: float
    budget: int  # tokens of one forward pass
    reader: Reader

    needs_weights: ClassVar[bool] = True
    beside: ClassVar[tuple[str, ...]] = ()

    def score(self, answers: Answers) -> np.ndarray:
        """(M,) float64, tree by tree.

        UsageError: the model cannot read an answer.
        NumberError: a score is not finite.
        """
        trees = self.reader(answers) if answers.trees else []
        scores = np.concatenate([np.zeros(0), *score_responses(self.backbone.at(self.role), self.role, trees, self.budget, None)])
        check_finite(scores, answers.pairs, f"{self.reader.place}: reward model {self.name}")
        normalised: np.ndarray = (scores - self.mean) / self.std
        return normalised

    def score_rows(self, rows: Answers, ranks: Ranks) -> list[np.ndarray]:
        """The trees are in the model's own tokens; each rank scores its share."""
        return score_responses(self.backbone.at(self.role), self.role, rows.trees, self.budget, ranks)


@dataclass(frozen=True)
class Reader:
    """How a reward model reads answers: the policy's own tokens, or their text in its tokens and its chat template."""

    place: str  # begins every message
    positions: int | None  # tokens that it can take at most, where it has such a limit
    form: ChatFormat | None  # its tokenizer and template; None: it reads the policy's tokens

    def __call__(self, answers: Answers) -> list[Tree]:
        """Trees of the same prompts and responses, in the same order.

        UsageError: one is longer than what the model can take, or its chat template cannot write it.
        """
        trees = self._rewritten(self.form, answers) if self.form is not None and answers.records else answers.trees
        for tree, record in zip(trees, answers.records, strict=True):
            if self.positions is not None and span(tree) > self.positions:
                raise UsageError(
                    f"{self.place}: {record.where}: prompt and response have {span(tree)} tokens, the reward model takes "
                    f"{self.positions}\nlower max_length, or name another reward model"
                )
        return trees

    def _rewritten(self, form: ChatFormat, answers: Answers) -> list[Tree]:
        records = [
            Record(record.prompt, tuple(texts), record.where, given=record.given)
            for record, texts in zip(answers.records, answers.texts, strict=True)
        ]
        try:
            encoded = encode(records, form.tokenizer, form.template, AS_DRAWN, responses="all", cache=None)
        except UsageError as error:
            raise UsageError(f"{self.place}: the reward model's text: {error}") from error
        if encoded.kept < encoded.read:
            raise UsageError(f"{self.place}: the reward model's text: {encoded.examples[0]}")
        ends = ([*tokenise(form.tokenizer, [form.close])[0], *form.end_ids], [*form.end_ids], [form.eos_id])
        return [
            tree._replace(
                responses=tuple(
                    response if ended else _without_end(response, ends)
                    for response, ended in zip(tree.responses, own, strict=True)
                )
            )
            for tree, own in zip(encoded.trees, answers.ended, strict=True)
        ]


def _without_end(response: np.ndarray, ends: Sequence[Sequence[int]]) -> np.ndarray:
    """A response that was cut off, as it was drawn; an empty one keeps its end, for a score is read at some token."""
    for end in ends:
        if len(end) < len(response) and response[-len(end) :].tolist() == list(end):
            return response[: -len(end)]
    return response


def _figures(start: Start, reward: sections.Reward, place: str) -> tuple[float, float]:
    """(mean, standard deviation) that its scores are normalised with; (0, 1) where they are not.

    UsageError: `normalize: true` without figures, or a deviation of 0.
    """
    if start.manifest is None and reward.normalize:
        raise UsageError(
            f"{place}: normalize: {reward.model} records no mean and deviation of its scores; set normalize: false, "
            f"or name the folder of a run of {RECORDED}"
        )
    if start.manifest is None or reward.normalize is False:
        return 0.0, 1.0
    card = start.manifest["reward_model"]
    if card["score_std"] == 0:
        raise UsageError(
            f"{place}: {reward.model} gives every response the same score (its recorded deviation is 0): train it for longer, "
            "or set normalize: false"
        )
    return card["score_mean"], card["score_std"]


def serialised(tokenizer: Any) -> tuple[str, str | None, str]:
    """All that decides which tokens it makes of a text, and how a text ends."""
    tokenise(tokenizer, [""])  # forgets padding and truncation left from other calls, which are part of the serialisation
    return tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token, tokenizer.eos_token
