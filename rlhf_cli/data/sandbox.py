"""Renders chat templates, which are code of unknown origin: transformers' sandbox, with limits on time, memory and size."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from jinja2 import TemplateSyntaxError

from rlhf_cli.data.outlines import outline
from rlhf_cli.data.records import BadRow, Message

SECONDS = 2.0  # of CPU time for one row; a long conversation needs milliseconds
HEADROOM = 1 << 30  # bytes of address space that rendering may add to the process
SLACK, FACTOR = 1_000_000, 4  # a rendered text has at most SLACK + FACTOR · (characters of its messages) characters

CLOCK = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
"""Templates that ask for today's date get a fixed one (Llama 3's own default): tokens must not depend on the day of the run."""


class TookTooLong(BadRow):
    """The template used up its CPU time."""

    def __init__(self) -> None:
        super().__init__("the chat template takes too long", f"more than {SECONDS:g} s of CPU time")


def _stop(signal_number: int, frame: FrameType | None) -> None:
    raise TookTooLong


def _start() -> None:
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)


@contextmanager
def time_limit() -> Iterator[Callable[[], None]]:
    """Ends the block with TookTooLong after SECONDS of CPU time, counted anew whenever what it gives is called.

    In other threads than the main one there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.signal(signal.SIGVTALRM, _stop)
    _start()
    try:
        yield _start
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def ends_in_time(attempt: Callable[[], object]) -> bool:
    """Does it end, one way or another, within some SECONDS of CPU time of a child process? Linux only: elsewhere True.

    A template may hold a computation that no handler of ours can interrupt, such as 9 ** 9 ** 9, or that Jinja does while it
    compiles, and passes over what is raised there: the kernel ends the child.
    """
    if sys.platform != "linux":
        return True
    import resource

    try:
        child = os.fork()
    except OSError:
        return True  # no memory or no process left for one: the rows have their limit all the same
    if child == 0:
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(SECONDS) + 1, math.ceil(SECONDS) + 2))
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            attempt()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status) == 0


@contextmanager
def memory_limit() -> Iterator[None]:
    """Lets the process grow by HEADROOM within the block; more is a MemoryError. Linux only: elsewhere no limit."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + HEADROOM
    tighter = wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)
    resource.setrlimit(resource.RLIMIT_AS, (tighter, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def render(tokenizer: Any, text: str, messages: Sequence[Message], given: Mapping[str, Any], *, generation: bool) -> str:
    """The conversation as one string; what goes wrong inside the template is a BadRow, its syntax a TemplateSyntaxError.

    `given`: what else the template is given, tools and options.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    clocked = CLOCK + text if "strftime_now" in text else text

    def written(turns: Sequence[Message]) -> str:
        return str(
            _compile_jinja_template(clocked).render(
                messages=[turn.plain() for turn in turns],
                add_generation_prompt=generation,
                **{"tools": None, "documents": None, **tokenizer.special_tokens_map, **given},
            )
        )

    try:
        if not given and (found := outline(tokenizer, clocked, messages, generation, written)):
            return found.fill(messages)
        # Not by apply_chat_template, which copies all that it is given, and takes twice the time.
        rendered = written(messages)
    except (TookTooLong, TemplateSyntaxError):
        raise
    except MemoryError:
        raise BadRow("the chat template takes too much memory", f"more than {HEADROOM >> 20} MiB") from None
    except Exception as error:  # a template may raise anything
        raise BadRow("the chat template fails", f"{type(error).__name__}: {error}"[:200]) from error
    limit = SLACK + FACTOR * (sum(len(part) for message in messages for part in message[1:3]) + len(str(given)))
    if len(rendered) > limit:
        raise BadRow("the chat template writes too much", f"{len(rendered):,} characters, at most {limit:,} are allowed")
    return rendered
