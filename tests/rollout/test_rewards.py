"""Rewards of drawn responses: functions and what they may return, reward models by tokens and by text, and their combination."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cli.data.records import Message, Record, plain_prompt
from rlhf_cli.data.templates import choose_template, read_chat_format
from rlhf_cli.data.trees import Tree
from rlhf_cli.errors import NumberError, Stopped, UsageError
from rlhf_cli.models.backbone import Backbone
from rlhf_cli.recipe.rewards import name_of, term_names
from rlhf_cli.rollout.ensembles import Scale
from rlhf_cli.rollout.reward_functions import RewardFunction
from rlhf_cli.rollout.reward_models import Reader, RewardModelScorer
from rlhf_cli.rollout.rewards import COMBINE, Answers, PolicyText
from rlhf_cli.sections import Reward
from tests.data.tiny_tokenizer import CHATML, LLAMA3, encode_prompt, tiny_tokenizer
from tests.models.tiny_backbone import draw_trees, make, make_backbone, sequences

DIALOGUE = (Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "How are you?"))
PLACE = "ppo.yaml:9: reward.0"


@pytest.fixture(autouse=True)
def path_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that a test adds are gone after it."""
    monkeypatch.setattr(sys, "path", [*sys.path])


def answers(*rows: tuple[Any, list[str]]) -> Answers:
    """Texts alone: what functions see."""
    records = [Record(prompt, (), f"rows.jsonl:{line}") for line, (prompt, _) in enumerate(rows, 1)]
    texts = [texts for _, texts in rows]
    trees = [Tree(np.zeros(1, np.int32), np.zeros(1, bool), (), row) for row in range(len(rows))]
    return Answers(trees, records, texts, [[True] * len(own) for own in texts])


TWO = answers(("2+2?", ["4", "five"]), (DIALOGUE, ["Well."]))


def find(term: Reward, name: str) -> RewardFunction:
    """The function of a recipe's term; it sees texts, whatever the policy's tokens are."""
    tokenizer = tiny_tokenizer()
    return RewardFunction.find(term, name, PLACE, PolicyText(tokenizer, choose_template(tokenizer, None), False, False))


def score(tmp_path: Path, source: str, asked: Answers = TWO) -> Any:
    """What the function `f` of a file of this source gives."""
    (tmp_path / "mine.py").write_text(source)
    return find(Reward(function=f"{tmp_path / 'mine.py'}:f"), "f").score(asked)


