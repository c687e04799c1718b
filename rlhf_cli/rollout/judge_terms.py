"""Language models that judge as terms of a reward: behind an endpoint, or local."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from rlhf_cli import sections
from rlhf_cli.data.records import plain_prompt, prompt_lines
from rlhf_cli.data.templates import Template, read_chat_format
from rlhf_cli.errors import UsageError, prefixed
from rlhf_cli.files import sha256_file
from rlhf_cli.judges.asking import Verdicts, prepare
from rlhf_cli.judges.judge import Judge, compare, score
from rlhf_cli.judges.local import LocalJudge, read_options
from rlhf_cli.judges.question import Mode, Question, address, read_wording
from rlhf_cli.models.load import is_reward_model, load_config, load_tokenizer, positions_of
from rlhf_cli.models.placement import FrozenModels
from rlhf_cli.ranks import Ranks
from rlhf_cli.recipe.stages import TRAINING_STAGES
from rlhf_cli.rollout.rewards import Answers, PolicyText, RewardTerm
from rlhf_cli.runs.manifest import Parent
from rlhf_cli.runs.parents import Start, base_model, recorded_template, resolve_start
from rlhf_cli.signals import Pause

MIDDLE, REACH = 5.5, 4.5
"""A score s from 1 to 10 is the reward (s − MIDDLE)/REACH, from −1 to 1."""


@dataclass(frozen=True)
class LocalModel:
    """A local judge before its weights are loaded."""

    start: Start
    base: str | None  # hash of its weights; None: on the hub, and not fetched by --check
    tokenizer: Any
    template: Template
    positions: int | None
    place: str

    @classmethod
    def find(cls, settings: sections.Judge, place: str, *, trust_remote_code: bool, check: bool) -> Self:
        """UsageError: it cannot be told what `path` names, or it is a reward model."""
        assert settings.path is not None
        start = resolve_start(settings.path, None, place, stages=TRAINING_STAGES)
        with prefixed(place):
            if is_reward_model(str(start.adapter or start.base), start.revision):
                raise UsageError(f"{settings.path} is a reward model: it scores answers and writes none. name a language model")
            tokenizer = load_tokenizer(start.tokenizer, start.revision, trust_remote_code)
            positions = positions_of(load_config(start.base, start.revision, trust_remote_code))
        template = recorded_template(start, tokenizer, settings.path, place)
        base = base_model(start).weights_hash if not check or Path(start.base).exists() else None
        return cls(start, base, tokenizer, template, positions, place)

    @property
    def identity(self) -> str:
        """Hashes of its weights, as JSON."""
        return json.dumps([self.base, self.start.adapter_hash])

    def load(self, settings: sections.Judge, mode: Mode, models: FrozenModels, role: str, budget: int) -> LocalJudge:
        """Its weights are loaded only where the role has none yet."""
        if role not in models.hosts:
            models.add(role, self.start)
        form, wording = read_chat_format(self.tokenizer, self.template), read_wording(settings, mode, self.place)
        options = read_options(form, wording, self.place)
        return LocalJudge(models.hosts[role], role, form, options, wording, budget, self.positions, self.place)


def find_judge(settings: sections.Judge, mode: Mode, place: str, *, trust_remote_code: bool, check: bool) -> LocalModel | None:
    """The local model that judges; None: an endpoint. Nothing is sent or loaded. UsageError: one of its parts cannot be used."""
    if settings.path is None:
        prepare(settings, mode, place, lambda: Verdicts(Path()))
        return None
    local = LocalModel.find(settings, place, trust_remote_code=trust_remote_code, check=check)
    read_options(read_chat_format(local.tokenizer, local.template), read_wording(settings, mode, place), place)
    return local


@dataclass(frozen=True)
class JudgeTerm(RewardTerm):
    """How good a judge finds a response, or how probably better than the prompt's other responses."""

    settings: sections.Judge
    mode: Mode
    local: LocalModel | None
    folder: Path
    pause: Pause

    kind: ClassVar[str] = "term"

    @classmethod
    def find(cls, reward: sections.Reward, name: str, place: str, policy: PolicyText) -> Self:
        """UsageError: its files, its endpoint or its model cannot be used."""
        assert reward.judge is not None
        settings, mode = reward.judge, reward.judge.mode or "score"
        local = find_judge(settings, mode, place, trust_remote_code=policy.trust_remote_code, check=policy.check)
        return cls(name, reward.weight, place, settings, mode, local, policy.folder, policy.pause)

    @property
    def needs_weights(self) -> bool:
        return self.local is not None

    @property
    def compares(self) -> bool:
        return self.mode == "pairwise"

    def verdicts(self) -> Verdicts:
        self.folder.mkdir(parents=True, exist_ok=True)
        return Verdicts(self.folder / "verdicts.jsonl")

    def load(self, models: FrozenModels, role: str, budget: int) -> JudgeScorer:
        if self.local is not None:
            asked: Judge = self.local.load(self.settings, self.mode, models, role, budget)
            return JudgeScorer(self.name, self.weight, self.mode, True, lambda: asked)
        return JudgeScorer(self.name, self.weight, self.mode, False, self._opened)

    def _opened(self) -> Judge:
        verdicts = self.verdicts()
        return prepare(self.settings, self.mode, self.place, lambda: verdicts, pause=self.pause)

    @property
    def source(self) -> dict[str, Any]:
        asked: dict[str, Any] = {"model": sections.as_written(self.settings.model)}
        if self.local is not None:
            start = self.local.start
            asked = {"path": str(start.adapter or start.base), "base": self.local.base}
            asked |= {"adapter": start.adapter_hash}
            asked |= self._files  # what an evaluation keeps of it was said in these words
        return {"judge": asked | {"mode": self.mode, "draws": self.settings.draws}}

    @property
    def record(self) -> dict[str, Any]:
        """With the address, which may change while a run is stopped."""
        where = {"endpoint": address(self.settings)} if self.local is None else {}
        return self.identity | {"judge": where | self.source["judge"]}

    @property
    def code(self) -> dict[str, str]:
        return self._files if self.local is None else {}

    @property
    def _files(self) -> dict[str, str]:
        return {f"judge {path}": sha256_file(Path(path)) for path in (self.settings.prompt, self.settings.principles) if path}

    @property
    def words(self) -> str:
        how = "scores each response from 1 to 10, as (s − 5.5)/4.5"
        if self.mode == "pairwise":
            how = "compares each response with the others to its prompt, in both orders"
        return f"{how}; what it says is kept in verdicts.jsonl" if self.local is None else how

    @property
    def parent(self) -> Parent | None:
        return self.local.start.parent if self.local else None


