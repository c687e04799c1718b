"""`rlhf chat`: a dialogue with one model, or with several side by side, read from the top as it happens."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cli import sections
from rlhf_cli.console import Console, clean
from rlhf_cli.data.encode import AS_DRAWN, encode
from rlhf_cli.data.records import Message, Record
from rlhf_cli.data.templates import Template
from rlhf_cli.errors import Stopped, UsageError, prefixed
from rlhf_cli.figures import count
from rlhf_cli.files import disk_errors, to_json
from rlhf_cli.labels.terminal import keys
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.models.load import is_reward_model, load_config, load_tokenizer, positions_of, quiet_libraries, resolve_dtype
from rlhf_cli.models.placement import FrozenModels
from rlhf_cli.ranks import Ranks
from rlhf_cli.recipe.stages import TRAINING_STAGES
from rlhf_cli.rollout.generate import Request, TransformersEngine
from rlhf_cli.runs.parents import Start, base_model, recorded_template, resolve_start

HELP = """/reset       begin a new dialogue
/save        write the dialogue to the file of --save; of two models: which answer is better
/save a      the same without a question: a, b or tie
/help        this list
/quit        end, as Ctrl-D does
Ctrl-C stops an answer. A message that begins with / has a space before it."""
HALF = "\ufffd"
"""What a character is decoded as whose last byte is not there yet."""
SEED = 0
"""Equal messages in equal places get equal answers; all models draw with the same random numbers."""


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    system: str | None
    temperature: float
    top_p: float
    max_new_tokens: int
    save: Path


@dataclass
class Speaker:
    """A model and its dialogue."""

    name: str
    path: str
    start: Start
    tokenizer: Any
    template: Template
    positions: int | None  # tokens that it can take at most, where it has such a limit
    settings: Settings
    turns: list[Message] = field(default_factory=list)

    @classmethod
    def find(cls, name: str, path: str, settings: Settings) -> Speaker:
        """UsageError: the path is no policy, or its chat template cannot write a dialogue."""
        start = resolve_start(path, None, "chat", TRAINING_STAGES)
        if is_reward_model(str(start.adapter or start.base), start.revision):
            raise UsageError(f"chat: {path} is a reward model: it scores answers and writes none. name a policy")
        tokenizer, config = load_tokenizer(start.tokenizer, start.revision, False), load_config(start.base, start.revision, False)
        template = recorded_template(start, tokenizer, path, "chat")
        if template.text is None and settings.system is not None:
            raise UsageError(f"chat: {path} was trained without a chat template, so it knows no system turn. leave out --system")
        found = cls(name, path, start, tokenizer, template, positions_of(config), settings)
        found.reset()
        with prefixed(f"chat: {path}"):
            found.ids([*found.turns, Message("user", "Hi")])
        return found

    def reset(self) -> None:
        self.turns = [] if self.settings.system is None else [Message("system", self.settings.system)]

    def ids(self, turns: Sequence[Message]) -> np.ndarray:
        """The tokens that an answer to the last turn continues. UsageError: the chat template cannot write the turns."""
        prompt = tuple(turns) if self.template.text is not None else turns[-1].content
        record = Record(prompt, (), "this dialogue")
        return encode([record], self.tokenizer, self.template, AS_DRAWN, responses="none", cache=None).trees[0].prompt

    def fitted(self, console: Console) -> tuple[np.ndarray, int]:
        """The dialogue's tokens, and how many an answer may have; without the oldest exchanges, where these would leave no room.

        UsageError: the last message alone is too long.
        """
        most, first, turns = self.settings.max_new_tokens, int(self.settings.system is not None), [*self.turns]
        if self.positions is None:
            return self.ids(turns), most
        while len(ids := self.ids(turns)) + min(most, self.positions // 2) > self.positions and len(turns) > first + 1:
            del turns[first : first + 2]
        if len(ids) >= self.positions:
            raise UsageError(f"{self.path} takes {self.positions} tokens, this message has {len(ids)}. write a shorter one")
        if forgotten := (len(self.turns) - len(turns)) // 2:
            console.note(f"{self.path} takes {self.positions} tokens: it forgets the oldest {count(forgotten, 'exchange')}")
        self.turns = turns
        return ids, min(most, self.positions - len(ids))

    def answer(self, text: str, host: Backbone, number: int, stopped: Callable[[], bool], console: Console) -> None:
        """Print the answer to a text, the `number`-th of all messages, as it is drawn, and remember both.

        UsageError: there can be none, and the text is forgotten.
        """
        before = self.turns if self.template.text is not None else []
        self.turns = [*before, Message("user", text)]
        try:
            prompt, most = self.fitted(console)
        except UsageError:
            self.turns.pop()
            raise
        ends, drawn, shown = host.stop_ids(self.tokenizer, self.template), list[int](), 0

        def known() -> str:
            return str(self.tokenizer.decode([each for each in drawn if each not in ends], skip_special_tokens=True))

        def tell(_: np.ndarray, ids: np.ndarray) -> None:
            nonlocal shown
            drawn.append(int(ids[0]))
            if not (now := known()).endswith(HALF):
                print(clean(now[shown:]), end="", flush=True)
                shown = len(now)
            if stopped():
                raise Stopped("[stopped]", signal.SIGINT)

        warping = sections.Warping(top_p=self.settings.top_p)
        request = Request([prompt], [number], 1, most, self.settings.temperature, ends, SEED, warping)
        try:
            ((response,),) = TransformersEngine(host, self.name).generate(request, tell=tell)
            full = "no more fit" if most < self.settings.max_new_tokens else "--max-new-tokens"
            said = "" if response.ended else f"[cut after {count(most, 'token')}: {full}]"
        except Stopped as early:
            said = str(early)
        print(clean(known()[shown:]), flush=True)
        if said:
            console.note(said)
        self.turns.append(Message("assistant", known()))


def chat(paths: Sequence[str], settings: Settings) -> None:
    """Answer what is typed, or each line of a pipe, until there is no more.

    UsageError: a path is no policy, or the folder of the file to save to is missing.
    """
    quiet_libraries()
    if not settings.save.absolute().parent.is_dir():
        raise UsageError(f"--save {settings.save}: there is no folder {settings.save.parent}")
    console, device = Console(), Ranks(expected=False).device
    speakers = [Speaker.find(chr(ord("A") + number), path, settings) for number, path in enumerate(paths)]
    frozen = FrozenModels(sections.Model(path=paths[0]), resolve_dtype("auto", device), device)
    for speaker in speakers:
        with prefixed(f"chat: {speaker.path}"):
            base_model(speaker.start)
            frozen.add(speaker.name, speaker.start)
    typed = sys.stdin.isatty() and console.live
    if typed:
        console.say(f"{', '.join(paths)}. /help lists what can be typed; Ctrl-D ends.")
    for number, line in enumerate(_lines(typed)):
        if line.startswith("/"):
            command, *rest = line.split()
            if command == "/quit":
                return
            console.note(_obey(command, "".join(rest).lower(), speakers, typed))
            continue
        for speaker in speakers:
            if len(speakers) > 1:
                console.plan([(f"{speaker.name}  {speaker.path}", [])])
            try:
                with _interruptible(typed) as stopped:
                    speaker.answer(line.strip(), frozen.hosts[speaker.name], number, stopped, console)
            except UsageError as error:
                console.error(str(error))


def _lines(typed: bool) -> Iterator[str]:
    """What is typed, with editing and a history, or what a pipe brings; empty lines are left out."""
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() uses it)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            if (line := input("> " if typed else "")).strip():
                yield line
        except EOFError:
            break
        except KeyboardInterrupt:
            print()
            raise
    if typed:
        print()


@contextlib.contextmanager
def _interruptible(typed: bool) -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C of somebody who types is remembered; what is yielded tells. A second one ends the program."""
    pressed = list[int]()

    def press(number: int, _: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press) if typed else None
    try:
        yield lambda: bool(pressed)
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _obey(command: str, choice: str, speakers: Sequence[Speaker], typed: bool) -> str:
    """Do what a command says; what is to be said of it."""
    if command == "/save":
        return _save(speakers, choice, typed)
    if command == "/reset":
        for speaker in speakers:
            speaker.reset()
        return "a new dialogue begins"
    unknown = f"{command} is no command; /help lists them. A message that begins with / has a space before it"
    return HELP if command == "/help" else unknown