class TestFunctions:
    def test_gets_each_response_with_its_prompt(self, tmp_path: Path) -> None:
        source = (
            "def f(prompts, responses):\n"
            "    assert prompts[:2] == ['2+2?', '2+2?']\n"
            "    assert [(m['role'], m['content']) for m in prompts[2]] == "
            "[('user', 'Hi'), ('assistant', 'Yes?'), ('user', 'How are you?')]\n"
            "    prompts.clear()\n"
            "    return [len(text) for text in responses]\n"
        )
        found = score(tmp_path, source)
        assert found.tolist() == [1, 4, 5]
        assert found.dtype == np.float64

    @pytest.mark.parametrize(
        ("prompt", "seen"),
        [
            ("Hi", "Hi"),
            ((Message("user", "Hi"),), "Hi"),
            ((Message("system", "Be brief."),), [{"role": "system", "content": "Be brief."}]),
        ],
    )
    def test_a_single_user_turn_is_a_text(self, prompt: Any, seen: Any) -> None:
        assert plain_prompt(prompt) == seen

    @pytest.mark.parametrize(
        "returned",
        [
            "[1, 0.5, True]",
            "(1, 0.5, True)",
            "np.array([1, 0.5, 1])",
            "np.array([1, 0.5, 1], np.float16)",
            "torch.tensor([1, 0.5, 1], dtype=torch.bfloat16, requires_grad=True)",
            "[torch.tensor(1), np.float32(0.5), np.bool_(True)]",
            "[np.int64(1), np.array(0.5), torch.tensor(True)]",
        ],
    )
    def test_may_return_any_kind_of_number(self, returned: str, tmp_path: Path) -> None:
        source = f"import numpy as np, torch\ndef f(prompts, responses):\n    return {returned}\n"
        assert score(tmp_path, source).tolist() == [1.0, 0.5, 1.0]

    FIRST = r"\nthe first: rows.jsonl:1: prompt '2\+2\?', response '4'$"
    SECOND = r"\nrows.jsonl:1: prompt '2\+2\?', response 'five'$"

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            ("None", "returned None, expected a list of numbers, one for each of 3 responses" + FIRST),
            ("'abc'", r"returned 'abc' \(str\), expected a list of numbers" + r".*" + FIRST),
            ("1.5", r"returned 1.5 \(float\), expected a list of numbers" + r".*" + FIRST),
            ("{1, 2, 3}", r"returned \{1, 2, 3\} \(set\), expected a list" + r".*" + FIRST),
            ("[1, 2]", "returned 2 numbers for 3 responses" + FIRST),
            ("[1, '2', 2]", r"returned '2' \(str\) for a response, expected a number" + SECOND),
            ("np.zeros((3, 1))", r"returned \[0.0\] \(list\) for a response, expected a number\nrows.jsonl:1: "),
            ("[1, 2j, 2]", r"returned 2j \(complex\) for a response, expected a number" + SECOND),
            ("1 / 0", r"failed on 3 responses\n.*mine.py:4: ZeroDivisionError: division by zero" + FIRST),
            ("len()", r"failed on 3 responses\n.*mine.py:4: TypeError: len\(\) takes exactly one argument"),
            ("sys.exit('no more')", r"failed on 3 responses\n.*mine.py:4: SystemExit: no more" + FIRST),
        ],
    )
    def test_a_fault_of_the_function_is_told(self, returned: str, message: str, tmp_path: Path) -> None:
        source = f"import sys\nimport numpy as np\ndef f(prompts, responses):\n    return {returned}\n"
        with pytest.raises(UsageError, match=rf"^{PLACE}: {tmp_path}/mine.py:f {message}") as caught:
            score(tmp_path, source)
        assert caught.value.exit_code == 2
        assert 1 <= str(caught.value).count("\n") <= 2

    @pytest.mark.parametrize(("number", "shown"), [("float('nan')", "nan"), ("-float('inf')", "-inf"), ("10**400", "inf")])
    def test_a_number_that_is_not_finite_names_its_response(self, number: str, shown: str, tmp_path: Path) -> None:
        source = f"def f(prompts, responses):\n    return [0, 0, {number}]\n"
        wanted = rf"mine.py:f gave a response the score {shown}\nrows.jsonl:2: prompt 'How are you\?', response 'Well.'$"
        with pytest.raises(NumberError, match=wanted) as caught:
            score(tmp_path, source)
        assert caught.value.exit_code == 3

    def test_long_texts_are_shortened(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError) as caught:
            score(tmp_path, "def f(prompts, responses):\n    return ['?']\n", answers(("x" * 500, ["y" * 500])))
        assert f"prompt '{'x' * 59}…', response '{'y' * 59}…'" in str(caught.value)

    def test_a_signal_while_it_runs_ends_the_run(self, tmp_path: Path) -> None:
        source = "from rlhf_cli.errors import Stopped\ndef f(prompts, responses):\n    raise Stopped('stopped by SIGTERM', 15)\n"
        with pytest.raises(Stopped) as caught:
            score(tmp_path, source)
        assert caught.value.exit_code == 128 + signal.SIGTERM

    def test_nothing_to_score_is_not_asked_for(self, tmp_path: Path) -> None:
        assert score(tmp_path, "def f(prompts, responses):\n    return max(responses)\n", answers()).shape == (0,)


