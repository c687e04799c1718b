"""Judges whose probabilities are read: expected values, principles, and a local model against plain transformers."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.templates import choose_template, read_chat_format
from rlhf_cli.errors import Stopped, UsageError
from rlhf_cli.judges import asking
from rlhf_cli.judges.asking import Verdicts, prepare
from rlhf_cli.judges.judge import compare, score
from rlhf_cli.judges.local import LocalJudge, read_options
from rlhf_cli.judges.question import BRIEF, SCORE, Question, Wording, expected_score, preferred, read_score, read_wording
from rlhf_cli.sections import Judge
from tests.data.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.judges.server import Model, Reply, Serve, responses, said, serve
from tests.models.tiny_backbone import make, make_backbone

__all__ = ["serve"]
GOLDEN = json.loads((Path(__file__).parent / "ai_labels.json").read_text())
LETTERS = {"1": "A", "2": "B"}  # the options of the golden values


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(asking, "BACKOFF", 0.0)


def in_letters(logprobs: dict[str, float]) -> dict[str, float]:
    return {text.replace("1", "A").replace("2", "B"): value for text, value in logprobs.items()}


def test_golden_probabilities_of_a_pair() -> None:
    pairs = GOLDEN["pairs"]
    for comparisons, firsts, p in zip(
        pairs["inputs"]["comparisons"], pairs["expected"]["P(first) per draw"], pairs["expected"]["p"], strict=True
    ):
        values = [[preferred(in_letters(own[f"order {n}"])) for n in (1, 2)] for own in comparisons]
        for own, first in zip(values, firsts, strict=True):
            for n, value in zip((1, 2), own, strict=True):
                wanted = first[f"order {n}"]
                assert (value is None) == (wanted is None)
                if value is not None:
                    assert value == pytest.approx(wanted, abs=1e-10)
        if p is not None:
            known = [(one + 1 - other) / 2 for one, other in values if one is not None and other is not None]
            assert sum(known) / len(known) == pytest.approx(p, abs=1e-10)


def test_golden_scores() -> None:
    direct = GOLDEN["direct score"]
    for logprobs, wanted in zip(direct["inputs"], direct["expected"], strict=True):
        if wanted is None or wanted["score"] is None:
            continue
        own = [[v for text, v in logprobs.items() if text.strip() == str(n)] for n in range(1, 11)]
        found = expected_score([float(np.logaddexp.reduce(each)) if each else -math.inf for each in own])
        assert found == pytest.approx(wanted["score"], abs=1e-10)
        assert (found - 5.5) / 4.5 == pytest.approx(wanted["mapped"], abs=1e-10)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("7", 7),
        ("Score: 8/10.", 8),
        ("I give it 3 of 10: 4", 4),
        ("0", None),
        ("11", None),
        ("<think>9</think> 2", 2),
        ("good", None),
    ],
)
def test_a_written_score(answer: str, number: float | None) -> None:
    assert read_score(answer) == number


class TestPrinciples:
    WORDING = Wording("pairwise", "{principle} {prompt} {a} {b}", tuple("abcde"), 3)

    def test_are_drawn_alike_for_both_orders_and_without_repetition(self) -> None:
        question = Question("p", "x", "y")
        own, swapped = (self.WORDING.drawn(each) for each in (question, question.swapped()))
        assert [each.principle for each in own] == [each.principle for each in swapped]
        assert len({each.principle for each in own}) == 3
        others = {tuple(e.principle for e in self.WORDING.drawn(Question("p", "x", str(n)))) for n in range(20)}
        assert len(others) > 5

    def test_are_read_a_line_each(self, tmp_path: Path) -> None:
        (tmp_path / "p.txt").write_text("be kind\n\n be brief \n")
        assert read_wording(Judge(path="m", principles=str(tmp_path / "p.txt")), "pairwise", "here").principles == (
            "be kind",
            "be brief",
        )

    def test_have_a_place_in_the_template(self, tmp_path: Path) -> None:
        (tmp_path / "p.txt").write_text("be kind")
        (tmp_path / "t.txt").write_text("{prompt}{a}{b}")
        files = {"principles": str(tmp_path / "p.txt"), "prompt": str(tmp_path / "t.txt")}
        with pytest.raises(UsageError, match=r"has no \{principle\}"):
            read_wording(Judge(path="m", **files), "pairwise", "here")


def with_logprobs(text: str, tops: dict[str, float]) -> Reply:
    first = {
        "token": text.split()[0].rstrip("."),
        "logprob": 0.0,
        "top_logprobs": [{"token": t, "logprob": v} for t, v in tops.items()],
    }
    return said(text, logprobs={"content": [first]})


def settings(model: Model, **more: Any) -> Judge:
    return Judge(endpoint=model.url, model="m", timeout=10.0, retries=0, parallel=2, **more)


class TestEndpoints:
    def test_log_probabilities_count_where_the_answer_begins_with_an_option(self, serve: Serve, tmp_path: Path) -> None:
        """P(A) is 0.8 where the longer response stands first and 0.4 where it stands second: p = (0.8 + 0.6)/2."""

        def behave(model: Model, message: str) -> Reply:
            a, b = responses(message)
            p = 0.8 if len(a) > len(b) else 0.4
            return with_logprobs("A", {"A": math.log(p / 2), " A": math.log(p / 2), "B": math.log(1 - p), "the": -1.0})

        verdicts = Verdicts(tmp_path / "v.jsonl")
        found = compare(prepare(settings(serve(behave)), "pairwise", "here", lambda: verdicts), [Question("?", "long", "x")])
        assert found.probability.tolist() == pytest.approx([0.7], abs=1e-12)
        assert found.contradicting.tolist() == [False]

    def test_a_signal_ends_the_waiting_and_what_was_said_is_kept(self, serve: Serve, tmp_path: Path) -> None:
        def behave(model: Model, message: str) -> Reply:
            if len(model.asked) > 1:
                model.open.wait(60)
            return said("7")

        def pause() -> None:
            if len(model.asked) > 1:
                raise Stopped("stopped by SIGTERM", 15)

        model, verdicts = serve(behave), Verdicts(tmp_path / "v.jsonl")
        asked = settings(model).__class__(endpoint=model.url, model="m", parallel=1, timeout=60.0)
        judge = prepare(asked, "score", "here", lambda: verdicts, pause=pause)
        started = time.monotonic()
        with pytest.raises(Stopped):
            judge.answer([Question("?", "a"), Question("?", "b")])
        assert time.monotonic() - started < 20
        assert len((tmp_path / "v.jsonl").read_text().splitlines()) == 1

    def test_a_server_that_refuses_the_key_is_asked_without_it(self, serve: Serve, tmp_path: Path) -> None:
        def behave(model: Model, message: str) -> Reply:
            if "logprobs" in model.bodies[-1]:
                return 400, {}, json.dumps({"error": {"message": "logprobs is not supported"}}).encode()
            return said("B")

        model, verdicts = serve(behave), Verdicts(tmp_path / "v.jsonl")
        judge = prepare(
            settings(model).__class__(endpoint=model.url, model="m", parallel=1), "pairwise", "here", lambda: verdicts
        )
        assert compare(judge, [Question("?", "a", "b")]).contradicting.tolist() == [True]
        assert ["logprobs" in body for body in model.bodies] == [True, False, False]

    @pytest.mark.parametrize(
        ("text", "mode", "wanted"),
        [
            ("A clear difference is the length.\n**B**", "pairwise", 0.0),
            ("A tie.", "pairwise", 0.5),
            ("A\nB is too long, and it is not polite.", "pairwise", 0.75),
            ("1. It is correct.\n2. It is short.\nScore: 9", "score", 9.0),
            ("1", "score", 7.75),
        ],
    )
    def test_reasoning_may_begin_as_an_option(self, text: str, mode: Any, wanted: float, serve: Serve, tmp_path: Path) -> None:
        tops = {"A": math.log(0.75), "B": math.log(0.25), "10": math.log(0.75), "1": math.log(0.25)}
        verdicts = Verdicts(tmp_path / "v.jsonl")
        judge = prepare(settings(serve(lambda *_: with_logprobs(text, tops))), mode, "here", lambda: verdicts)
        question = Question("?", "a", "b" if mode == "pairwise" else None)
        assert judge.answer([question])[question] == pytest.approx(wanted, abs=1e-12)

    @pytest.mark.parametrize(
        ("tops", "wanted"),
        [
            ({"7": math.log(0.5), "10": math.log(0.25), "4": math.log(0.25)}, 7.0),  # 3.5 + 2.5 + 1
            ({"7": math.log(0.5), "1": math.log(0.5)}, 7.0),  # "1" may be the beginning of "10": the written 7 counts
        ],
    )
    def test_scores(self, serve: Serve, tmp_path: Path, tops: dict[str, float], wanted: float) -> None:
        verdicts = Verdicts(tmp_path / "v.jsonl")
        judge = prepare(settings(serve(lambda *_: with_logprobs("7", tops))), "score", "here", lambda: verdicts)
        assert score(judge, [Question("?", "a")]).tolist() == pytest.approx([wanted], abs=1e-12)


class TestLocal:
    @pytest.fixture
    def parts(self) -> tuple[Any, Any, Any]:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = CHATML
        plain, own = (make(vocab_size=len(tokenizer), max_position_embeddings=4096) for _ in range(2))
        backbone = make_backbone(own, lora=False)
        return backbone, plain, read_chat_format(tokenizer, choose_template(tokenizer, None))

    @pytest.mark.parametrize(("begun", "refused"), [("<think>\n", True), ("<think>\n\n</think>\n\n", False)])
    def test_one_whose_answer_begins_with_reasoning_is_refused(self, begun: str, refused: bool) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n" + begun)
        assert begun in tokenizer.chat_template
        form, wording = read_chat_format(tokenizer, choose_template(tokenizer, None)), Wording("pairwise", BRIEF, (), 1)
        if not refused:
            assert read_options(form, wording, "here").names[0] == "A"
            return
        with pytest.raises(UsageError, match="here: the judge's chat template begins its answer with <think>"):
            read_options(form, wording, "here")

    @pytest.mark.parametrize("mode", ["pairwise", "score"])
    def test_is_what_plain_transformers_gives(self, parts: tuple[Any, Any, Any], mode: Any) -> None:
        """Every option alone behind the whole question, in one plain forward pass each."""
        backbone, plain, form = parts
        wording = Wording(mode, BRIEF if mode == "pairwise" else SCORE, (), 1)
        options = read_options(form, wording, "here")
        judge = LocalJudge(backbone, "policy", form, options, wording, 4096, None, "here")
        questions = [
            Question("2+2?", "4", "five" if mode == "pairwise" else None),
            Question("Hi", "Yes.", "No" if mode == "pairwise" else None),
        ]
        found = judge.answer(questions)
        for question in questions:
            turns = [{"role": "user", "content": wording.filled(question)}]
            text = form.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            prompt = form.tokenizer(text, add_special_tokens=False)["input_ids"]
            logps = {}
            for name, ids in zip(options.names, options.ids, strict=True):
                with torch.no_grad():
                    logits = plain(input_ids=torch.tensor([[*prompt, *ids.tolist()]])).logits[0].double()
                each = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(ids.tolist())[:, None])
                logps[name] = float(each.sum())
            if mode == "pairwise":
                a, b = (sum(math.exp(v) for name, v in logps.items() if name.strip("( ") == letter) for letter in "AB")
                assert found[question] == pytest.approx(a / (a + b), abs=1e-6)
            else:
                mass = {n: sum(math.exp(v) for name, v in logps.items() if int(name) == n) for n in range(1, 11)}
                assert found[question] == pytest.approx(sum(n * p for n, p in mass.items()) / sum(mass.values()), abs=1e-5)

    def test_a_score_of_one_does_not_take_the_mass_of_ten(self, parts: tuple[Any, Any, Any]) -> None:
        _, _, form = parts
        options = read_options(form, Wording("score", SCORE, (), 1), "here")
        ends = {tuple(ids[-len(form.end_ids) :].tolist()) for ids in options.ids}
        assert ends == {tuple(form.end_ids)}