def _save(speakers: Sequence[Speaker], choice: str, typed: bool) -> str:
    """Write the dialogue, or of two models the pair of their last answers, as a row; what became of it."""
    first, last = speakers[0], speakers[-1]
    said = [speaker.turns[-1] for speaker in speakers if speaker.turns]
    if len(said) < len(speakers) or any(turn.role != "assistant" or not turn.content.strip() for turn in said):
        return "nothing is saved: there is no answer yet, or an empty one"
    if len(speakers) == 1:
        return _append(first.settings.save, {"messages": [turn.plain() for turn in first.turns]})
    if len(speakers) > 2:
        return f"nothing is saved: a pair is of two models, and these are {len(speakers)}"
    if first.turns[:-1] != last.turns[:-1]:
        return "nothing is saved: before the last answers the two dialogues differ. /reset, or choose after every answer"
    if first.turns[-1] == last.turns[-1]:
        return "nothing is saved: the two answers are the same"
    if not choice and typed:
        with keys() as key:
            print("which answer is better? a, b, or t for a tie: ", end="", flush=True)
            choice = key()
        print(clean(choice.strip()))
    if choice not in ("a", "b", "t", "tie"):
        return "nothing is saved: name the better answer, a, b or tie"
    better, worse = (last, first) if choice == "b" else (first, last)
    row: dict[str, Any] = {"prompt": [turn.plain() for turn in first.turns[:-1]]}
    row |= {"chosen": [better.turns[-1].plain()], "rejected": [worse.turns[-1].plain()]}
    saved = _append(first.settings.save, row | ({"probability": 0.5} if choice[0] == "t" else {}))
    worse.turns = [*better.turns]
    return f"{saved}; both go on from the answer of {better.name}"


def _append(path: Path, row: dict[str, Any]) -> str:
    with disk_errors(path), path.open("ab") as file:
        file.write(to_json(row) + b"\n")
    return f"a row is saved to {path}"
