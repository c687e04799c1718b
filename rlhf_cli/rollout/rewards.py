"""What drawn responses are worth: reward models and Python functions, and how several terms make one score."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch

from rlhf_cli import sections
from rlhf_cli.data.dataset import question
from rlhf_cli.data.encode import encode
from rlhf_cli.data.overlong import span
from rlhf_cli.data.records import Message, Record
from rlhf_cli.data.templates import Format, tokenise
from rlhf_cli.data.trees import Tree
from rlhf_cli.errors import NumberError, RunError, UsageError
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.scoring import score_trees
from rlhf_cli.suggest import closest

Prompt = str | list[dict[str, str]]
Function = Callable[[list[Prompt], list[str]], Any]

SHOWN = 60
"""Characters of a prompt or a response in a message."""

AS_DRAWN = sections.Data(train=[], max_length=sys.maxsize, control_tokens="keep")
"""How drawn text is encoded: whatever the policy wrote, and however long it is, has to get its score."""


@dataclass(frozen=True)
class Answers:
    """Prompts and the responses that the policy drew to each."""

    trees: list[Tree]  # prompt and its K drawn responses, in the policy's tokens
    records: list[Record]  # of each tree: its prompt as text or messages, and where it stands
    texts: list[list[str]]  # of each tree: its responses without the ending token
    ended: list[list[bool]]  # of each tree: did the response end, or was it cut off?

    @property
    def pairs(self) -> list[tuple[Record, str]]:
        """(M,) prompt and response, tree by tree: the order of all scores."""
        return [(record, text) for record, texts in zip(self.records, self.texts, strict=True) for text in texts]


class Term(Protocol):
    """One term of a reward."""

    @property
    def name(self) -> str: ...
    @property
    def weight(self) -> float: ...
    def score(self, answers: Answers) -> np.ndarray:
        """(M,) float64 of all responses, tree by tree, before the weight. Raises RunError."""


@dataclass(frozen=True)
class FunctionTerm:
    """A Python function of lists of prompts and responses, which returns a number for each response.

    A prompt is a str where it is one text or one user turn, else its conversation as a list of {"role", "content"}.
    """

    name: str
    weight: float
    reference: str  # file.py:name
    place: str  # begins every message
    function: Function

    def score(self, answers: Answers) -> np.ndarray:
        """(M,) float64, tree by tree.

        Raises:
            UsageError: the function raises, or returns something else than a number for each response.
            NumberError: one of the numbers is not finite.
        """
        pairs = answers.pairs
        if not pairs:
            return np.zeros(0)
        what = f"{self.place}: {self.reference}"
        values = _listed(self._call(pairs))
        if not isinstance(values, list):
            raise UsageError(
                f"{what} returned {_shown(values)}, expected a list of numbers, one for each of {len(pairs)} responses\n"
                f"{_first(pairs)}"
            )
        if len(values) != len(pairs):
            raise UsageError(f"{what} returned {len(values)} numbers for {len(pairs)} responses\n{_first(pairs)}")
        numbers = [_number(value) for value in values]
        for value, number, pair in zip(values, numbers, pairs, strict=True):
            if number is None:
                raise UsageError(f"{what} returned {_shown(value)} for a response, expected a number\n{_told(pair)}")
        scores = np.array(numbers, np.float64)
        _check_finite(scores, pairs, what)
        return scores

    def _call(self, pairs: Sequence[tuple[Record, str]]) -> Any:
        try:
            return self.function([as_given(record.prompt) for record, _ in pairs], [text for _, text in pairs])
        except RunError:  # a signal's
            raise
        except (Exception, SystemExit) as error:
            raise UsageError(
                f"{self.place}: {self.reference} failed on {len(pairs)} responses\n"
                f"{_raised(error, self.reference.rpartition(':')[0])}\n{_first(pairs)}"
            ) from error


def as_given(prompt: str | tuple[Message, ...]) -> Prompt:
    """A prompt as a reward function sees it."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return [message._asdict() for message in prompt]


def function_term(reward: sections.Reward, name: str, place: str) -> FunctionTerm:
    """The term of `reward.function`, its file imported.

    Raises:
        UsageError: no such file, one that cannot be imported, or no such function in it.
    """
    assert reward.function is not None
    return FunctionTerm(name, reward.weight, reward.function, place, load_function(reward.function, place))