class TestFiles:
    @pytest.mark.parametrize(
        ("source", "asked", "message"),
        [
            (None, "mine.py:f", r"there is no file .*mine.py. did you mean .*/mind.py\?$"),
            (None, "other_folder/a.py:f", r"there is no file .*other_folder/a.py$"),
            ("def brevity(p, r): ...", "mine.py:brevty", r"mine.py has no function brevty. did you mean brevity\?$"),
            ("x = 1", "mine.py:brevity", "mine.py has no function brevity. define it there$"),
            ("f = 0.5", "mine.py:f", r"f in .*mine.py is 0.5 \(float\), no function$"),
            ("f = 0.5", "mine.py:", r"expected file.py:name, found .*mine.py:$"),
            ("def f(:", "mine.py:f", r"mine.py cannot be imported\n.*mine.py:1: SyntaxError: invalid syntax"),
            ("\nimport nowhere_at_all", "mine.py:f", r"\n.*mine.py:2: ModuleNotFoundError: No module named 'nowhere_at_all'$"),
            ("\n\nx = {}['a']", "mine.py:f", r"mine.py cannot be imported\n.*mine.py:3: KeyError: 'a'$"),
            ("raise SystemExit", "mine.py:f", r"mine.py cannot be imported\n.*mine.py:1: SystemExit$"),
        ],
    )
    def test_what_cannot_be_found_is_told_with_the_place(
        self, source: str | None, asked: str, message: str, tmp_path: Path
    ) -> None:
        (tmp_path / "mind.py").write_text("")
        if source is not None:
            (tmp_path / "mine.py").write_text(source)
        with pytest.raises(UsageError, match=message) as caught:
            find(Reward(function=f"{tmp_path}/{asked}"), "f")
        assert str(caught.value).startswith(f"{PLACE}: ")
        assert str(caught.value).count("\n") <= 1

    def test_a_text_file_is_no_python(self, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("def f(p, r): ...")
        with pytest.raises(UsageError, match=r"mine.txt is no Python file: its name must end in .py$"):
            find(Reward(function=f"{tmp_path}/mine.txt:f"), "f")

    def test_is_imported_once_and_may_import_its_neighbours(self, tmp_path: Path) -> None:
        (tmp_path / "rewards_neighbour.py").write_text("HALF = 0.5\n")
        (tmp_path / "mine.py").write_text(
            "from dataclasses import dataclass\nfrom pathlib import Path\n"
            "with (Path(__file__).parent / 'imports').open('a') as file:\n    file.write('x')\n"
            "@dataclass\nclass Scale:\n    by: float\n"
            "def first(prompts, responses):\n"
            "    from rewards_neighbour import HALF\n    return [Scale(HALF).by] * len(responses)\n"
            "def second(prompts, responses):\n    return [2] * len(responses)\n"
        )
        terms = [find(Reward(function=f"{tmp_path}/mine.py:{name}"), name) for name in ("first", "second")]
        assert [term.score(TWO).tolist() for term in terms] == [[0.5] * 3, [2.0] * 3]
        assert (tmp_path / "imports").read_text() == "x"


@pytest.mark.parametrize(
    ("how", "wanted"), [("sum", [4.0, -2.0, 6.0]), ("min", [1.0, -4.0, 2.0]), ("mean_minus_std", [1.0, -4.0, 2.0])]
)
def test_terms_are_combined(how: str, wanted: list[float]) -> None:
    """By hand: (1, 3): mean 2, deviation 1; (−4, 2): −1 and 3; (4, 2): 3 and 1."""
    assert COMBINE[how](np.array([[1.0, -4.0, 4.0], [3.0, 2.0, 2.0]])).tolist() == wanted


def test_mean_minus_std_of_three_terms_uses_the_population_deviation() -> None:
    assert COMBINE["mean_minus_std"](np.array([[0.0], [3.0], [6.0]]))[0] == pytest.approx(3 - 6**0.5)


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        (Reward(model="runs/quickstart/rm"), "rm"),
        (Reward(model="runs/rm/"), "rm"),
        (Reward(model="runs/rm/model"), "rm"),
        (Reward(model="runs/rm/checkpoints/step-00000100"), "rm-step-00000100"),
        (Reward(model="runs/rm/checkpoints/step-00000100/model"), "rm-step-00000100"),
        (Reward(model="owner/Judge-8B"), "Judge-8B"),
        (Reward(model="model"), "model"),
        (Reward(function="lib/my.py:brevity"), "brevity"),
    ],
)
def test_a_term_is_called_by_what_gives_it(reward: Reward, name: str) -> None:
    assert name_of(reward) == name


def test_a_name_in_the_recipe_comes_first() -> None:
    assert term_names([Reward(model="runs/rm", name="help"), Reward(function="my.py:f")]) == ["help", "f"]


EOS = 5


def cut_and_ended() -> list[Tree]:
    """Prompts with several responses, some of which end in EOS, once or twice, as where it also pads."""
    trees = [*draw_trees(3, branches=3), *draw_trees(2, seed=1, branches=1)]
    ends: list[list[int]] = [[EOS], [], [EOS, EOS]]
    return [
        tree._replace(
            responses=tuple(np.array([*ids, *ends[k % 3]], np.int32) for k, ids in enumerate(tree.responses)),
        )
        for tree in trees
    ]


def drawn(trees: Sequence[Tree]) -> Answers:
    """The trees with texts that nobody reads."""
    records = [Record(f"prompt {row}", (), f"rows.jsonl:{row + 1}") for row in range(len(trees))]
    texts = [[f"answer {k}" for k in range(len(tree.responses))] for tree in trees]
    return Answers(list(trees), records, texts, [[True] * len(own) for own in texts])


def last_states(backbone: Backbone, trees: Sequence[Tree]) -> torch.Tensor:
    """The state at the last token of each response, from one plain sequence at a time."""
    with torch.no_grad(), backbone.plain_attention() as model:
        ids = [ids for tree in trees for ids, _ in sequences(tree)]
        return torch.stack([model.base_model(input_ids=row, use_cache=False).last_hidden_state[0, -1] for row in ids])


