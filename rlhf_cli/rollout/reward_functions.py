"""Python functions of somebody's own as terms of a reward."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from rlhf_cli import sections
from rlhf_cli.data.records import Record, as_turns, plain_prompt, step_spans
from rlhf_cli.data.requests import ALL, Lent
from rlhf_cli.data.templates import tokenise
from rlhf_cli.errors import RunError, UsageError
from rlhf_cli.files import sha256_file
from rlhf_cli.rollout.rewards import Answers, DenseScorer, PolicyText, TextTerm, check_finite, shortened, shown_answer
from rlhf_cli.suggest import closest, did_you_mean

Function = Callable[..., Any]

OURS = ("prompts", "responses", "messages", "ended")
"""Parameters that are no columns: texts, texts, the prompt's turns, and whether the response ended."""
PARALLEL, TIMEOUT = 16, 60.0
"""Calls of an async function that are under way at once, and seconds that one may take."""


@dataclass(frozen=True)
class RewardFunction(TextTerm):
    """A Python function of lists with an entry for each response, which returns a number, or None, for each.

    A prompt is a str where it is one text or one user turn, else its conversation as a list of {"role", "content"}. An async
    function is called for one response at a time.
    """

    reference: str  # file.py:name
    function: Function
    parallel: int
    timeout: float
    compares: bool = False

    @classmethod
    def columns(cls, reward: sections.Reward, place: str) -> Lent:
        """What its parameters name; one with the default None may be missing."""
        assert reward.function is not None
        what = f"{place}: {reward.function}"
        taken, ours = taken_by(load_function(reward.function, place), what), (*OURS, f"{reward.per}s")
        asked = {name: None if name in taken.optional else what for name in taken.given.values() if name not in ours}
        return asked | ({ALL: None} if taken.all_columns else {})

    @classmethod
    def find(cls, reward: sections.Reward, name: str, place: str, policy: PolicyText) -> RewardFunction:
        """The function of `reward.function`. UsageError: see `load_function`."""
        assert reward.function is not None
        function, parallel, timeout = load_function(reward.function, place), reward.parallel, reward.timeout
        if not inspect.iscoroutinefunction(function) and (parallel is not None or timeout is not None):
            raise UsageError(
                f"{place}: {reward.function} is called once with all responses, so that parallel and timeout have no effect; "
                "remove them, or write it as `async def`"
            )
        settings = parallel or PARALLEL, timeout or TIMEOUT, bool(reward.compares)
        own, between = (name, reward.weight, place, reward.function, function, *settings), reward.separator
        return DenseFunction(*own, between if reward.per == "step" else None, policy.tokenizer) if reward.per else cls(*own)

    @property
    def source(self) -> dict[str, Any]:
        """Not the function's text: one that failed is mended, and the run goes on."""
        return {"function": self.reference}

    @property
    def code(self) -> dict[str, str]:
        return {f"function {self.reference}": sha256_file(Path(self.reference.rpartition(":")[0]))}

    @property
    def record(self) -> dict[str, Any]:
        return self.identity | {"hash": next(iter(self.code.values()))}

    def score(self, answers: Answers) -> np.ndarray:
        """(M,) float64, tree by tree; NaN where it returned None.

        UsageError: the function raises, or returns something else than a number or None for each response.
        NumberError: one of the numbers is not finite.
        """
        return self._numbers(self._returned(answers, {}), answers.pairs)

    def _returned(self, answers: Answers, more: Mapping[str, list[Any]]) -> list[Any]:
        """What it says of each response; `more`: what else its parameters may name."""
        pairs = answers.pairs
        if not pairs:
            return []
        what, first = f"{self.place}: {self.reference}", f"the first: {shown_answer(pairs[0])}"
        try:
            values = self._called(answers, more)
        except RunError:  # a signal's
            raise
        except (Exception, SystemExit) as error:
            said = _raised(error, self.reference.rpartition(":")[0])
            if isinstance(error, TimeoutError) and inspect.iscoroutinefunction(self.function):
                said = f"it took longer than {self.timeout:g} s (timeout) for a response"
            raise UsageError(f"{what} failed on {len(pairs)} responses\n{said}\n{first}") from error
        if isinstance(values, (np.ndarray, torch.Tensor)):
            values = values.tolist()
        if not isinstance(values, (list, tuple)):
            wanted = f"expected a list of numbers, one for each of {len(pairs)} responses"
            raise UsageError(f"{what} returned {_shown(values)}, {wanted}\n{first}")
        if len(values) != len(pairs):
            raise UsageError(f"{what} returned {len(values)} numbers for {len(pairs)} responses\n{first}")
        return [*values]

    def _numbers(self, values: Sequence[Any], pairs: Sequence[tuple[Record, str]]) -> np.ndarray:
        """(M,) float64, NaN for None; `pairs`: whose each is."""
        what = f"{self.place}: {self.reference}"
        silent = np.array([value is None for value in values], bool)
        numbers = [math.nan if value is None else _number(value) for value in values]
        for value, number, pair in zip(values, numbers, pairs, strict=True):
            if number is None:
                raise UsageError(f"{what} returned {_shown(value)} for a response, expected a number\n{shown_answer(pair)}")
        scores = np.array(numbers, np.float64)
        check_finite(scores, pairs, what, silent)
        return scores

    def _called(self, answers: Answers, more: Mapping[str, list[Any]]) -> Any:
        """What the function returns for all responses, each argument a list with an entry for each of them."""
        pairs, rows, taken = answers.pairs, answers.columns, taken_by(self.function, self.place)
        ours: dict[str, list[Any]] = {
            "prompts": [plain_prompt(record.prompt) for record, _ in pairs],
            "responses": [text for _, text in pairs],
            "messages": [[turn.plain() for turn in as_turns(record.prompt)] for record, _ in pairs],
            "ended": [ended for own in answers.ended for ended in own],
            **more,
        }
        given = {parameter: ours.get(name, [row.get(name) for row in rows]) for parameter, name in taken.given.items()}
        if taken.all_columns:
            rest = dict.fromkeys(name for row in rows for name in row if name not in (*given, *ours))
            given |= {name: [row.get(name) for row in rows] for name in rest}
        if not inspect.iscoroutinefunction(self.function):
            return self.function(**given)
        return asyncio.run(self._each(given, len(pairs)))

    async def _each(self, given: dict[str, list[Any]], count: int) -> list[Any]:
        """One call a response, `parallel` at once."""
        slots = asyncio.Semaphore(self.parallel)

        async def one(k: int) -> Any:
            async with slots:
                call = self.function(**{name: [values[k]] for name, values in given.items()})
                value = await asyncio.wait_for(call, self.timeout)
            value = value.tolist() if isinstance(value, (np.ndarray, torch.Tensor)) else value
            return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value

        return await asyncio.gather(*map(one, range(count)))


