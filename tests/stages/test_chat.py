"""`rlhf chat`: what is answered, remembered, shown and saved, in pipes and in a terminal."""

from __future__ import annotations

import builtins
import io
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_cli import sections
from rlhf_cli.console import clean
from rlhf_cli.models import placement
from rlhf_cli.models.placement import FrozenModels
from rlhf_cli.rollout.generate import Request, Response, TransformersEngine
from rlhf_cli.runs.parents import resolve_start
from tests.stages.tiny_runs import make_home
from tests.terminal import terminal
from tests.tiny import make_model, rlhf, write_recipe

MESSAGES = ("green sea", "fish bird")
SHORT = ("--max-new-tokens", "8")
GREEDY = (*SHORT, "--temperature", "0")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`sft` and `dpo` are adapters on one base, `rm` is a reward model; `small` takes 96 tokens, and hardly ever ends."""
    home = make_home(tmp_path_factory.mktemp("home"), "sft", "dpo", "rm", layers=2)
    make_model(home / "small", 3, max_position_embeddings=96)
    return home


@pytest.fixture(autouse=True)
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


class Said:
    """What a chat with lines from a pipe wrote."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, lines: Sequence[str], *arguments: str | Path, code: int = 0) -> tuple[list[str], str]:
        """The lines on stdout, and stderr without what is said of answers that were cut."""
        self._monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        self._capsys.readouterr()
        assert rlhf("chat", *arguments) == code
        out, err = self._capsys.readouterr()
        return out.split("\n")[:-1], "".join(line for line in err.splitlines(keepends=True) if "[cut after 8 " not in line)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    return Said(monkeypatch, capsys)


def plain_dialogue(run: str, messages: Sequence[str], system: str | None = None) -> list[dict[str, str]]:
    """All turns of a greedy dialogue by plain transformers and PEFT, every prompt by `apply_chat_template`."""
    tokenizer = AutoTokenizer.from_pretrained(f"{run}/model")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), f"{run}/model")
    ends = json.loads(Path(f"{run}/model/generation_config.json").read_text())["eos_token_id"]
    turns = [] if system is None else [{"role": "system", "content": system}]
    for message in messages:
        turns.append({"role": "user", "content": message})
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            drawn = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=ends, pad_token_id=0)[0, ids.shape[1] :]
        kept = [each for each in drawn.tolist() if each not in ends]
        turns.append({"role": "assistant", "content": tokenizer.decode(kept, skip_special_tokens=True)})
    return turns


