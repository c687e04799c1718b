"""Steps: rows of every shape, and where a step ends in tokens, whatever these are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_cli.data.formats import FORMATS, convert, detect
from rlhf_cli.data.records import BadRow, Facts, Record, step_spans
from rlhf_cli.data.trees import Tree, located
from rlhf_cli.errors import UsageError
from tests.data.tiny_tokenizer import tiny_tokenizer
from tests.data.uses import purpose_of

STAGE = "train-rm objective.kind=steps"
SHEPHERD = {
    "input": "What is 2+3+4? Step 1: 2+3=5 ки\nStep 2: 5+4=8 ки\nStep 3: The answer is: 8 ки",
    "label": "What is 2+3+4? Step 1: 2+3=5 +\nStep 2: 5+4=8 -\nStep 3: The answer is: 8 -",
    "task": "GSM8K",
}
THIRD = "Step 3: The answer is: 8"


def rated(*ratings: int | None, chosen: int | None = 0) -> dict[str, Any]:
    """A step of PRM800K with so many completions."""
    texts = [{"text": f"say {k}", "rating": rating, "flagged": None} for k, rating in enumerate(ratings)]
    return {"completions": texts, "human_completion": None, "chosen_completion": chosen}


def prm800k(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"question": {"problem": "2+3+4?", "ground_truth_answer": "9"}, "label": {"steps": list(steps), "total_time": 9}}


PERSON = {"completions": [], "human_completion": {"text": "so 9", "rating": None}, "chosen_completion": None}

GOOD: list[tuple[dict[str, Any], str, list[str], tuple[float, ...]]] = [
    ({"prompt": "2+3?", "steps": ["a", "b"], "labels": [True, False]}, "2+3?", ["a", "b"], (1.0, 0.0)),
    ({"prompt": "2+3?", "steps": ["a", "b"], "labels": [0.25, 1]}, "2+3?", ["a", "b"], (0.25, 1.0)),
    ({"prompt": "2+3?", "completions": ["a", "b"], "labels": [True, True]}, "2+3?", ["a", "b"], (1.0, 1.0)),
    (SHEPHERD, "What is 2+3+4?", ["Step 1: 2+3=5 ", "\nStep 2: 5+4=8 ", f"\n{THIRD} "], (1.0, 0.0, 0.0)),
    (prm800k(rated(1), rated(-1, 0, chosen=1)), "2+3+4?", ["say 0", "say 1"], (1.0, 1.0)),
    (prm800k(rated(1), PERSON, rated(0)), "2+3+4?", ["say 0", "so 9", "say 0"], (1.0, 1.0, 1.0)),
    (prm800k(rated(0), rated(-1, chosen=None), rated(1)), "2+3+4?", ["say 0", "say 0"], (1.0, 0.0)),
    (prm800k(rated(1), rated(-1), rated(1)), "2+3+4?", ["say 0", "say 0"], (1.0, 0.0)),
    (prm800k(rated(1), rated(None), rated(1)), "2+3+4?", ["say 0"], (1.0,)),
]


def read(row: dict[str, Any], separator: str | None = "\n\n") -> Record:
    format = detect([row], purpose_of(STAGE), "x")
    assert format.name == "steps"
    from rlhf_cli.data.columns import respelled

    own = dict(respelled(row, format.spelling([row])))
    return convert(own, "x:1", format.converter([own], True, "x", separator))


@pytest.mark.parametrize(("row", "prompt", "steps", "labels"), GOOD)
def test_rows(row: dict[str, Any], prompt: str, steps: list[str], labels: tuple[float, ...]) -> None:
    found = read(row)
    assert found == Record(prompt, ("\n\n".join(steps),), "x:1", Facts(steps=labels))
    assert Record.read(found.serialised, "x:1") == found
    (text,) = found.responses
    assert [str(text)[a:b] for a, b in step_spans(str(text), "\n\n")] == [step.strip() for step in steps]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"labels": [True]}, r"'steps' and 'labels' differ in number \(2 and 1\)"),
    ({"labels": [True, -1]}, r"a label of a step is not between 0 and 1 \(write false, or 0, for a wrong step\)"),
    ({"labels": [True, "+"]}, "a label is text, expected a number"),
    (
        {"steps": ["a\n\nb", "c"]},
        r"objective.separator does not tell the steps apart \('\\n\\n' stands within one, or is empty\)",
    ),
    ({"steps": ["a", " "]}, "a step is blank"),
    ({"steps": [], "labels": []}, "'steps' is empty"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_rows(change: dict[str, Any], message: str) -> None:
    row = {"prompt": "2+3?", "steps": ["a", "b"], "labels": [True, False]} | change
    with pytest.raises(BadRow, match=f"^{message}$"):
        FORMATS["steps"].converter([row], True, "x", "\n\n")(row, "x:1")


@pytest.mark.parametrize(
    "change",
    [
        {"label": SHEPHERD["label"].replace(" -", " ?", 1)},
        {"label": SHEPHERD["label"].replace("5+4", "5+5")},
        {"input": f"{SHEPHERD['input']} and more", "label": f"{SHEPHERD['label']} and more"},
        {key: text.replace("Step 1: ", "") for key, text in SHEPHERD.items() if key != "task"},
    ],
)
def test_bad_marks(change: dict[str, str]) -> None:
    with pytest.raises(BadRow, match="the row has no 'Step 1:', text behind its last step, or labels that are not its text"):
        read(SHEPHERD | change)


def test_nobody_asks_how_the_steps_of_prompts_are_told_apart() -> None:
    row = {"prompt": "2+3?", "steps": ["a\n\nb", "c"], "labels": [True, False]}
    assert read(row, None).prompt == "2+3?"
    assert read({**row, "steps": ["a\n\nb"], "labels": [1]}, "").facts.steps == (1.0,)  # a response is one step


def test_other_stages_say_who_reads_them() -> None:
    with pytest.raises(UsageError, match=r"which ppo and train-rm objective\.kind=steps can use; dpo needs "):
        detect([GOOD[0][0]], purpose_of("dpo"), "x")


def merging() -> PreTrainedTokenizerFast:
    """BPE that merges whatever stands side by side often: separators with the end of a step, and with the beginning of one."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    text = ["so it is 4.\n\nNow 5 é.\n\n\nNext 😀!\n\n"] * 9 + ["4.\n\nNow"] * 5 + ["ends.\n\n"] * 5
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(text, trainers.BpeTrainer(vocab_size=310, initial_alphabet=alphabet, show_progress=False))
    core.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


