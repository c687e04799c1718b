"""Python functions of somebody's own as terms of a reward."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch

from rlhf_cli import sections
from rlhf_cli.data.records import PlainPrompt, plain_prompt
from rlhf_cli.errors import RunError, UsageError
from rlhf_cli.files import sha256_file
from rlhf_cli.rollout.rewards import Answers, PolicyText, TextTerm, check_finite, shortened, shown_answer
from rlhf_cli.suggest import closest, did_you_mean

Function = Callable[[list[PlainPrompt], list[str]], Any]


@dataclass(frozen=True)
class RewardFunction(TextTerm):
    """A Python function of lists of prompts and responses, which returns a number for each response.

    A prompt is a str where it is one text or one user turn, else its conversation as a list of {"role", "content"}.
    """

    reference: str  # file.py:name
    function: Function

    @classmethod
    def find(cls, reward: sections.Reward, name: str, place: str, policy: PolicyText) -> Self:
        """The function of `reward.function`. UsageError: see `load_function`."""
        assert reward.function is not None
        return cls(name, reward.weight, place, reward.function, load_function(reward.function, place))

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
        """(M,) float64, tree by tree.

        UsageError: the function raises, or returns something else than a number for each response.
        NumberError: one of the numbers is not finite.
        """
        pairs = answers.pairs
        if not pairs:
            return np.zeros(0)
        what, first = f"{self.place}: {self.reference}", f"the first: {shown_answer(pairs[0])}"
        try:
            values = self.function([plain_prompt(record.prompt) for record, _ in pairs], [text for _, text in pairs])
        except RunError:  # a signal's
            raise
        except (Exception, SystemExit) as error:
            said = _raised(error, self.reference.rpartition(":")[0])
            raise UsageError(f"{what} failed on {len(pairs)} responses\n{said}\n{first}") from error
        if isinstance(values, (np.ndarray, torch.Tensor)):
            values = values.tolist()
        if isinstance(values, tuple):
            values = list(values)
        if not isinstance(values, list):
            raise UsageError(
                f"{what} returned {_shown(values)}, expected a list of numbers, one for each of {len(pairs)} responses\n{first}"
            )
        if len(values) != len(pairs):
            raise UsageError(f"{what} returned {len(values)} numbers for {len(pairs)} responses\n{first}")
        numbers = [_number(value) for value in values]
        for value, number, pair in zip(values, numbers, pairs, strict=True):
            if number is None:
                raise UsageError(f"{what} returned {_shown(value)} for a response, expected a number\n{shown_answer(pair)}")
        scores = np.array(numbers, np.float64)
        check_finite(scores, pairs, what)
        return scores


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
