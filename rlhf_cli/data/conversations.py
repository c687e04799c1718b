"""Turns of conversations as files write them, in the one form that chat templates take."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rlhf_cli.data.meaning import LostMeaning, check_turn
from rlhf_cli.data.records import Answer, BadRow, Message, Prompt, a_list, a_text, kind_of, shortened

SPEAKERS = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "ipython"), "tool"),
}
"""Who speaks, as files name them → the role that chat templates know."""

FOLLOWS = {"": ("user", "assistant"), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
"""Who may speak after whom, once the system has; "": who may begin."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of what the assistant thinks before it answers. A template reads one of them, so each is given."""

NAMES_OF_TOOLS = {"input_schema": "parameters"}
LEARNED = ("weight", "loss_weight", "train")
TURN_MARK = re.compile(r"\n\n(Human|Assistant):")


def messages(value: Any, name: str) -> tuple[Message, ...]:
    """The turns of a list of {role, content} or {from, value}, or of such a list as JSON text, in any order.

    BadRow for what is no turn; LostMeaning where a turn says more than is read.
    """
    turns: list[Message] = []
    for number, turn in enumerate(a_list(parsed(value, name) if type(value) is str else value, name), start=1):
        turns += _turn(turn, name, number)
    return tuple(turns)


def _turn(turn: Any, name: str, number: int) -> list[Message]:
    """A turn; several where results of tools stand in one with other text."""
    at, called = f"turn {number}", f"a turn of {name}"
    if type(turn) is not dict:
        raise BadRow(f"{called} is {kind_of(turn)}, expected an object with role and content", at)
    if len(turn) == 2 and turn.get("role") in ("user", "assistant") and type(turn.get("content")) is str:
        return [Message(turn["role"], a_text(turn["content"], called, at))]
    keys = [next((key for key in names if key in turn), None) for names in (("role", "from"), ("content", "value"))]
    if None in keys and not (keys[0] and turn.get("tool_calls")):
        raise BadRow(f"{called} has no '{('role', 'content')[keys.index(None)]}'", at)
    written, content = turn[keys[0]], turn.get(keys[1])
    role = SPEAKERS.get(written.lower()) if type(written) is str else None
    if role is None:
        raise BadRow(f"a role of {name} is not system, user, assistant or tool", f"{at}: {shortened(written)}")
    text, thoughts, calls, results = content, None, list[dict[str, Any]](), list[Message]()
    if type(content) is list and role != "tool":
        text, thoughts, calls, results = _parts(content, called, at)
    learned = True
    if turn.keys() - {*keys}:
        check_turn(turn, name, number)
        thoughts = next((turn[key] for key in REASONING if turn.get(key)), thoughts)
        calls = calls + _calls(turn.get("tool_calls") or [], called, at) + _calls(turn.get("function_call") or [], called, at)
        learned = _is_learned(turn, name, number)
    if written == "function_call":
        text, calls = "", _calls(text, called, at)
    if role == "tool" and text is not None and type(text) is not str:
        text = json.dumps(text, ensure_ascii=False) if type(text) is not list else _result(text)
    if not (text in (None, "") and (calls or results or role in ("tool", "system"))):
        a_text(text, called, at)
    extra: dict[str, Any] = dict.fromkeys(REASONING, a_text(thoughts, f"the reasoning in {called}", at)) if thoughts else {}
    extra |= {"tool_calls": calls} if calls else {}
    if role == "tool":
        extra |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    kept = a_text(json.dumps(extra, ensure_ascii=False), called, at) if extra else ""
    own = [Message(role, text or "", kept, learned)]
    return [*results, *(own if text or calls or not results else [])]


def _parts(parts: Sequence[Any], called: str, at: str) -> tuple[str, str | None, list[dict[str, Any]], list[Message]]:
    """Text, reasoning, calls and results of tools in the parts of a turn's content."""
    text, thoughts, calls, results = list[str](), list[str](), list[dict[str, Any]](), list[Message]()
    for part in parts:
        kind = part.get("type", "text") if type(part) is dict else kind_of(part)
        match kind:
            case "text" | "input_text" | "output_text" if type(part.get("text")) is str:
                text.append(part["text"])
            case "thinking" | "reasoning" if type(part.get(kind)) is str:
                thoughts.append(part[kind])
            case "tool_use":
                calls += _calls(part, called, at)
            case "tool_result":
                extra = {"tool_call_id": part["tool_use_id"]} if part.get("tool_use_id") else {}
                results.append(Message("tool", _result(part.get("content")), json.dumps(extra) if extra else ""))
            case "text" | "input_text" | "output_text" | "thinking" | "reasoning":
                raise BadRow(f"{called} has a part of type {kind} without a text", at)
            case _:
                raise BadRow(f"{called} has a part of type {shortened(kind).strip(chr(39))}, and only text is read", at)
    return "".join(text), "".join(thoughts) or None, calls, results


def _result(content: Any) -> str:
    if isinstance(content, list) and content and all(isinstance(part, dict) and "text" in part for part in content):
        return "".join(str(part["text"]) for part in content)
    return content if type(content) is str else json.dumps(content, ensure_ascii=False)