class TestModels:
    READER = Reader("ppo.yaml:9", None, None, True)

    @pytest.mark.parametrize("budget", [1, 40, 4096])
    def test_the_score_is_read_at_the_last_token_of_each_response(self, budget: int) -> None:
        backbone = make_backbone(make(), role="reward")
        trees = cut_and_ended()
        backbone.activate("reward")
        raw = (last_states(backbone, trees) @ backbone.heads["reward"].weight[0]).detach().numpy()
        found = RewardModelScorer("rm", 1.0, backbone, ("reward",), (Scale(0.0, 1.0),), "mean", budget, self.READER).score(
            drawn(trees)
        )
        assert found.shape == (11,)
        assert np.abs(found - raw).max() < 1e-5
        assert raw.std() > 0.1
        normalised = RewardModelScorer("rm", 1.0, backbone, ("reward",), (Scale(2.0, 0.5),), "mean", budget, self.READER).score(
            drawn(trees)
        )
        assert np.abs(normalised - (raw - 2) / 0.5).max() < 2e-5

    def test_another_model_scores_in_rows_of_its_own_kind(self) -> None:
        """A judge that takes no mask needs each response in a row of its own, whatever the policy's kernel packs."""
        backbone, judge = make_backbone(make()), make_backbone(make("mamba"), lora=False, role="reward")
        assert (backbone.kernel.layout, judge.kernel.layout) == ("long", "alone")
        backbone.elsewhere["reward"] = judge
        trees = draw_trees(2, branches=2)
        found = RewardModelScorer("rm", 1.0, backbone, ("reward",), (Scale(0.0, 1.0),), "mean", 400, self.READER).score(
            drawn(trees)
        )
        wanted = (last_states(judge, trees) @ judge.heads["reward"].weight[0]).detach().numpy()
        assert np.abs(found - wanted).max() < 1e-5

    def test_a_score_that_is_not_finite_names_its_response(self) -> None:
        backbone = make_backbone(make(), role="reward")
        with torch.no_grad():
            backbone.heads["reward"].weight.fill_(torch.nan)
        term = RewardModelScorer("rm", 1.0, backbone, ("reward",), (Scale(0.0, 1.0),), "mean", 40, self.READER)
        wanted = (
            r"^ppo.yaml:9: reward model rm gave a response the score nan\nrows.jsonl:1: prompt 'prompt 0', response 'answer 0'"
        )
        with pytest.raises(NumberError, match=wanted):
            term.score(drawn(draw_trees(2, branches=2)))

    def test_no_answers_have_no_scores(self) -> None:
        backbone = make_backbone(make(), role="reward")
        assert RewardModelScorer("rm", 1.0, backbone, ("reward",), (Scale(0.0, 1.0),), "mean", 40, self.READER).score(
            drawn([])
        ).shape == (0,)

    def test_what_the_model_cannot_take_is_told(self) -> None:
        trees = [Tree(np.zeros(6, np.int32), np.zeros(6, bool), (np.zeros(2, np.int32), np.zeros(4, np.int32)), 0)]
        assert Reader("ppo.yaml:9", 10, None, True)(drawn(trees)) == trees
        with pytest.raises(UsageError, match=r"^ppo.yaml:9: rows.jsonl:1: prompt and response have 10 tokens.* takes 9\nlower "):
            Reader("ppo.yaml:9", 9, None, True)(drawn(trees))


