"""The recipe of `rlhf label`, and the sections that it alone has."""

# ruff: noqa: RUF009  (key() only makes a dataclass field)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from rlhf_cli.recipe.evaluations import Reading, is_pattern
from rlhf_cli.recipe.recipes import Recipe
from rlhf_cli.sections import EvalSampling, EvalSource, Judge, Rows, key


@dataclass(frozen=True)
class People:
    """Who judges, on a page of this machine or in a terminal."""

    annotators: list[str] = key(["me"], "a name for each; on the page each has a link of its own")
    overlap: float = key(0.2, "share of the rows that all of them judge; the rest is dealt out", low=0.0, high=1.0)
    gold: list[Rows] | None = key(
        None, "a path, or a list of sources: preferences whose answers are known; all are asked about them, amid the others"
    )
    ranking: Literal["pairs", "all"] = key(
        "pairs", "of more than two responses: every pair is a question, or all of them are put in order at once"
    )


@dataclass(frozen=True)
class Judging(Judge):
    """Who says which response is better: people, a model, or a function."""

    people: People = field(default_factory=People)
    function: str | None = key(
        None, "instead of a model: file.py:name, as in a reward; the response with the higher number is the better one", path=True
    )
    rationality: float | None = key(
        None, "with function: β of P(better) = σ(β · difference of the numbers); null: 1, 0, or ½ where they are equal", low=0.0
    )

    @property
    def asks_people(self) -> bool:
        return self.endpoint is self.path is self.function is None


@dataclass(frozen=True)
class Select:
    """Which pairs to ask about, by what an ensemble of reward models makes of them."""

    n: int = key(help="how many pairs", low=1)
    by: Literal["random", "uncertainty", "thompson", "optimism"] = key(
        "uncertainty",
        "uncertainty: where the members differ most about a pair; thompson: the favourites of two members; optimism: what is "
        "best by mean and k deviations; random",
    )
    ensemble: list[str] = key([], "train-rm runs, or one with members", path=True)
    k: float = key(1.0, "deviations of optimism", low=0.0)
    labelled: list[Rows] | None = key(
        None, "a path, or a list of sources: labels that exist; their pairs are not asked about again, their prompts last"
    )


@dataclass(frozen=True)
class Revise:
    """Answers to prompts that their model criticises and writes anew, under principles."""

    principles: str = key(help="a file with a principle a line; one is drawn for each round", path=True)
    rounds: int = key(1, "of critique and revision", low=1)
    model: str | None = key(None, "what writes: a run, an adapter or a model; with endpoint its name on the server", path=True)
    endpoint: str | None = key(None, "URL that /chat/completions follows; its key is OPENAI_API_KEY of the environment")
    split: float = key(0.5, "share of the prompts that rows for sft come from; pairs come from the others", low=0.0, high=1.0)
    timeout: float = key(60.0, "seconds that an answer of the endpoint may take", low=0.1)
    retries: int = key(4, "how often a question is asked again that got no answer", low=0)
    parallel: int = key(4, "questions under way at once", low=1)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What is judged, and by whom."""

    rows: list[Rows] | None = key(None, "a path, or a list of sources: prompts with several responses each")
    models: dict[str, str] = key({}, "instead of rows: draw the responses; a path to each name, as in eval", path=True)
    prompts: list[EvalSource] | None = key(None, "with models: what they respond to")
    rollout: EvalSampling = field(default_factory=EvalSampling)
    samples: str | None = key(None, "instead of rows: the samples.jsonl of an evaluation", path=True)
    select: Select | None = key(None, "ask about some of the pairs only: {by, ensemble, n}")
    judge: Judging = field(default_factory=Judging)
    revise: Revise | None = key(
        None, "instead of judge: a model answers the prompts, criticises its answers and writes them anew"
    )


@dataclass(frozen=True, kw_only=True)
class LabelRecipe(Reading, Judged, Recipe):
    """`rlhf label`."""

    stage: ClassVar[str] = "label"

    @property
    def paths(self) -> list[str]:
        labelled = self.select.labelled if self.select is not None else None
        sources = [source for own in (self.rows, self.prompts, labelled, self.judge.people.gold) for source in own or ()]
        models = [path for path in self.models.values() if not is_pattern(path)]
        writer = self.revise.model if self.revise is not None and self.revise.endpoint is None else None
        own = [path for path in (self.samples, self.judge.path, writer) if path is not None]
        ensemble = self.select.ensemble if self.select is not None else []
        return [*models, *super().paths, *(source.path for source in sources), *own, *ensemble]