@dataclass(frozen=True)
class DenseFunction(DenseScorer, RewardFunction):
    """A function that returns a list of numbers for each response: one for each of its `steps`, or of its `tokens`, as texts."""

    separator: str | None = None  # see DenseScorer
    tokenizer: Any = None  # the policy's

    @property
    def source(self) -> dict[str, Any]:
        return super().source | {"per": "token" if self.separator is None else "step", "separator": self.separator}

    def parts(self, answers: Answers) -> list[np.ndarray]:
        texts, found, what = [text for _, text in answers.pairs], [], "tokens" if self.separator is None else "steps"
        # Tokens as they were drawn, their end included; of responses that are kept as texts alone, those of the text.
        ids = [response.tolist() for tree in answers.trees for response in tree.responses] or tokenise(self.tokenizer, texts)
        pieces = [[str(self.tokenizer.decode([i])) for i in own] for own in ids]
        if self.separator is not None:
            pieces = [[text[a:b] for a, b in step_spans(text, self.separator)] or [""] for text in texts]
        values = self._returned(answers, {what: pieces})
        for value, own, pair in zip(values, pieces, answers.pairs, strict=True):
            numbers = [*np.atleast_1d(np.array(value, dtype=object))]
            if len(numbers) != len(own) and value is not None:
                said = f"{self.reference} returned {len(numbers)} numbers for {len(own)} {what}\n{shown_answer(pair)}"
                raise UsageError(f"{self.place}: {said}")
            found.append(self._numbers(numbers, [pair] * len(numbers)))
        return found


class Taken(NamedTuple):
    """What a function is called with."""

    given: dict[str, str]  # parameter → one of OURS, or a column
    optional: frozenset[str]  # columns that no row need have: then it is given Nones
    all_columns: bool  # it takes what columns there are


def taken_by(function: Function, what: str) -> Taken:
    """What the function's parameters name, but for those with a default of their own, other than None: they are its settings.

    Where none is called `responses`, two alone are prompts and responses, unless the first is called as responses are elsewhere.
    UsageError: it cannot be called so.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise UsageError(f"{what}: Python cannot tell its parameters; write it as def f(prompts, responses)") from None
    named = {name: each for name, each in parameters.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    needed = [name for name, each in named.items() if each.default is each.empty]
    optional = frozenset(name for name, each in named.items() if each.default is None and name not in OURS)
    given = {name: name for name in named if name in (*OURS, *needed, *optional)}
    if "responses" not in named:
        given |= dict(zip(needed, ("prompts", "responses"), strict=False))
    unclear = len(needed) != 2 or needed[0].startswith(("completion", "response", "answer", "output"))
    if ("responses" not in named and unclear) or any(each.kind is each.POSITIONAL_ONLY for each in parameters.values()):
        raise UsageError(
            f"{what} takes ({', '.join(map(str, parameters.values()))}); expected def f(prompts, responses), and beside these "
            "two `messages`, `ended` or columns of the rows by their names"
        )
    return Taken(given, optional, any(each.kind is each.VAR_KEYWORD for each in parameters.values()))


def load_function(reference: str, place: str) -> Function:
    """The function `file.py:name`; a file is imported once, however many of its functions are asked for.

    UsageError: no such file, one that cannot be imported, or no such function in it.
    """
    file, _, name = reference.rpartition(":")
    if not file or not name:
        raise UsageError(f"{place}: expected file.py:name, found {reference}")
    members = vars(_import_file(file, place))
    if name not in members:
        advice = did_you_mean(name, [own for own, value in members.items() if callable(value)], "define it there")
        raise UsageError(f"{place}: {file} has no function {name}. {advice}")
    function: Function = members[name]
    if not callable(function):
        raise UsageError(f"{place}: {name} in {file} is {_shown(function)}, no function")
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


def _shown(value: Any) -> str:
    return "None" if value is None else f"{shortened(repr(value))} ({type(value).__name__})"