def load_function(reference: str, place: str) -> Function:
    """The function `file.py:name`; a file is imported once, however many of its functions are asked for.

    Raises:
        UsageError: no such file, one that cannot be imported, or no such function in it.
    """
    file, _, name = reference.rpartition(":")
    if not file or not name:
        raise UsageError(f"{place}: expected file.py:name, found {reference}")
    members = vars(_import_file(file, place))
    if name not in members:
        near = closest(name, [own for own, value in members.items() if callable(value)])
        raise UsageError(f"{place}: {file} has no function {name}. {f'did you mean {near}?' if near else 'define it there'}")
    if not callable(members[name]):
        raise UsageError(f"{place}: {name} in {file} is {_shown(members[name])}, no function")
    function: Function = members[name]
    return function


def _import_file(file: str, place: str) -> ModuleType:
    path = Path(file).resolve()
    if not path.is_file():
        near = closest(path.name, sorted(other.name for other in path.parent.glob("*.py")))
        raise UsageError(f"{place}: there is no file {file}{f'. did you mean {Path(file).with_name(near)}?' if near else ''}")
    # Known to Python by a name of its own, so that a user's `utils.py` hides no other module, and pickle finds what is in it.
    name = f"rlhf_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{place}: {file} is no Python file: its name must end in .py")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as when Python runs the file: it may import what lies beside it
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, RunError) or not isinstance(error, (Exception, SystemExit)):
            raise  # a signal's
        raise UsageError(f"{place}: {file} cannot be imported\n{_raised(error, file)}") from error
    return module


def _raised(error: BaseException, file: str) -> str:
    """One line: the last line of the user's file that the error passed, and what it says."""
    path = str(Path(file).resolve())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    words = str(error).strip().splitlines()[:1]
    return ": ".join([f"{file}:{lines[-1]}" if lines else file, type(error).__name__, *(word[:200] for word in words)])


def _listed(result: Any) -> Any:
    """Lists, tuples, arrays and tensors as a list, anything else as it is."""
    if isinstance(result, (np.ndarray, torch.Tensor)):
        return result.tolist()
    return list(result) if isinstance(result, tuple) else result


def _number(value: Any) -> float | None:
    """None for what is no number."""
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating)):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond all floats
        return math.inf


def _check_finite(scores: np.ndarray, pairs: Sequence[tuple[Record, str]], what: str) -> None:
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise NumberError(f"{what} gave a response the score {scores[bad[0]]}\n{_told(pairs[bad[0]])}")


def _shown(value: Any) -> str:
    return "None" if value is None else f"{_short(repr(value))} ({type(value).__name__})"


def _told(pair: tuple[Record, str]) -> str:
    record, text = pair
    return f"{record.where}: prompt {_short(question(record))!r}, response {_short(text)!r}"


def _first(pairs: Sequence[tuple[Record, str]]) -> str:
    return f"the first: {_told(pairs[0])}"


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


@dataclass(frozen=True)
class Reader:
    """How a reward model reads answers: the policy's own tokens, or their text in its tokens and its chat template."""

    place: str  # begins every message
    positions: int | None  # tokens that it can take at most, where it has such a limit
    form: Format | None  # its tokenizer and template; None: it reads the policy's tokens

    def __call__(self, answers: Answers) -> list[Tree]:
        """Trees of the same prompts and responses, in the same order.

        Raises:
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

    def _rewritten(self, form: Format, answers: Answers) -> list[Tree]:
        records = [
            Record(record.prompt, tuple(texts), record.where)
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


@dataclass(frozen=True)
class ModelTerm:
    """A reward model: its score at a response's last token, less `mean` and over `std`."""

    name: str
    weight: float
    backbone: Backbone
    role: str
    mean: float  # 0 and 1: scores as they are
    std: float
    budget: int  # tokens of one forward pass
    reader: Reader

    def score(self, answers: Answers) -> np.ndarray:
        """(M,) float64, tree by tree.

        Raises:
            UsageError: the model cannot read an answer.
            NumberError: a score is not finite.
        """
        if not answers.trees:
            return np.zeros(0)
        trees = self.reader(answers)
        found = score_trees(self.backbone.at(self.role), self.role, trees, self.budget)
        scores = np.concatenate([found[tree] for tree in range(len(trees))])
        _check_finite(scores, answers.pairs, f"{self.reader.place}: reward model {self.name}")
        normalised: np.ndarray = (scores - self.mean) / self.std
        return normalised


COMBINATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda weighted: weighted.sum(0),
    "min": lambda weighted: weighted.min(0),
    "mean_minus_std": lambda weighted: weighted.mean(0) - weighted.std(0),
}
"""How the (terms, M) weighted terms make one score; min and mean less the population deviation are pessimistic ensembles
(Coste et al. 2024, "Reward model ensembles help mitigate overoptimization"; Eisenstein et al. 2023, "Helping or herding?")."""


def combine(weighted: np.ndarray, how: str) -> np.ndarray:
    """(terms, M) terms times their weights → (M,) scores."""
    return COMBINATIONS[how](weighted)
