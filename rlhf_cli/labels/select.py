"""Which pairs to ask about: those that an ensemble of reward models disagrees on, or hopes for, or any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cli.data.encode import AS_DRAWN, encode
from rlhf_cli.data.records import spoken
from rlhf_cli.errors import UsageError
from rlhf_cli.files import to_json
from rlhf_cli.labels.questions import Row
from rlhf_cli.models.load import load_tokenizer
from rlhf_cli.models.placement import FrozenModels
from rlhf_cli.recipe.labels import Select
from rlhf_cli.recipe.stages import TRAINING_STAGES
from rlhf_cli.rollout.reward_models import RewardModel, centred_scores
from rlhf_cli.rollout.rewards import Answers, PolicyText
from rlhf_cli.runs.parents import recorded_template, resolve_start
from rlhf_cli.sections import Reward


def variances(scores: np.ndarray) -> np.ndarray:
    """(N, N) the population variance, over K members, of r_i − r_j; `scores`: (N, K) of a prompt's responses."""
    found: np.ndarray = (scores[:, None] - scores[None]).var(-1)
    return found


def bounds(scores: np.ndarray, k: float) -> np.ndarray:
    """(N,) mean and k population deviations over K members; `scores`: (N, K), each member's centred over the responses."""
    found: np.ndarray = scores.mean(-1) + k * scores.std(-1)
    return found


def duels(scores: np.ndarray) -> np.ndarray:
    """(N, N) the probability that two members, drawn apart, have the one and the other as their favourite, in either order."""
    size, members = scores.shape
    share = np.bincount(scores.argmax(0), minlength=size) / members
    found: np.ndarray = 2 * np.outer(share, share)
    return found


def order(values: np.ndarray, by: str, seed: int) -> np.ndarray:
    """Positions of the (P,) pairs, the first to be asked about first.

    By uncertainty and optimism the largest value first, of equal ones the first in the list. For Thompson duels a pair is drawn
    by its value, without replacement (Efraimidis & Spirakis 2006), and one of value 0 never; at random each pair is as likely.
    """
    if by in ("uncertainty", "optimism"):
        return np.argsort(-values, kind="stable")
    weights = values if by == "thompson" else np.ones(len(values))
    with np.errstate(divide="ignore"):
        late = -np.log(1 - np.random.default_rng(seed).random(len(values))) / weights
    found: np.ndarray = np.argsort(late, kind="stable")[: np.count_nonzero(weights)]
    return found


def _worth(scores: np.ndarray, settings: Select) -> np.ndarray:
    """(N, N) what asking about each pair of a prompt is worth; see `choose`."""
    if settings.by == "optimism":
        upper = bounds(scores, settings.k)
        return np.asarray(np.add.outer(upper, upper))
    return variances(scores) if settings.by == "uncertainty" else duels(scores)


def choose(
    rows: Sequence[Row], scores: Sequence[np.ndarray] | None, settings: Select, seed: int, labelled: Sequence[Row] = ()
) -> list[dict[str, Any]]:
    """The pairs to ask about, in the order in which they were chosen: {"row", "hash", "pair", "value"}.

    `scores`: (N, K) of each row's responses, centred; None: at random. The value of a pair is the variance of its difference, the
    probability of its duel, or the sum of its responses' upper bounds. Pairs that are `labelled` are left out, and no prompt has
    one label more before all have as many: the largest values alone would be much the same question, asked again and again
    (Melo et al. 2024, BAL-PM).
    """
    known = {own for row in labelled for own in _texts(row).values()}
    pairs = [(at, pair) for at, row in enumerate(rows) for pair, own in _texts(row).items() if own not in known]
    values = np.zeros(len(pairs))
    if scores is not None:
        tables = [_worth(own, settings) for own in scores]
        values = np.array([tables[at][pair] for at, pair in pairs])
    prompts, labels = [to_json(rows[at].prompt) for at, _ in pairs], Counter(prompt for prompt, _ in known)

    def turn(at: int) -> int:
        """Which label of its prompt the pair would be."""
        labels[prompts[at]] += 1
        return labels[prompts[at]]

    return [
        {
            "row": rows[pairs[at][0]].number,
            "hash": rows[pairs[at][0]].hash,
            "pair": [*pairs[at][1]],
            "value": None if scores is None else float(values[at]),
        }
        for at in sorted(order(values, settings.by, seed).tolist(), key=turn)[: settings.n]
    ]


def _texts(row: Row) -> dict[tuple[int, int], tuple[bytes, frozenset[str]]]:
    """Pair of a row → what is compared in it."""
    said, prompt = [spoken(own).strip() for own in row.responses], to_json(row.prompt)
    return {(i, j): (prompt, frozenset((said[i], said[j]))) for i, j in combinations(range(len(said)), 2)}


def only(rows: Sequence[Row], chosen: Sequence[dict[str, Any]], path: Path) -> list[Row]:
    """The rows with nothing but the chosen pairs to ask about. UsageError: `path` was written of other rows."""
    known = {row.number: row for row in rows}
    pairs: dict[int, list[tuple[int, ...]]] = {}
    for each in chosen:
        if each["row"] not in known or known[each["row"]].hash != each["hash"]:
            raise UsageError(
                f"{path}: was chosen from other rows than there are now\n  put them back, or start anew with --output"
            )
        pairs.setdefault(each["row"], []).append(tuple(each["pair"]))
    return [replace(row, asked=tuple(sorted(pairs[row.number]))) for row in rows if row.number in pairs]


def find_ensemble(paths: Sequence[str], place: str, *, trust_remote_code: bool, check: bool) -> list[RewardModel]:
    """The reward models of an ensemble. UsageError: one is none, or there are fewer than two members."""
    start = resolve_start(paths[0], None, f"{place}.0", stages=TRAINING_STAGES)
    tokenizer = load_tokenizer(start.tokenizer, start.revision, trust_remote_code)
    template = recorded_template(start, tokenizer, paths[0], f"{place}.0")
    text = PolicyText(tokenizer, template, trust_remote_code, check)
    found = [RewardModel.find(Reward(model=path), path, f"{place}.{at}", text) for at, path in enumerate(paths)]
    if comparing := [model.name for model in found if model.compares]:
        raise UsageError(f"{place}: {comparing[0]} compares two responses, and has no scores that could disagree. name others")
    if sum(len(model.members) for model in found) < 2:
        raise UsageError(f"{place}: {paths[0]} is one reward model, and nobody disagrees. name several, or a run with members")
    return found


def ensemble_scores(ensemble: Sequence[RewardModel], rows: Sequence[Row], models: FrozenModels, budget: int) -> list[np.ndarray]:
    """(N, K) of each row's responses by all members, centred over them; each base is loaded once.

    UsageError: a model cannot read a response.
    """
    scorers = [model.load(models, f"member{at}", budget) for at, model in enumerate(ensemble)]
    records = [row.record for row in rows]
    first = ensemble[0]
    encoded = encode(records, first.tokenizer, first.template, AS_DRAWN, responses="all", cache=None)
    if encoded.kept < encoded.read:
        raise UsageError(f"{first.place}: the reward model cannot read {encoded.examples[0]}")
    texts = [[*map(spoken, row.responses)] for row in rows]
    answers = Answers(list(encoded.trees), records, texts, [[True] * len(own) for own in texts])
    return np.split(centred_scores(scorers, answers), np.cumsum([*map(len, texts)])[:-1])
