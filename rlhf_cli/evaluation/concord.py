"""How often those who judge the same pairs of responses agree with each other: labels, reward models, terms, policies."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlhf_cli.data.records import Prompt, Record, spoken
from rlhf_cli.evaluation.eval_json import Concord, Share
from rlhf_cli.evaluation.intervals import wilson
from rlhf_cli.evaluation.preference import NO_SUBSET, observations, over
from rlhf_cli.objectives.preference import ordered_pairs

if TYPE_CHECKING:
    from rlhf_cli.data.trees import Tree

Verdicts = Mapping[tuple[Prompt, str, str], float]
"""(prompt, one response, another), the two in the order of their texts → that the one is better: 1, 0, or ½ for a tie."""

LABELS = "labels"  # the judge that the data's own order is; labels/NAME: what the annotator NAME says
ANNOTATOR = "annotator"  # the column that names one


def verdicts(trees: Sequence[Tree], records: Sequence[Record], scores: Iterable[np.ndarray]) -> Verdicts:
    """By scores of every tree's responses, in their order; of a pair that several rows have the mean."""
    found = defaultdict[tuple[Prompt, str, str], list[float]](list)
    for tree, own in zip(trees, scores, strict=True):
        record = records[tree.row]
        texts = list(map(spoken, record.responses))
        for i, j in ordered_pairs(len(texts), tree.facts):
            if tree.facts.better and texts[i] != texts[j]:
                one, other = (i, j) if texts[i] < texts[j] else (j, i)
                found[record.prompt, texts[one], texts[other]].append((1 + float(np.sign(over(own, one, other)))) / 2)
    return {pair: sum(own) / len(own) for pair, own in found.items()}


def labels(trees: Sequence[Tree], records: Sequence[Record]) -> dict[str, Verdicts]:
    """What the data say of their own pairs: all rows together, and those of each annotator where there are several."""

    def said(chosen: Sequence[Tree]) -> Verdicts:
        ranks = (np.array(t.facts.ranks or range(len(records[t.row].responses)), np.float64) for t in chosen)
        return verdicts(chosen, records, (-(t.facts.better or 1) * own for t, own in zip(chosen, ranks, strict=True)))

    by = defaultdict[str, list["Tree"]](list)
    for tree in trees:
        columns = json.loads(records[tree.row].columns or "{}")
        if columns.get(ANNOTATOR) is not None:
            by[str(columns[ANNOTATOR])].append(tree)
    return {LABELS: said(trees)} | {f"{LABELS}/{name}": said(own) for name, own in sorted(by.items()) if len(by) > 1}


def concord(judges: Mapping[str, Verdicts]) -> Concord:
    """For every two judges the share of their common pairs on which they agree, where one of them sees a tie counted half.

    Wilson's interval of as many `observations` as the pairs are worth, as for agreement with preferences. Two without a common
    pair are left out.
    """
    found: Concord = {}
    for x, ours in judges.items():
        for y, theirs in judges.items():
            common = [pair for pair in ours if pair in theirs] if x != y else []
            if common:
                values = np.array([ours[pair] * theirs[pair] + (1 - ours[pair]) * (1 - theirs[pair]) for pair in common])
                prompts: dict[Prompt, int] = {}
                place = np.array([prompts.setdefault(prompt, len(prompts)) for prompt, _, _ in common])
                share = float(values.mean())
                found.setdefault(x, {})[y] = Share(share, *wilson(share, observations(values, place)), len(common))
    return found


def by_subset(judges: Mapping[str, Verdicts], trees: Sequence[Tree], records: Sequence[Record]) -> dict[str, Concord]:
    """The same for the pairs of each subset; empty where the data name none."""
    prompts = defaultdict[str, set[Prompt]](set)
    for tree in trees:
        prompts[tree.facts.subset or NO_SUBSET].add(records[tree.row].prompt)
    if prompts.keys() <= {NO_SUBSET}:
        return {}
    return {
        name: concord({judge: {pair: v for pair, v in own.items() if pair[0] in some} for judge, own in judges.items()})
        for name, some in sorted(prompts.items())
    }
