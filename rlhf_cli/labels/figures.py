"""What verdicts come to: preferences to train on, and figures of those who gave them (label.json)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_cli.data.records import spoken
from rlhf_cli.evaluation.intervals import ratio_interval, resamples, wilson, within_shares
from rlhf_cli.figures import Interval
from rlhf_cli.labels.agreement import COEFFICIENTS, agreement, circles, coin
from rlhf_cli.labels.questions import Ranking, Row
from rlhf_cli.labels.verdicts import Verdict, by_pair

Figures = dict[str, Any]
Pairs = Mapping[tuple[int, int, int], Mapping[str, int]]
"""What `by_pair` finds."""
LABELS = "rows"
"""Under which the preferences that the rows have already are those of an annotator, beside a model."""


def preferences(rows: Sequence[Row], verdicts: Iterable[Verdict], ranking: Ranking) -> list[dict[str, Any]]:
    """Rows that training reads: of each pair that was judged one with its `probability`, or a ranking of each row.

    What several annotators said of a pair is merged: the probability is the mean of their votes, ½ for a tie, and the more likely
    response is the chosen one; a model's probability is its own. Of rankings each response's mean place is its rank, tied ones
    sharing theirs.
    """
    known, found = {row.number: row for row in rows}, []
    asked = [line for line in verdicts if not line.gold]
    own = {pair: said for pair, said in by_pair(asked).items() if pair[0] in known}
    soft = {(line.row, *sorted(line.order)): line for line in asked if line.first is not None}
    if ranking == "all":
        for number, row in known.items():
            said = {pair[1:]: votes for pair, votes in own.items() if pair[0] == number}
            names = sorted({name for votes in said.values() for name in votes})
            if names:
                beaten = np.zeros(len(row.responses))
                for (i, j), votes in said.items():
                    beaten[i] += sum(1 - vote for vote in votes.values()) / 2
                    beaten[j] += sum(1 + vote for vote in votes.values()) / 2
                ranks = [round(1 + each / len(names), 6) for each in beaten.tolist()]
                found.append(_row(row, names, {"responses": row.plain, "ranks": ranks}, row.models))
        return found
    for (number, i, j), votes in own.items():
        row, chance = known[number], sum(1 + vote for vote in votes.values()) / (2 * len(votes))
        said_by_model = soft.get((number, i, j))
        if said_by_model is not None and said_by_model.p is not None:
            chance = said_by_model.p if said_by_model.order[0] == i else 1 - said_by_model.p
        better, worse = (i, j) if chance >= 0.5 else (j, i)
        texts = {"chosen": row.plain[better], "rejected": row.plain[worse], "probability": max(chance, 1 - chance)}
        if said_by_model is not None and said_by_model.principles:
            texts["principle"] = "; ".join(said_by_model.principles)
        found.append(_row(row, sorted(votes), texts, row.models and (row.models[better], row.models[worse])))
    return found


def _row(row: Row, names: Sequence[str], texts: Mapping[str, Any], models: Sequence[str]) -> dict[str, Any]:
    more = {"models": [*models]} if models else {}
    return {"prompt": row.prompt, **texts, "annotator": ", ".join(names), **more, **row.beside}


def measure(
    rows: Sequence[Row], gold: Sequence[Row], verdicts: Sequence[Verdict], annotators: Sequence[str], seed: int
) -> Figures:
    """label.json. Agreement and biases are those on the rows, gold questions apart, whose answers are known beforehand."""
    asked = [line for line in verdicts if not line.gold]
    pairs = by_pair(asked)
    compared = _with_labels(rows, pairs) if any(line.first is not None for line in asked) else pairs
    raters = [*annotators, *([LABELS] if any(LABELS in said for said in compared.values()) else [])]
    return {
        "verdicts": len(verdicts),
        "agreement": {name: _agreement(name, compared, raters, seed) for name in COEFFICIENTS},
        "annotators": {name: _annotator(name, gold, verdicts, compared, seed) for name in annotators},
        "position_bias": position_bias(verdicts),
        "length_bias": _length_bias(rows, pairs, seed),
        "cycles": _cycles(asked, annotators),
        "seconds": _seconds(verdicts),
    }


def _with_labels(rows: Sequence[Row], pairs: Pairs) -> Pairs:
    """What was said of each pair, and what the rows say of it themselves."""
    labels = {row.number: row.labels for row in rows if row.labels is not None}
    found = dict(pairs)
    for row, i, j in pairs:
        if row in labels:
            first, second = labels[row][i], labels[row][j]
            found[row, i, j] = {**pairs[row, i, j], LABELS: (first < second) - (first > second)}
    return found


def _agreement(name: str, pairs: Pairs, annotators: Sequence[str], seed: int) -> Figures | None:
    """Of one response better, neither, the other better; Fleiss' κ on what all annotators judged.

    Which of the two is the one is drawn for each pair. In the rows' own order it could be mostly the better one, and then
    annotators who are nearly always right would agree no more than chance, for chance would be right as often.
    """
    least = len(annotators) if name == "fleiss" else 2
    shared = {pair: said for pair, said in pairs.items() if len(said) >= least}
    sides = [random.Random(str(pair)).choice((-1, 1)) for pair in shared]
    own = zip(sides, shared.values(), strict=True)
    ratings = np.array([[side * said[each] + 1 if each in said else -1 for each in annotators] for side, said in own])
    _, groups = np.unique([pair[0] for pair in shared], return_inverse=True)
    if len(annotators) < 2:
        return None
    return told(agreement(name, ratings.reshape(len(shared), len(annotators)), 3, groups, seed))


def told(found: Interval | None) -> Figures | None:
    """As label.json has it."""
    return None if found is None else {"value": found.mean, "low": found.low, "high": found.high}


def _annotator(name: str, gold: Sequence[Row], verdicts: Sequence[Verdict], pairs: Pairs, seed: int) -> Figures:
    own = [line for line in verdicts if line.annotator == name]
    known = {row.number: row.known for row in gold if row.known is not None}
    answers = [(known[line.row], pair) for line in own if line.gold for pair in line.pairs()]
    right = [(ranks[i] < ranks[j]) - (ranks[i] > ranks[j]) == better for ranks, (i, j, better) in answers]
    right += [said[name] == said[LABELS] for said in pairs.values() if name in said and LABELS in said]
    others = sorted({each for said in pairs.values() if name in said for each in said} - {name})
    kappas = [found["value"] for other in others if (found := _agreement("cohen", pairs, (name, other), seed)) is not None]
    twice = [abs(sum(_sides(line))) == 2 for line in own if line.first is not None]  # the same place won in both orders
    return {
        "verdicts": len(own),
        "skipped": sum(line.verdict == "skip" for line in own),
        "ties": sum(line.verdict in ("tie", "both-bad") for line in own),
        "gold": _share(sum(right), len(right)),
        "others": sum(kappas) / len(kappas) if kappas else None,
        "position_bias": position_bias(own),
        "contradictions": _share(sum(twice), len(twice)),
        "seconds": _seconds(own),
    }


def _share(count: int, of: int) -> Figures | None:
    """A share with Wilson's interval."""
    if not of:
        return None
    low, high = wilson(count / of, of)
    return {"value": count / of, "low": low, "high": high, "n": of}


