"""Reward models as terms of a reward: which model a recipe names, how it reads answers, and what its scores are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np

from rlhf_cli import sections
from rlhf_cli.data.encode import AS_DRAWN, encode
from rlhf_cli.data.records import Record
from rlhf_cli.data.templates import ChatFormat, Template, read_chat_format, tokenise
from rlhf_cli.data.trees import Tree, located, span
from rlhf_cli.errors import UsageError, prefixed
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.load import is_reward_model, load_config, load_tokenizer, positions_of
from rlhf_cli.models.passes import parts, score_responses
from rlhf_cli.models.placement import FrozenModels, Head
from rlhf_cli.objectives.reward import member_role
from rlhf_cli.ranks import Ranks
from rlhf_cli.recipe.stages import REWARD_STAGES, TRAINING_STAGES
from rlhf_cli.rollout.ensembles import AS_THEY_ARE, Combine, Scale, as_one, centred, combine, flat, in_words, normalised
from rlhf_cli.rollout.rewards import Answers, DenseScorer, PolicyText, RewardTerm, check_finite
from rlhf_cli.runs.manifest import BaseModel, Parent
from rlhf_cli.runs.parents import Start, base_model, recorded_template, resolve_start

RECORDED = " or ".join(REWARD_STAGES)
"""The stage whose manifests record the mean and the standard deviation of a reward model's scores."""


EACH = "sum"
AGGREGATES: Mapping[str, Any] = {"min": np.min, "prod": np.prod, "last": lambda own: own[-1], "mean": np.mean, EACH: np.sum}
"""What the probabilities (S,) of a response's steps make of it; EACH: every step is worth something where it ends."""


@dataclass(frozen=True)
class RewardModel(RewardTerm):
    """A run of train-rm, a checkpoint or the model of one, or a sequence classifier with one label."""

    start: Start
    base: BaseModel | None  # None: on the hub, and not fetched by --check
    members: tuple[Start, ...]  # of an ensemble, else itself
    scales: tuple[Scale, ...]  # of each
    combine: Combine
    tokenizer: Any
    template: Template
    reader: Reader
    aggregate: str  # of AGGREGATES: what a process reward model makes of steps

    kind: ClassVar[str] = "reward model"

    @property
    def needs_weights(self) -> bool:
        return True

    @classmethod
    def find(cls, reward: sections.Reward, name: str, place: str, policy: PolicyText) -> Self:
        """What `reward.model` names.

        UsageError: it cannot be told what it names, it is a policy, its base has changed, `normalize` has no figures, or
            `combine` nothing to combine.
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
        members = tuple(start.members or [start])
        if reward.combine is not None and len(members) == 1:
            raise UsageError(f"{place}: combine: {reward.model} is a single reward model, without members; remove combine")
        scales = _scales(start, reward, place)
        with prefixed(place):
            tokenizer = load_tokenizer(start.tokenizer, start.revision, policy.trust_remote_code)
        same = serialised(tokenizer) == serialised(policy.tokenizer)
        # No run recorded a template and the tokenizer has none, like a checkpoint of a run with `chat_template: none`.
        unknown = start.template_hash is None and not tokenizer.chat_template
        template = policy.template if same and unknown else recorded_template(start, tokenizer, reward.model, place)
        base = base_model(start) if not policy.check or Path(start.base).exists() else None
        if base is not None:
            with prefixed(place):
                _ = [member.head for member in members]
        positions = positions_of(load_config(start.base, start.revision, policy.trust_remote_code))
        same = same and template.hash == policy.template.hash
        reader = Reader(place, positions, read_chat_format(tokenizer, template), same)
        of_members = members, scales, reward.combine or "mean"
        aggregate = EACH if reward.per_step else reward.aggregate or "min"
        return cls(name, reward.weight, place, start, base, *of_members, tokenizer, template, reader, aggregate)

    def load(self, models: FrozenModels, role: str, budget: int) -> RewardModelScorer:
        """Its weights are loaded only where the role has none yet. UsageError: they do not fit."""
        roles = tuple(member_role(role, member) for member in range(len(self.members)))
        for own, member in zip(roles, self.members, strict=True):
            if own not in models.hosts:
                models.add(own, member, head=True)
        settings = (roles, self.scales, self.combine, budget, self.reader, self.start.tau)
        kind, of_steps = StepScorer if self.aggregate == EACH else RewardModelScorer, (self.start.separator, self.aggregate)
        return kind(self.name, self.weight, models.hosts[role], *settings, self.tokenizer, *of_steps)

    @property
    def compares(self) -> bool:
        return self.start.tau is not None

    @property
    def reads(self) -> Literal["tokens", "text"]:
        """The policy's own tokens, or their text in its own tokens and chat template."""
        return "tokens" if self.reader.same else "text"

    @property
    def source(self) -> dict[str, Any]:
        means, stds = zip(*self.scales, strict=True)
        figures: dict[str, Any] = {"mean": means[0], "std": stds[0]}
        if len(self.members) > 1:
            how = vars(self.combine) if isinstance(self.combine, sections.Bound) else self.combine
            figures = {"mean": list(means), "std": list(stds), "combine": how}
        if self.compares:
            figures = {"tau": self.start.tau}
        if self.start.separator is not None:
            figures = {"separator": self.start.separator, "aggregate": self.aggregate}
        return {
            "model": str(self.start.adapter or self.start.base),
            "base": self.base.weights_hash if self.base else None,
            "adapter": self.start.adapter_hash,
            **figures,
            "reads": self.reads,
        }

    @property
    def words(self) -> str:
        (mean, std), *more = self.scales
        scores = "as they are" if self.scales[0] == AS_THEY_ARE else f"less {mean:.4g}, over {std:.4g}"
        if more:
            each = "as it is" if self.scales[0] == AS_THEY_ARE else "less its own mean and over its deviation"
            scores = f"of {len(self.scales)} members, each {each}: their {in_words(self.combine)}"
        if self.compares:
            scores = "are the probability to be preferred, a mean over the prompt's other responses"
        if self.start.separator is not None:
            how = "each where its step ends, so that more get more" if self.aggregate == EACH else self.aggregate
            scores = f"are the probabilities that steps are right: {how}"
        return f"scores {scores}; it reads the policy's {self.reads}"

    @property
    def parent(self) -> Parent | None:
        return self.start.parent

    @property
    def text_form(self) -> tuple[Any, Template]:
        return self.tokenizer, self.template

    def value_start(self) -> tuple[Start, Head] | None:
        """weight · (r − mean)/std, of a model that scores and reads the policy's tokens; of an ensemble its first member."""
        if self.reads != "tokens" or self.compares or self.start.separator is not None:
            return None
        mean, std = self.scales[0]
        return self.start, Head(self.start.head * (self.weight / std), -mean * (self.weight / std))