@dataclass(frozen=True)
class JudgeScorer:
    """A judge that can be asked."""

    name: str
    weight: float
    mode: Mode
    needs_weights: bool
    open: Callable[[], Judge] = field(repr=False)

    @cached_property
    def judge(self) -> Judge:
        """Opened when it is first asked."""
        return self.open()

    @property
    def beside(self) -> tuple[str, ...]:
        return ("contradicting",) if self.mode == "pairwise" else ()

    def score(self, answers: Answers) -> np.ndarray:
        """(M,) from −1 to 1; or (2, M) P(better), a mean over the prompt's others, and the share of contradictions in it.

        A response that is alone gets NaN. RunError: there is no answer.
        """
        prompts = [prompt_lines(plain_prompt(record.prompt)) for record in answers.records]
        if self.mode == "score":
            questions = [Question(p, text) for p, texts in zip(prompts, answers.texts, strict=True) for text in texts]
            return (score(self.judge, questions) - MIDDLE) / REACH if questions or self.needs_weights else np.zeros(0)
        starts = np.cumsum([0, *map(len, answers.texts)])
        pairs = [
            (int(start) + i, int(start) + j)
            for start, texts in zip(starts, answers.texts, strict=False)
            for i, j in combinations(range(len(texts)), 2)
        ]
        flat = [(p, text) for p, texts in zip(prompts, answers.texts, strict=True) for text in texts]
        found = compare(self.judge, [Question(flat[i][0], flat[i][1], flat[j][1]) for i, j in pairs])
        sums = np.zeros((3, len(flat)))
        for (i, j), p, contradicts in zip(pairs, found.probability, found.contradicting, strict=True):
            sums[:, i] += p, contradicts, 1
            sums[:, j] += 1 - p, contradicts, 1
        means: np.ndarray = np.divide(sums[:2], sums[2], out=np.full((2, len(flat)), np.nan), where=sums[2] > 0)
        return means

    def score_rows(self, rows: Answers, ranks: Ranks) -> list[np.ndarray]:
        """By texts, on rank 0 alone where a server is asked."""
        own = np.atleast_2d(self.score(rows))[0]
        return np.split(own, np.cumsum([len(texts) for texts in rows.texts])[:-1])
