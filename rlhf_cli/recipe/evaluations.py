"""The recipe of `rlhf eval`, and the sections that it alone has."""

# ruff: noqa: RUF009  (key() only makes a dataclass field)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from rlhf_cli.recipe.recipes import Recipe
from rlhf_cli.sections import EvalSampling, EvalSource, Judge, Match, Reward, key


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation compares, and on which rows."""

    models: dict[str, str] = key(
        help="a path to each name: runs, checkpoints (runs/ppo/checkpoints/*: all of that run), adapters, plain models",
        path=True,
    )
    reference: str | None = key(None, "the name of one of the models: KL and implicit rewards are measured against it")
    prompts: list[EvalSource] | None = key(None, "a path, or a list of sources: responses are drawn and judged")
    preferences: list[EvalSource] | None = key(
        None, "the same: how often reward models, and policies' implicit rewards, agree with the data"
    )
    text: list[EvalSource] | None = key(None, "the same: perplexity of its responses")


@dataclass(frozen=True)
class Winrate:
    """Whose response is better: each model's against the baseline's to the same prompt."""

    baseline: str = key(help="the name of one of the models")
    judge: str | Judge = key("reward", "reward: the score; gold; the name of a term; {endpoint, model}; or {path}")
    all_pairs: bool = key(False, "of a model that is asked: compare every two models, not only each with the baseline")


@dataclass(frozen=True)
class Vote:
    """Responses to a prompt that vote on its answer."""

    match: Match = key(help="how the answer of a response is found, and compared with others and with a column of the row")
    by: list[Literal["majority", "weighted", "best"]] = key(
        ["majority"],
        "majority: what most of them answer, of a tie what comes first; weighted: what most weight stands behind, a response's "
        "weight being its reward; best: what the one with the best reward answers",
    )
    n: list[int] = key([1, 4, 16], "how many responses vote", low=1)


@dataclass(frozen=True)
class CompareAtKl:
    """Gold of two series of models where both are equally far from the reference, at which each of them begins."""

    a: list[str] = key(help="names of models, such as one that stands for the checkpoints of a run: the points of one line")
    b: list[str] = key(help="the same for the line that a is compared with")


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What an evaluation asks of responses."""

    rollout: EvalSampling = field(default_factory=EvalSampling)
    reward: list[Reward] | None = key(
        None, "a list of terms, each one of model, function, match, format, length and judge: [{model: runs/rm}]"
    )
    reward_combine: Literal["sum", "min", "mean_minus_std"] = key("sum", "how the weighted terms make one score")
    gold: list[Reward] | None = key(None, "like reward: what people really want, where that can be computed")
    winrate: Winrate | None = key(None, "compare the models' responses one to one")
    best_of_n: list[int] = key([], "numbers n: over-optimisation of the reference by the best-scored response of n", low=1)
    vote: Vote | None = key(None, "accuracy of the answer that n responses to a prompt agree on")
    compare_at_kl: CompareAtKl | None = key(None, "gold of two series of models, such as two runs' checkpoints, at equal KL")
    beta: float | None = key(None, "of implicit rewards; null: that of each model's own training, else 0.1", low=1e-9)
    dump_pairs: str | None = key(
        None, "a .jsonl file to write: the responses, ranked by the judge, as preference data", path=True
    )


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How an evaluation reads models and rows."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key("auto", "of weights and of compute; auto: bfloat16 on a GPU")
    attention: Literal["auto", "sdpa", "flex", "flash", "eager"] = key("auto", "attention kernel, as in training")
    chat_template: str | None = key(None, "null: each model's own; a Jinja file; none", path=True)
    template_options: dict[str, bool | int | float | str] = key(
        {}, "variables of the chat template, beside those that a model was trained with"
    )
    empty_think: Literal["prompt", "learn"] = key("prompt", "an empty think block of the chat template's own, as in training")
    trust_remote_code: bool = key(False, "run code from model folders; only with --set, never from the file")
    max_length: int = key(1024, "tokens of prompt + response", low=2)
    overlong: Literal["drop", "error", "truncate-prompt"] = key("drop", "what happens to longer rows")
    control_tokens: Literal["reject", "keep"] = key("reject", "text that contains the tokenizer's control tokens")
    max_lost: float = key(0.05, "exit 2 if more than this share of rows is dropped or truncated", low=0.0, high=1.0)
    tokens_per_device: int | Literal["auto"] = key("auto", "packing budget of one forward pass; never changes the result", low=1)


@dataclass(frozen=True, kw_only=True)
class EvalRecipe(Reading, Scoring, Evaluated, Recipe):
    """`rlhf eval`."""

    stage: ClassVar[str] = "eval"

    def drawn(self, *, of_reference: bool) -> int:
        """How many responses to each prompt are drawn from a model."""
        votes = self.vote.n if self.vote else []
        return max([self.rollout.responses_per_prompt, *votes, *(self.best_of_n if of_reference else [])])

    @property
    def terms(self) -> tuple[list[Reward], list[Reward]]:
        return self.reward or [], self.gold or []

    @property
    def paths(self) -> list[str]:
        sources = [source for rows in (self.prompts, self.preferences, self.text) for source in rows or ()]
        models = [path for path in self.models.values() if not is_pattern(path)]
        if self.winrate is not None and isinstance(self.winrate.judge, Judge) and self.winrate.judge.path is not None:
            models.append(self.winrate.judge.path)
        return [*models, *super().paths, *(source.path for source in sources)]


def is_pattern(path: str) -> bool:
    """Does it stand for several paths?"""
    return any(char in path for char in "*?[")