def _calls(value: Any, called: str, at: str) -> list[dict[str, Any]]:
    """Calls of functions as chat templates take them: {"type", "function": {"name", "arguments": an object}}."""
    value = parsed(value, f"a call in {called}") if type(value) is str else value
    calls = []
    for call in [value] if type(value) is dict else value:
        function = call.get("function", call) if type(call) is dict else None
        if type(function) is not dict or type(function.get("name")) is not str:
            raise BadRow(f"a call in {called} names no function", at)
        given = [function[key] for key in ("arguments", "input", "parameters") if function.get(key) is not None]
        if not given and (others := sorted(function.keys() - {"name", "id", "type", "arguments", "input", "parameters"})):
            raise BadRow(f"a call in {called} has no arguments", f"{at}: it has {', '.join(others)}")
        arguments = given[0] if given else {}
        if type(arguments) is str:
            arguments = parsed(arguments, f"the arguments of a call in {called}") if arguments.strip() else {}
        identity = {"id": call["id"]} if call.get("id") else {}
        calls.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _is_learned(turn: Mapping[str, Any], name: str, number: int) -> bool:
    """Is the turn to be supervised? LostMeaning for a weight between nothing and all."""
    for key in LEARNED:
        if turn.get(key) is not None and turn[key] not in (0, 1):
            raise LostMeaning(key, f"{shortened(turn[key])} is neither 0 nor 1", f" in turn {number} of {name}")
    return all(turn.get(key) is None or bool(turn[key]) for key in LEARNED)


def functions(value: Any) -> list[Any]:
    """The functions that the model may call, of a list or of JSON text; each as {"type": "function", "function": {…}}."""
    found = a_list(parsed(value, "'tools'") if type(value) is str else value, "'tools'")
    for tool in found:
        function = tool.get("function", tool) if type(tool) is dict else None
        if type(function) is not dict or type(function.get("name")) is not str:
            raise BadRow("an entry of 'tools' names no function", shortened(tool))
    own = [tool.get("function", tool) for tool in found]
    return [{"type": "function", "function": {NAMES_OF_TOOLS.get(k, k): v for k, v in tool.items()}} for tool in own]


def is_talk(value: Any) -> bool:
    """Is it a list of turns, as JSON text?"""
    if type(value) is not str or not value.lstrip().startswith("[{") or not value.rstrip().endswith("}]"):
        return False
    with suppress(ValueError, RecursionError):
        return all(type(turn) is dict and bool(turn.keys() & {"role", "from"}) for turn in json.loads(value))
    return False


def parsed(text: str, name: str) -> Any:
    """A value that is written as JSON text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow(f"{name} is text that is not JSON", shortened(text)) from None


def check_order(turns: Sequence[Message], name: str) -> None:
    """System turns first, then user and assistant by turns, whoever begins; tools answer the assistant."""
    first = next((i for i, turn in enumerate(turns) if turn.role not in ("system", "developer")), len(turns))
    before = ""
    for number, turn in enumerate(turns[first:], start=first + 1):
        if turn.role not in FOLLOWS[before]:
            what = f"turn {number} is {turn.role}, expected {' or '.join(FOLLOWS[before])}"
            raise BadRow(f"wrong role order in {name}", what)
        before = turn.role


def conversation(turns: tuple[Message, ...], name: str) -> tuple[tuple[Message, ...], Answer]:
    """The prompt and the last assistant turn of a whole conversation."""
    check_order(turns, name)
    if turns[-1].role != "assistant":
        some = any(turn.role == "assistant" for turn in turns)
        raise BadRow(f"{name} does not end in an assistant turn" if some else f"{name} has no assistant turn")
    return turns[:-1], turns[-1].content if turns[-1][2:] == ("", True) else turns[-1]


def up_to_learned(turns: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """Without the turns after the last one that is learned: nothing before it depends on them."""
    learned = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.learned]
    if not learned and any(turn.role == "assistant" for turn in turns):
        raise BadRow(f"every assistant turn of {name} has weight 0")
    return turns[: learned[-1] + 1] if learned and turns[-1].role == "assistant" else turns


def as_spoken(prompt: Prompt) -> Prompt:
    r"""The turns of a text that is "Human: … \n\nAssistant:"; any other prompt as it is.

    >>> [turn[:2] for turn in as_spoken("\n\nHuman: 2+2?\n\nAssistant:")]
    [('user', '2+2?')]
    """
    if not isinstance(prompt, str) or not prompt.lstrip().startswith("Human:"):
        return prompt
    text = prompt.strip()
    turns, _ = transcript(text + " …" if text.endswith("\n\nAssistant:") else text + "\n\nAssistant: …", "'prompt'")
    return turns


def transcript(value: Any, name: str) -> tuple[tuple[Message, ...], Answer]:
    r"""The prompt and the last assistant turn of "\n\nHuman: … \n\nAssistant: …", stripped."""
    before, *parts = TURN_MARK.split("\n\n" + a_text(value, name).strip())
    if before.strip() or not parts:
        raise BadRow(f"{name} is not a transcript that begins with 'Human:'")
    turns = []
    for i, (speaker, content) in enumerate(zip(parts[::2], parts[1::2], strict=True), start=1):
        if not content.strip():
            raise BadRow(f"{name} has an empty turn", f"turn {i}")
        turns.append(Message(SPEAKERS[speaker.lower()], content.strip()))
    return conversation(tuple(turns), name)


def with_system(prompt: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    """The prompt after a system turn of that text; BadRow if it has another one."""
    own = [turn.content for turn in prompt if turn.role in ("system", "developer")]
    if own and own != [text]:
        raise BadRow("the row has a system turn and another text in the column 'system'")
    return prompt if own else (Message("system", text), *prompt)