@dataclass(frozen=True)
class RewardModelScorer:
    """A reward model with its weights, or several members on one base: scores at a response's last token, normalised."""

    name: str
    weight: float
    backbone: Backbone
    roles: tuple[str, ...]  # of each member; one of a single model
    scales: tuple[Scale, ...]
    combine: Combine
    budget: int  # tokens of one forward pass
    reader: Reader
    tau: float | None = None  # of a general preference model
    tokenizer: Any = None  # its own
    separator: str | None = None
    aggregate: str = "min"

    needs_weights: ClassVar[bool] = True

    @property
    def beside(self) -> tuple[str, ...]:
        return ("disagreement",) if len(self.roles) > 1 else ()

    def score(self, answers: Answers) -> np.ndarray:
        """(M,) float64, tree by tree; of members (2, M), what they make together and the deviation over them.

        Of a model that compares the mean probability to be preferred to the prompt's other responses, of which there are some.

        UsageError: the model cannot read an answer.
        NumberError: a score is not finite.
        """
        if self.tau is not None:
            trees = self.reader(answers) if answers.records else []
            tables = [1 / (1 + np.exp(-s)) for s in self._compared(trees, None)]
            wins = flat([(own.sum(1) - 0.5) / (len(own) - 1) for own in tables])  # ½ is a response's against itself
            check_finite(wins, answers.pairs, f"{self.reader.place}: reward model {self.name}")
            return wins
        scores = self.of_members(answers)
        return scores[0] if len(scores) == 1 else np.stack((combine(scores, self.combine), scores.std(0)))

    def of_members(self, answers: Answers) -> np.ndarray:
        """(K, M) normalised scores of the K members; see `score`."""
        raw = self._raw(self.reader(answers) if answers.trees else [], None)
        for scores in raw:
            check_finite(scores, answers.pairs, f"{self.reader.place}: reward model {self.name}")
        return normalised(raw, self.scales)

    def _raw(self, trees: list[Tree], ranks: Ranks | None) -> np.ndarray:
        """(K, M) scores; the trees are in the model's own tokens, and of `ranks` each scores its share."""
        if self.separator is not None:
            return np.array([[*map(AGGREGATES[self.aggregate], self.of_steps(trees, ranks))]], np.float64)
        found = (score_responses(self.backbone.at(role), role, trees, self.budget, ranks) for role in self.roles)
        return np.stack([*map(flat, found)])

    def _compared(self, trees: list[Tree], ranks: Ranks | None) -> list[np.ndarray]:
        """s of every two responses, (K, K)."""
        return score_responses(self.backbone.at(self.roles[0]), self.roles[0], trees, self.budget, ranks, self.tau)

    def of_steps(self, trees: list[Tree], ranks: Ranks | None) -> list[np.ndarray]:
        """(S,) probabilities that the steps of every response are right, tree by tree."""
        (role,), known = self.roles, [located(tree, self.tokenizer, self.separator) for tree in trees]
        logits = flat(score_responses(self.backbone.at(role), role, known, self.budget, ranks))
        return parts(np.exp(-np.logaddexp(0, -logits)), [len(own) for tree in known for own in tree.facts.ends or ()])

    def score_rows(self, rows: Answers, ranks: Ranks) -> list[np.ndarray]:
        if self.tau is not None:
            return self._compared(rows.trees, ranks)
        raw = self._raw(rows.trees, ranks)
        scores = raw[0] if len(raw) == 1 else as_one(raw, self.scales, self.combine)
        return parts(scores, [len(tree.responses) for tree in rows.trees])