def position_bias(verdicts: Iterable[Verdict]) -> Figures | None:
    """How often the response shown first beats the one shown last, of questions that say which is better, and the exact p-value.

    Sides are drawn by a coin of its own for each question, so that without a bias each is as likely, whatever the responses are.
    A model is asked in both orders, and only the pairs in which one place wins more often than the other are tested: without a
    bias they are those of either place as often (McNemar 1947, the exact test).
    """
    sides = [each for line in verdicts if (each := _sides(line))]
    shares, tested = [side for own in sides for side in own], [sum(own) for own in sides if sum(own)]
    found = _share(sum(side > 0 for side in shares), len(shares))
    return found and found | {"p_value": coin(sum(side > 0 for side in tested), len(tested))}


def _sides(line: Verdict) -> list[int]:
    """1 for each time that the first response shown beat the last one, −1 for the reverse; of a model in both orders."""
    if line.first is not None:
        one, other = line.first
        return [side for side in ((one > 0.5) - (one < 0.5), (other < 0.5) - (other > 0.5)) if side]
    ends = {line.order[0], line.order[-1]}
    return [better * (1 if i == line.order[0] else -1) for i, j, better in line.pairs() if better and {i, j} == ends]


def _length_bias(rows: Sequence[Row], pairs: Pairs, seed: int) -> Figures | None:
    """How often the longer response is the better one, of verdicts that say which is; bootstrap over rows."""
    lengths = {row.number: [len(spoken(each)) for each in row.responses] for row in rows}
    longer: dict[int, list[bool]] = {}
    for (row, i, j), said in pairs.items():
        difference = lengths[row][i] - lengths[row][j]
        longer.setdefault(row, []).extend(vote * difference > 0 for vote in said.values() if vote * difference)
    table = np.array([(sum(own), len(own)) for own in longer.values() if own], np.float64)
    if len(table) < 2:
        return None
    found = within_shares(ratio_interval(table[:, 0], table[:, 1], resamples(len(table), seed)))
    return {"value": found.mean, "low": found.low, "high": found.high, "n": int(table[:, 1].sum())}


def _cycles(verdicts: Sequence[Verdict], annotators: Sequence[str]) -> Figures:
    """Triples of responses whose three pairs one annotator judged apart; a ranking cannot go in a circle."""
    cyclic = triples = 0
    for name in annotators:
        own: dict[int, dict[tuple[int, int], float]] = {}
        for (row, i, j), said in by_pair(line for line in verdicts if line.annotator == name and len(line.order) == 2).items():
            own.setdefault(row, {})[i, j] = said[name]
        found = [circles(better) for better in own.values()]
        cyclic, triples = cyclic + sum(each[0] for each in found), triples + sum(each[1] for each in found)
    return {"cyclic": cyclic, "triples": triples, "share": cyclic / triples if triples else None}


def _seconds(verdicts: Sequence[Verdict]) -> Figures | None:
    """Time per verdict; the mean is that of a person who left the table too."""
    if not (took := [line.seconds for line in verdicts]):
        return None
    return {"median": float(np.median(took)), "p90": float(np.quantile(took, 0.9)), "total": round(sum(took), 2)}
