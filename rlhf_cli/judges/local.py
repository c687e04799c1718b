"""A judge that is a local model: the log-probabilities of its options, without a server and without a word written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_cli.data.encode import AS_DRAWN, Encoded, encode
from rlhf_cli.data.records import Message, Record
from rlhf_cli.data.templates import THINK_MARK, ChatFormat, tokenise
from rlhf_cli.data.trees import span
from rlhf_cli.errors import UsageError
from rlhf_cli.judges.question import SCORES, Question, Wording, expected_score, preferred, spellings
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.passes import token_figures


@dataclass(frozen=True)
class Options:
    """What a judge may answer, as tokens. A score is followed by the turn's end: "1" is not also the beginning of "10"."""

    names: tuple[str, ...]  # of a comparison the spellings that are one token, of a score the numbers' spellings
    ids: tuple[np.ndarray, ...]

    def value(self, logps: Sequence[float]) -> float:
        """P(A), or the expected score, by the log-probability of each option."""
        if self.names[0].strip("( ") in ("A", "B"):
            found = preferred(dict(zip(self.names, logps, strict=True)))
            assert found is not None
            return found
        own = [[p for name, p in zip(self.names, logps, strict=True) if name.strip() == str(score)] for score in SCORES]
        return expected_score([float(np.logaddexp.reduce(each)) for each in own])


def read_options(form: ChatFormat, wording: Wording, place: str) -> Options:
    """The options in the judge's tokens. UsageError: none is one token, or the judge's answers begin with reasoning."""
    asked = _encoded(form, ["?"])
    last = form.tokenizer.decode(asked.trees[0].prompt).rstrip().rpartition("\n")[2] if asked.kept else ""
    if (opened := THINK_MARK.findall(last)) and not re.search(r"/|END", opened[-1]):
        raise UsageError(
            f"{place}: the judge's chat template begins its answer with {opened[-1]}, where one of the options is read; "
            "name another model, or ask this one behind an endpoint"
        )

    def ids(text: str) -> list[int]:
        return tokenise(form.tokenizer, [form.anchor + text])[0][len(tokenise(form.tokenizer, [form.anchor])[0]) :]

    if wording.mode == "score":
        end = [*ids(form.close), *form.end_ids] if form.close else [*form.end_ids]
        found = {text: [*ids(text), *end] for score in SCORES for text in spellings(str(score))[:2]}
    else:
        found = {text: own for option in "AB" for text in spellings(option) if len(own := ids(text)) == 1}
        if {name.strip("( ") for name in found} != {"A", "B"}:
            raise UsageError(f"{place}: the judge's tokenizer has no token that is A or B alone; name another model")
    different = {tuple(own): name for name, own in reversed(found.items())}  # two spellings may be the same tokens
    kept = {name: own for name, own in found.items() if different[tuple(own)] == name}
    return Options(tuple(kept), tuple(np.array(own, np.int32) for own in kept.values()))


def _encoded(form: ChatFormat, texts: Sequence[str]) -> Encoded:
    """Each text as the question of a user, up to where the answer begins."""
    plain = form.template.text is None
    records = [Record(text if plain else (Message("user", text),), (), f"question {n}") for n, text in enumerate(texts, 1)]
    return encode(records, form.tokenizer, form.template, AS_DRAWN, responses="none", cache=None)


@dataclass(frozen=True)
class LocalJudge:
    """A language model with its weights."""

    backbone: Backbone
    role: str
    form: ChatFormat
    options: Options
    wording: Wording
    budget: int  # tokens of one forward pass
    positions: int | None  # tokens that it can take at most, where it has such a limit
    place: str  # begins every message

    def answer(self, questions: Sequence[Question]) -> Mapping[Question, float]:
        """UsageError: a question is longer than what the model can take, or its chat template cannot write it."""
        if not (asked := list(dict.fromkeys(questions))):
            return {}
        encoded = _encoded(self.form, [self.wording.filled(question) for question in asked])
        if encoded.kept < encoded.read:
            raise UsageError(f"{self.place}: the judge cannot be asked: {encoded.examples[0]}")
        trees = [tree._replace(responses=self.options.ids) for tree in encoded.trees]
        if self.positions is not None and (longest := max(map(span, trees), default=0)) > self.positions:
            what = f"a question has {longest} tokens, the judge takes {self.positions}"
            raise UsageError(f"{self.place}: {what}; name another model")
        host = self.backbone.at(self.role)
        found = token_figures(host, trees, self.budget, lambda own, batch: (own.logps(self.role, batch)[0],))
        values = [self.options.value([float(each.sum()) for each in own]) for own in found]
        return dict(zip(asked, values, strict=True))