class TestText:
    """A policy that writes ChatML, read by a model with Llama 3's template, another vocabulary and a BOS."""

    PROMPTS: tuple[str | tuple[Message, ...], ...] = ("What is two plus two?", DIALOGUE)
    TEXTS = (["It is four", "", "<|eot_id|> four, of course", "Hel"], ["Well"])
    ENDED = ([True, True, True, False], [False])
    WRITTEN = (
        "<s><|start_header_id|>user<|end_header_id|>\n\nWhat is two plus two?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHow are you?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    )
    ANSWERS = (["It is four<|eot_id|>", "<|eot_id|>", "<|eot_id|> four, of course<|eot_id|>", "Hel"], ["Well"])

    def drawn(self) -> Answers:
        policy = tiny_tokenizer(eos="<|im_end|>", template=CHATML)
        template = choose_template(policy, None)
        trees = []
        for row, (prompt, texts, ended) in enumerate(zip(self.PROMPTS, self.TEXTS, self.ENDED, strict=True)):
            ids = np.array(encode_prompt(policy, template, prompt), np.int32)
            ends = [[policy.eos_token_id] if done else [] for done in ended]
            own = [policy(text)["input_ids"] for text in texts]
            responses = tuple(np.array([*part, *end], np.int32) for part, end in zip(own, ends, strict=True))
            trees.append(Tree(ids, np.zeros(len(ids), bool), responses, row))
        records = [Record(prompt, (), f"rows.jsonl:{row + 1}") for row, prompt in enumerate(self.PROMPTS)]
        return Answers(trees, records, [list(texts) for texts in self.TEXTS], [list(ended) for ended in self.ENDED])

    def test_is_encoded_as_by_hand(self) -> None:
        judge = tiny_tokenizer(eos="<|eot_id|>", adds_bos=True, template=LLAMA3)
        trees = Reader("ppo.yaml:9", None, read_chat_format(judge, choose_template(judge, None)))(self.drawn())
        raw = judge.backend_tokenizer
        for tree, prompt, texts in zip(trees, self.WRITTEN, self.ANSWERS, strict=True):
            assert tree.prompt.tolist() == raw.encode(prompt, add_special_tokens=False).ids
            wanted = [raw.encode(text, add_special_tokens=False).ids for text in texts]
            assert [response.tolist() for response in tree.responses] == wanted

    def test_scores_are_those_of_the_rewritten_tokens(self) -> None:
        judge = tiny_tokenizer(eos="<|eot_id|>", adds_bos=True, template=LLAMA3)
        backbone = make_backbone(make(vocab_size=len(judge)), role="reward")
        reader = Reader("ppo.yaml:9", None, read_chat_format(judge, choose_template(judge, None)))
        found = RewardModelScorer("rm", 1.0, backbone, ("reward",), (Scale(0.0, 1.0),), "mean", 64, reader).score(self.drawn())
        backbone.activate("reward")
        encode = judge.backend_tokenizer.encode
        rows = [
            [i for part in (prompt, text) for i in encode(part, add_special_tokens=False).ids]  # apart, as when they are drawn
            for prompt, texts in zip(self.WRITTEN, self.ANSWERS, strict=True)
            for text in texts
        ]
        with torch.no_grad(), backbone.plain_attention() as model:
            states = [model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1] for ids in rows]
            wanted = backbone.heads["reward"](torch.stack(states))[:, 0].numpy()
        assert np.abs(found - wanted).max() < 1e-5

    def test_what_is_written_before_the_end_of_a_turn_is_no_part_of_a_cut_response(self) -> None:
        closing = CHATML.replace("+ '<|im_end|>", "+ ' //<|im_end|>")
        judge = tiny_tokenizer(eos="<|im_end|>", template=closing)
        trees = Reader("ppo.yaml:9", None, read_chat_format(judge, choose_template(judge, None)))(self.drawn())
        assert [judge.decode(ids) for tree in trees for ids in tree.responses] == [
            "It is four //<|im_end|>",
            " //<|im_end|>",
            "<|eot_id|> four, of course //<|im_end|>",
            "Hel",
            "Well",
        ]

    def test_an_empty_response_that_was_cut_keeps_an_end_to_be_scored_at(self) -> None:
        judge = tiny_tokenizer(eos="<|eot_id|>", template=LLAMA3)
        asked = self.drawn()
        asked.texts[1][0] = ""
        trees = Reader("ppo.yaml:9", None, read_chat_format(judge, choose_template(judge, None)))(asked)
        assert trees[1].responses[0].tolist() == [judge.eos_token_id]

    def test_a_prompt_that_the_model_cannot_be_shown_is_told(self) -> None:
        judge = tiny_tokenizer(eos="</s>")
        reader = Reader("ppo.yaml:9", None, read_chat_format(judge, choose_template(judge, "none")))
        with pytest.raises(UsageError, match=r"^ppo.yaml:9: the reward model's text: rows.jsonl:2: a conversation needs a chat"):
            reader(self.drawn())
        with pytest.raises(UsageError, match=r"^ppo.yaml:9: the reward model's text: none of 1 rows can be used"):
            reader(answers((DIALOGUE, ["Well"])))

    def test_what_the_model_cannot_take_is_told(self) -> None:
        judge = tiny_tokenizer(eos="<|eot_id|>", template=LLAMA3)
        form = read_chat_format(judge, choose_template(judge, None))
        longest = max(len(tree.prompt) + max(map(len, tree.responses)) for tree in Reader("", None, form)(self.drawn()))
        assert len(Reader("ppo.yaml:9", longest, form)(self.drawn())) == 2
        with pytest.raises(UsageError, match=rf"prompt and response have {longest} tokens, the reward model takes {longest - 1}"):
            Reader("ppo.yaml:9", longest - 1, form)(self.drawn())