def test_a_dialogue_is_that_of_plain_transformers(said: Said, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    said((*MESSAGES, "/save"), "sft", *GREEDY, "--save", kept, "--system", "be old")
    (row,) = map(json.loads, kept.read_text().splitlines())
    assert row == {"messages": plain_dialogue("sft", MESSAGES, "be old")}


def test_two_adapters_share_a_base_and_keep_their_own_dialogues(
    said: Said, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loads: list[str] = []
    original = placement.load_model
    monkeypatch.setattr(placement, "load_model", lambda *given: loads.append(given[1]) or original(*given))  # type: ignore[func-returns-value]
    out, _ = said(MESSAGES, "sft", "dpo", *GREEDY)
    assert len(loads) == 1
    own = {
        name: [turn["content"] for turn in plain_dialogue(name, MESSAGES) if turn["role"] == "assistant"]
        for name in ("sft", "dpo")
    }
    assert own["sft"] != own["dpo"]
    wanted = [f"{head}\n{own[name][turn]}" for turn in (0, 1) for head, name in (("A  sft", "sft"), ("B  dpo", "dpo"))]
    assert "\n".join(out) == "\n".join(map(clean, wanted))


def test_a_draw_is_the_engines_own(said: Said) -> None:
    """At temperature 1.5 and top_p 0.9, for two first messages; the number of a message is a part of its random numbers."""
    out, _ = said((MESSAGES[0], "/reset", MESSAGES[1]), "sft", "--temperature", "1.5", "--top-p", "0.9", *SHORT)
    frozen = FrozenModels(sections.Model(path="base"), torch.float32, torch.device("cpu"))
    frozen.add("policy", resolve_start("sft", None, "test"))
    tokenizer = AutoTokenizer.from_pretrained("sft/model")
    wanted = []
    for number, message in zip((0, 2), MESSAGES, strict=True):
        turns = [{"role": "user", "content": message}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="np", return_dict=False)[0]
        ends = json.loads(Path("sft/model/generation_config.json").read_text())["eos_token_id"]
        request = Request([ids.astype(np.int32)], [number], 1, 8, 1.5, ends, 0, sections.Warping(top_p=0.9))
        (((drawn, ended, _),),) = TransformersEngine(frozen.hosts["policy"], "policy").generate(request)
        wanted.append(clean(tokenizer.decode(drawn[: len(drawn) - ended], skip_special_tokens=True)))
    assert "\n".join(out) == "\n".join(wanted) and len(set(wanted)) == 2


def test_pairs_are_saved_and_train(said: Said, tmp_path: Path) -> None:
    kept = tmp_path / "pairs.jsonl"
    lines = ("/save b", MESSAGES[0], "/save", "/save B", MESSAGES[1], "/save tie", "/reset", "sun", "moon", "/save a")
    _, err = said(lines, "sft", "dpo", *GREEDY, "--save", kept)
    assert err.splitlines() == [
        "nothing is saved: there is no answer yet, or an empty one",
        "nothing is saved: name the better answer, a, b or tie",
        f"a row is saved to {kept}; both go on from the answer of B",
        f"a row is saved to {kept}; both go on from the answer of A",
        "a new dialogue begins",
        "nothing is saved: before the last answers the two dialogues differ. /reset, or choose after every answer",
    ]
    first, second = map(json.loads, kept.read_text().splitlines())
    (user, by_sft), (_, by_dpo) = (plain_dialogue(name, MESSAGES[:1]) for name in ("sft", "dpo"))
    assert first == {"prompt": [user], "chosen": [by_dpo], "rejected": [by_sft]}
    assert second["prompt"] == [user, by_dpo, {"role": "user", "content": MESSAGES[1]}]
    assert second["probability"] == 0.5 and second["chosen"] != second["rejected"]
    recipe = write_recipe(tmp_path / "r.yaml", Path("sft"), kept, tmp_path / "run", train={"batch_size": 2})
    assert rlhf("dpo", recipe, "--check") == 0


def test_what_is_not_saved_as_a_pair(said: Said, tmp_path: Path) -> None:
    kept = tmp_path / "pairs.jsonl"
    _, err = said(("one", "/save a"), "sft", "sft", *GREEDY, "--save", kept)
    assert err == "nothing is saved: the two answers are the same\n"
    _, err = said(("one", "/save a"), "sft", "dpo", "small", *GREEDY, "--save", kept)
    assert err == "nothing is saved: a pair is of two models, and these are 3\n"
    assert not kept.exists()


def test_commands(said: Said) -> None:
    out, err = said(("/help", "/rest", " /quit is a command", "", "/quit", "never asked"), "sft", *GREEDY)
    assert err.startswith("/reset       begin a new dialogue\n")
    assert err.endswith("/rest is no command; /help lists them. A message that begins with / has a space before it\n")
    assert "\n".join(out) == clean(plain_dialogue("sft", ["/quit is a command"])[1]["content"])


REFUSED: dict[str, tuple[Sequence[str], str]] = {
    "a reward model": (["rm"], "chat: rm is a reward model: it scores answers and writes none. name a policy"),
    "one as plain transformers reads it": (["rm/model"], "chat: rm/model is a reward model: it scores answers and writes none"),
    "no folder": (["./stf"], "chat: there is no folder ./stf. did you mean sft?"),
    "no place for rows": (["sft", "--save", "no/rows.jsonl"], "--save no/rows.jsonl: there is no folder no"),
    "an impossible share": (["sft", "--top-p", "1.5"], "Invalid value for '--top-p': "),
    "no model": ([], "Missing argument 'MODEL'"),
    "a system turn without a template": (["plain", "--system", "x"], "chat: plain was trained without a chat template"),
}


@pytest.fixture(scope="module")
def plain(home: Path) -> None:
    """A run without a chat template."""
    given = {"model": {"chat_template": "none"}, "train": {"steps": 1}, "lora": {"r": 2}}
    assert rlhf("sft", write_recipe(home / "plain.yaml", home / "base", home / "rows.jsonl", home / "plain", **given)) == 0


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(said: Said, plain: None, arguments: Sequence[str], message: str) -> None:
    out, err = said(("one",), *arguments, code=2)
    assert out == [] and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_without_a_template_every_message_stands_alone(said: Said, plain: None) -> None:
    out, _ = said(("one", "two", "one"), "plain", *GREEDY)
    assert len(out) == 3 and out[0] == out[2] != out[1]


def test_the_oldest_exchanges_are_forgotten(said: Said, tmp_path: Path) -> None:
    """The model takes 96 tokens, and an exchange has more than 50. A message of 200 letters is too long, and forgotten."""
    kept = tmp_path / "kept.jsonl"
    lines = ("a" * 20, "b" * 20, "/save", "c" * 200, "d", "/save")
    _, err = said(lines, "small", "--max-new-tokens", "30", "--temperature", "0", "--save", kept)
    turns = [{"role": "user", "content": "c" * 200}]
    tokens = len(AutoTokenizer.from_pretrained("small").apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
    assert [line for line in err.splitlines() if "[cut" not in line] == [
        "small takes 96 tokens: it forgets the oldest 1 exchange",
        f"a row is saved to {kept}",
        f"error: small takes 96 tokens, this message has {tokens}. write a shorter one",
        "small takes 96 tokens: it forgets the oldest 1 exchange",
        f"a row is saved to {kept}",
    ]
    assert "[cut after 30 tokens: --max-new-tokens]" in err
    rows = [json.loads(line)["messages"] for line in kept.read_text().splitlines()]
    assert [[turn["content"] for turn in row if turn["role"] == "user"] for row in rows] == [["b" * 20], ["d"]]


def test_no_half_of_a_character_is_shown(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token of this text is a byte: the four of the smiling face come one by one."""
    text, pieces = "naïve 🙂 \x1b[2J\u202eé", list[str]()
    tokenizer = AutoTokenizer.from_pretrained("small")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)

    def telling(self: TransformersEngine, request: Request, *, tell: Any) -> Any:
        for token in ids:
            tell(np.zeros((1, 2)), np.array([token]))
        return [[Response(np.array(ids), True)]]

    def noting(*words: str, **rest: Any) -> None:
        pieces.extend(words)

    monkeypatch.setattr(TransformersEngine, "generate", telling)
    monkeypatch.setattr(builtins, "print", noting)
    said(("one",), "small")
    assert "".join(pieces) == "naïve 🙂 \\x1b[2J\\u202eé"
    assert len(pieces) > len(text) / 2 and not any("\ufffd" in piece for piece in pieces)


def test_nothing_steers_the_terminal(said: Said) -> None:
    """At temperature 3 an untrained model of bytes writes all that there is."""
    out, _ = said(("one",), "small", "--temperature", "3", "--max-new-tokens", "60")
    shown = "\n".join(out)
    assert "\\x" in shown
    assert not [letter for letter in shown if unicodedata.category(letter) == "Cc" and letter not in "\n\t"]


def test_a_terminal(home: Path, tmp_path: Path) -> None:
    """Ctrl-C stops one answer after the other, a key says which is better, and Ctrl-C at the prompt ends with 130."""
    make_model(tmp_path / "one", 0)
    make_model(tmp_path / "two", 1)
    options = ("--temperature", "0", "--max-new-tokens", "1900", "--save", "kept.jsonl")
    with terminal("chat", "one", "two", *options, folder=tmp_path) as shell:
        assert "one, two. /help lists what can be typed; Ctrl-D ends." in shell.read_until("\n> ")
        shell.type("red fish\n")
        for name in ("A  one", "B  two"):
            shell.read_until(name)
            shell.read_more(50)
            shell.type("\x03")
            shell.read_until("[stopped]")
        shell.read_until("\n> ")
        shell.type("/save\n")
        shell.read_until("which answer is better? a, b, or t for a tie: ")
        shell.type("b")
        shell.read_until("both go on from the answer of B\r\n> ")
        shell.type("\x1b[A\n")  # the line before: /save
        shell.read_until("the two answers are the same\r\n> ")
        shell.type("\x03")
        shell.read_until("stopped by Ctrl-C\r\n", again="\x03")
        assert shell.end() == 130
    (row,) = map(json.loads, (tmp_path / "kept.jsonl").read_text().splitlines())
    assert row["prompt"] == [{"role": "user", "content": "red fish"}]
    assert 0 < len(row["chosen"][0]["content"]) < 19000 and row["chosen"] != row["rejected"]