@dataclass(frozen=True)
class StepScorer(DenseScorer, RewardModelScorer):
    """A process reward model each of whose steps is worth something where it ends."""

    def parts(self, answers: Answers) -> list[np.ndarray]:
        found = self.of_steps(self.reader(answers) if answers.trees else [], None)
        check_finite(np.array([own.sum() for own in found]), answers.pairs, f"{self.reader.place}: reward model {self.name}")
        return found


def centred_scores(scorers: Sequence[RewardModelScorer], answers: Answers) -> np.ndarray:
    """(M, K) normalised scores of all members of some models, each centred over the responses of every prompt."""
    return centred(np.concatenate([scorer.of_members(answers) for scorer in scorers]), [*map(len, answers.texts)])


@dataclass(frozen=True)
class Reader:
    """How a reward model reads answers: the policy's own tokens, or their text in its tokens and its chat template."""

    place: str  # begins every message
    positions: int | None  # tokens that it can take at most, where it has such a limit
    form: ChatFormat  # its tokenizer and template
    same: bool = False  # as the policy's, whose tokens it reads where there are some

    def __call__(self, answers: Answers) -> list[Tree]:
        """Trees of the same prompts and responses, in the same order.

        UsageError: one is longer than what the model can take, or its chat template cannot write it.
        """
        trees = answers.trees if not answers.records or (self.same and answers.trees) else self._rewritten(self.form, answers)
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


def recorded_scales(start: Start) -> tuple[Scale, ...]:
    """Mean and deviation of the scores of a model, or of each member, as its run recorded them; as they are where none did."""
    if start.manifest is None:
        return (AS_THEY_ARE,) * max(1, len(start.members))
    card = start.manifest["reward_model"]
    return tuple(Scale(own["score_mean"], own["score_std"]) for own in card.get("members") or [card])


def _scales(start: Start, reward: sections.Reward, place: str) -> tuple[Scale, ...]:
    """What its scores, or its members', are normalised with.

    UsageError: `normalize: true` without figures, or a deviation of 0; keys that are for steps, or not for them.
    """
    if start.separator is None and (reward.aggregate is not None or reward.per_step):
        raise UsageError(f"{place}: {reward.model} scores no steps, so aggregate and per_step have no effect. remove them")
    if start.tau is not None or start.separator is not None:
        if reward.normalize is not None:
            raise UsageError(f"{place}: normalize has no effect on {reward.model}, which gives probabilities. remove it")
        return (AS_THEY_ARE,)
    if start.manifest is None and reward.normalize:
        raise UsageError(
            f"{place}: normalize: {reward.model} records no mean and deviation of its scores; set normalize: false, "
            f"or name the folder of a run of {RECORDED}"
        )
    scales = recorded_scales(start)
    if reward.normalize is False:
        return (AS_THEY_ARE,) * len(scales)
    if any(scale.std == 0 for scale in scales):
        raise UsageError(
            f"{place}: {reward.model} gives every response the same score (its recorded deviation is 0): train it for longer, "
            "or set normalize: false"
        )
    return scales


def serialised(tokenizer: Any) -> tuple[str, str | None, str]:
    """All that decides which tokens it makes of a text, and how a text ends."""
    tokenise(tokenizer, [""])  # forgets padding and truncation left from other calls, which are part of the serialisation
    return tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token, tokenizer.eos_token