TOKENIZERS = {"merging": merging(), "bytes": tiny_tokenizer(), "metaspace": tiny_tokenizer(metaspace=True)}
TEXTS = [
    "so it is 4.\n\nNow 5 é.\n\n\nNext 😀!\n\n",
    "4.\n\nNow",
    "  one\n\n two \n\n\n\nthree  ",
    "a\nb\n\nc",
    "Now 5 é",
]


def ends_in(tokenizer: Any, ids: list[int], separator: str) -> list[int]:
    tree = Tree(np.zeros(1, np.int32), np.zeros(1, bool), (np.array(ids, np.int32),), 0)
    (found,) = located(tree, tokenizer, separator).facts.ends or ((),)
    return [len(ids) - 1 - behind for behind in found]


SPACED = ("metaspace", "What is two?\n\nIt is four, \n\n\nof course.\n\n")  # of letters that the tokenizer has


@pytest.mark.parametrize(("name", "text"), [*((name, text) for name in ("merging", "bytes") for text in TEXTS), SPACED])
def test_a_step_ends_at_the_last_token_that_holds_one_of_its_characters(name: str, text: str) -> None:
    """By the places in the text that the tokenizer names for the tokens that it made itself."""
    tokenizer = TOKENIZERS[name]
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    wanted = []
    for piece in (part.strip() for part in text.split("\n\n") if part.strip()):
        end = text.index(piece) + len(piece)
        wanted.append(max(k for k, (a, b) in enumerate(encoding.offsets) if a < end and b > text.index(piece)))
    for more in ([], [tokenizer.eos_token_id]):
        assert ends_in(tokenizer, encoding.ids + more, "\n\n") == wanted


def test_a_token_may_hold_the_end_of_a_step_its_separator_and_the_next_one() -> None:
    tokenizer = TOKENIZERS["merging"]
    shared = [token for token in tokenizer.get_vocab() if "ĊĊ" in token and token.strip("Ċ") != ""]
    assert any(token.startswith(".") for token in shared), shared
    ids = tokenizer("4.\n\nNow")["input_ids"]
    (first, second) = ends_in(tokenizer, ids, "\n\n")
    assert "." in tokenizer.decode(ids[first : first + 1]) and second == len(ids) - 1


def test_other_tokens_of_the_same_text_have_the_same_steps() -> None:
    """A policy may write byte by byte: a step ends with the last byte of its last character."""
    tokenizer = TOKENIZERS["merging"]
    text = "Now 5 é\n\n😀"
    byte_of = {value: key for key, value in zip(*_alphabet(), strict=True)}
    ids = tokenizer.convert_tokens_to_ids([byte_of[value] for value in text.encode()])
    assert tokenizer.decode(ids) == text
    assert ends_in(tokenizer, ids, "\n\n") == [7, 13]


def _alphabet() -> tuple[list[str], list[int]]:
    """The characters that stand for bytes, and these."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [value for value in range(256) if value not in shown]
    return [*map(chr, shown), *(chr(256 + k) for k in range(len(rest)))], [*shown, *rest]


@pytest.mark.parametrize("text", ["", "\n\n", "  "])
def test_a_response_without_text_is_one_step_that_ends_with_it(text: str) -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert ends_in(tokenizer, ids, "\n\n") == [len(ids) - 1]


def test_without_a_separator_a_response_is_one_step() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer("one\n\ntwo\n")["input_ids"]
    assert ends_in(tokenizer, ids, "") == [len(ids) - 2]
