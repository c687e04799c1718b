"""The rows that models are evaluated on, in the tokens of each model that reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf_cli import sections
from rlhf_cli.data.dataset import Dataset, prepare
from rlhf_cli.data.formats import ANSWERS, COMPARISONS, PROMPTS, Purpose, Use
from rlhf_cli.data.records import Record, spoken
from rlhf_cli.data.requests import RowRequest
from rlhf_cli.data.trees import Tree
from rlhf_cli.errors import UsageError
from rlhf_cli.evaluation.concord import ANNOTATOR
from rlhf_cli.evaluation.models import Tokenisation, recipe_of
from rlhf_cli.recipe.load import Loaded
from rlhf_cli.rollout.rewards import Answers
from rlhf_cli.rollout.terms import columns_read

SECTIONS: dict[str, Use] = {"prompts": PROMPTS, "preferences": replace(COMPARISONS, better=frozenset({1, -1})), "text": ANSWERS}
"""Section of the recipe → what its rows are read for."""


@dataclass(frozen=True)
class Rows:
    """The rows of one section of the recipe in one tokenisation."""

    trees: Sequence[Tree]
    records: Sequence[Record]  # that the trees name by their row
    training: Sequence[Tree]  # beside held-out rows: those that training saw

    @property
    def locations(self) -> list[str]:
        """File and line of every tree."""
        return [self.records[tree.row].where for tree in self.trees]

    @property
    def answers(self) -> Answers:
        """The responses that the data give, as if a policy had written them."""
        records = [self.records[tree.row] for tree in self.trees]
        texts = [list(map(spoken, record.responses)) for record in records]
        tokens = [[*map(len, tree.responses)] for tree in self.trees]
        return Answers(list(self.trees), records, texts, [[True] * len(own) for own in texts], tokens)


@dataclass(frozen=True)
class SectionRows:
    """The rows of one section of the recipe."""

    dataset: Dataset  # as the first tokenisation has it
    by_tokenisation: dict[Tokenisation, Rows]  # of prompts those that fit into the tokens of all
    left_out: int  # prompts that do not
    repeated: int  # rows whose prompt another row has, which is asked once


def read_rows(loaded: Loaded, section: str, tokenisations: Sequence[Tokenisation]) -> SectionRows:
    """The rows of a section in every tokenisation. UsageError: a file, row or column is wrong, or too few rows are left."""
    datasets = {tokenisation: _read(loaded, section, tokenisation) for tokenisation in tokenisations}
    rows = {
        tokenisation: Rows(list(dataset.train.trees), dataset.reading.train, [])
        if dataset.held_out is None
        else Rows(list(dataset.held_out.trees), dataset.reading.held_out, list(dataset.train.trees))
        for tokenisation, dataset in datasets.items()
    }
    lost = repeated = 0
    if section == "prompts":
        known = [{tree.row for tree in own.trees} for own in rows.values()]
        fitting = known[0].intersection(*known)
        lost = len(known[0].union(*known)) - len(fitting)
        records = rows[tokenisations[0]].records
        # A prompt is one observation: asked in two rows it would count as two.
        shared = set({records[row].prompt: row for row in sorted(fitting, reverse=True)}.values())
        repeated = len(fitting) - len(shared)
        rows = {
            tokenisation: replace(own, trees=[tree for tree in own.trees if tree.row in shared])
            for tokenisation, own in rows.items()
        }
    if section != "preferences" and min(len(own.trees) for own in rows.values()) < 2:
        raise UsageError(f"{loaded.named(section)}: fewer than 2 rows are left, which is too few for any interval")
    return SectionRows(datasets[tokenisations[0]], rows, lost, repeated)


def _read(loaded: Loaded, section: str, tokenisation: Tokenisation) -> Dataset:
    recipe = recipe_of(loaded)
    sources: list[sections.EvalSource] = vars(recipe)[section]
    data = sections.SftData(
        train=[sections.Source(**{k: v for k, v in vars(source).items() if not k.startswith("holdout")}) for source in sources],
        holdout=sources[0].holdout,
        holdout_seed=sources[0].holdout_seed or 0,
        max_length=recipe.max_length,
        overlong=recipe.overlong,
        control_tokens=recipe.control_tokens,
        empty_think=recipe.empty_think,
        max_lost=recipe.max_lost,
        train_on="all" if section == "text" else "last",
    )

    def where(key: str) -> str:
        return loaded.named(key.replace("data.train", section, 1).removeprefix("data."))

    reserve = recipe.rollout.max_new_tokens if section == "prompts" else 0
    columns = {} if section == "text" else columns_read(loaded)
    if section == "preferences":
        columns = dict.fromkeys((*columns, ANNOTATOR))  # a term says nothing of a row that lacks its column
    if recipe.vote is not None and section == "prompts":
        columns = {**columns, recipe.vote.match.column: loaded.named("vote.match")}
    purpose = Purpose(section, SECTIONS[section], SECTIONS)
    request = RowRequest(purpose, recipe.seed, where, reserve=reserve, columns=columns)
    try:
        return prepare(data, request, tokenisation.tokenizer, tokenisation.template)
    except UsageError as error:
        raise UsageError(own_keys(str(error))) from error


def own_keys(text: str) -> str:
    """The reader names the keys of stages that train, where these stand in `data`."""
    return re.sub(r"\bdata\.(?=(max_lost|max_length|overlong|control_tokens)\b)", "", text)
