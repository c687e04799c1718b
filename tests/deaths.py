"""Runs that die, as far as their folders can tell, at chosen places; and a run that dies at every one of them."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.rollout import experience
from rlhf_cli.stages import training
from rlhf_cli.training import loop
from tests.tiny import rlhf

PLACES: dict[str, Any] = {"optimise": loop, "save_checkpoint": loop, "evaluate": training, "gather_shares": experience}
"""Function → the module whose name for it is called; `gather_shares`: once responses are drawn, and once they are scored."""


def die_before(patch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """The process dies before the `call`-th call of a function of PLACES."""
    original, calls = getattr(PLACES[name], name), [0]

    def dying(*arguments: Any, **settings: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    patch.setattr(PLACES[name], name, dying)


def signal_before(patch: pytest.MonkeyPatch, step: int, update: int = 0) -> None:
    """SIGTERM arrives before this update of a step."""
    original = loop.optimise

    def signalled(*arguments: Any, **settings: Any) -> Any:
        if (arguments[-1].step, arguments[-1].number) == (step, update):
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **settings)

    patch.setattr(loop, "optimise", signalled)


def die_and_resume(words: list[str | Path], run: Path, name: str, call: int) -> None:
    """A run in the folder `run` that dies once, and is resumed to its end."""
    with pytest.MonkeyPatch.context() as patch:
        die_before(patch, name, call)
        assert rlhf(*words, "--output", run) == 130
    assert not (run / "manifest.json").exists()
    assert rlhf(*words, "--output", run, "--resume") == 0


def die_everywhere(words: list[str | Path], run: Path) -> Counter[str]:
    """A chain of processes in the folder `run`, each of which dies before the first call that none has died before.

    Returns how often one died before a function of PLACES, the last process having come to its end.
    """
    died: set[tuple[Any, ...]] = set()
    while True:
        with pytest.MonkeyPatch.context() as patch:
            _die_before_a_new_call(patch, run, died)
            code = rlhf(*words, "--output", run, *(["--resume"] if died else []))
        if code == 0:
            return Counter(name for name, *_ in died)
        assert code == 130 and not (run / "manifest.json").exists()


def _die_before_a_new_call(patch: pytest.MonkeyPatch, run: Path, died: set[tuple[Any, ...]]) -> None:
    """A call is known by its function, and by its number since the last update or, where that is later, checkpoint."""
    since: Any = _last_checkpoint(run)
    calls: Counter[str] = Counter()

    def watch(name: str, original: Any) -> Any:
        def dying(*arguments: Any, **settings: Any) -> Any:
            nonlocal since
            if name == "optimise":
                since = arguments[-1].step, arguments[-1].number
                calls.clear()
            calls[name] += 1
            place = name, since, calls[name]
            if place not in died:
                died.add(place)
                raise KeyboardInterrupt
            result = original(*arguments, **settings)
            if name == "save_checkpoint":
                since = _last_checkpoint(run)
                calls.clear()
            return result

        return dying

    for name, module in PLACES.items():
        patch.setattr(module, name, watch(name, getattr(module, name)))


def _last_checkpoint(run: Path) -> str | None:
    return max((path.name for path in (run / "checkpoints").glob("step-*")), default=None)
