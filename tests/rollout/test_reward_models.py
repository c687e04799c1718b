"""Which reward model a recipe names, how it reads and is normalised, and that its scores are those of plain transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from rlhf_cli import sections
from rlhf_cli.data.records import Record
from rlhf_cli.data.templates import choose_template
from rlhf_cli.data.trees import Tree
from rlhf_cli.errors import UsageError
from rlhf_cli.models.load import load_tokenizer
from rlhf_cli.models.placement import FrozenModels
from rlhf_cli.rollout.reward_models import RewardModel
from rlhf_cli.rollout.rewards import Answers, PolicyText, Scorer
from rlhf_cli.runs.manifest import weights_hash
from rlhf_cli.sections import Reward
from tests.data.tiny_tokenizer import CHATML, LLAMA3, encode_prompt, tiny_tokenizer
from tests.tiny import make_model, rlhf, write_pairs, write_recipe

PLACE = "ppo.yaml:9: reward.0.model"
PROMPTS = ("red fish", "two big birds")
TEXTS = (["blue sun", ""], ["old sea", "new"])
ENDED = ([True, True], [True, False])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, reward models `rm` with LoRA, `full` and `plain` without a chat template, and a policy `sft`."""
    folder = tmp_path_factory.mktemp("rewards")
    make_model(folder / "base", initializer_range=0.2)
    write_pairs(folder / "pairs.jsonl", 16)
    kinds: dict[str, tuple[str, Any, dict[str, Any]]] = {
        "rm": ("train-rm", {"r": 4}, {}),
        "full": ("train-rm", None, {}),
        "plain": ("train-rm", {"r": 4}, {"model": {"chat_template": "none"}}),
        "sft": ("sft", {"r": 4}, {}),
    }
    for name, (command, lora, more) in kinds.items():
        settings = {"lora": lora, "train": {"steps": 2, "save_every": 1, "learning_rate": 0.01}, **more}
        words = write_recipe(folder / f"{name}.yaml", folder / "base", folder / "pairs.jsonl", folder / name, **settings)
        assert rlhf(command, words) == 0
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model as others publish them, with another tokenizer than the policy's."""
    folder = tmp_path_factory.mktemp("judge") / "judge"
    tokenizer = tiny_tokenizer(eos="<|eot_id|>", template=LLAMA3)
    _save_classifier(folder, labels=1, pad=tokenizer.convert_tokens_to_ids("</s>"))
    tokenizer.save_pretrained(folder)
    return folder


def _save_classifier(folder: Path, labels: int, pad: int) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        num_labels=labels,
        pad_token_id=pad,
        initializer_range=0.2,
        max_position_embeddings=100,
        **shape,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)


def find(home: Path, model: Path | str, *, template: str | None = None, check: bool = False, **keys: Any) -> RewardModel:
    policy = load_tokenizer(str(home / "base"), None, False)
    text = PolicyText(policy, choose_template(policy, template), trust_remote_code=False, check=check)
    return RewardModel.find(Reward(model=str(model), **keys), "judge", PLACE, text)


def loaded(found: RewardModel) -> Scorer:
    """The model with its weights, on its own base."""
    return found.load(FrozenModels(sections.Model(path=""), torch.float32, torch.device("cpu")), "judge", 64)


def drawn(home: Path) -> Answers:
    """The answers above in the policy's tokens."""
    tokenizer = load_tokenizer(str(home / "base"), None, False)
    template = choose_template(tokenizer, None)
    trees = []
    for row, (prompt, texts, ended) in enumerate(zip(PROMPTS, TEXTS, ENDED, strict=True)):
        ids = np.array(encode_prompt(tokenizer, template, prompt), np.int32)
        own = [tokenizer(text + "<|im_end|>" * done)["input_ids"] for text, done in zip(texts, ended, strict=True)]
        trees.append(Tree(ids, np.zeros(len(ids), bool), tuple(np.array(part, np.int32) for part in own), row))
    return Answers(trees, [Record(p, (), f"rows.jsonl:{n}") for n, p in enumerate(PROMPTS, 1)], [*TEXTS], [*ENDED])


def written(prompt: str, end: str) -> list[tuple[str, str]]:
    """Prompt and response of every answer, as a template with these parts writes them."""
    return [
        (prompt.format(asked), text + end * done)
        for asked, texts, ended in zip(PROMPTS, TEXTS, ENDED, strict=True)
        for text, done in zip(texts, ended, strict=True)
    ]


IN_CHATML = written("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>")
IN_LLAMA3 = written(
    "<s><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"
)


@torch.no_grad()
def plain_scores(model: Any, texts: list[tuple[str, str]]) -> np.ndarray:
    """Plain transformers on each answer alone; prompt and response are tokenised apart, as they are when they are drawn."""
    raw = tiny_tokenizer().backend_tokenizer
    rows = [[i for text in pair for i in raw.encode(text, add_special_tokens=False).ids] for pair in texts]
    return np.array([float(model.eval()(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows])


def load_as_documented(run: Path) -> Any:
    """The model that the lines of Python in the manifest load."""
    names: dict[str, Any] = {}
    exec("\n".join(json.loads((run / "manifest.json").read_text())["load"]), names)
    return names["model"]


@pytest.mark.parametrize("name", ["rm", "full"])
def test_a_run_scores_as_plain_transformers_and_is_normalised_as_it_recorded(name: str, home: Path) -> None:
    found = find(home, home / name)
    card = json.loads((home / name / "manifest.json").read_text())["reward_model"]
    assert found.scales == ((card["score_mean"], card["score_std"]),)
    assert found.scales[0].std > 0.05
    assert found.reads == "tokens"
    raw = plain_scores(load_as_documented(home / name), IN_CHATML)
    scores = loaded(found).score(drawn(home))
    assert np.abs(scores - (raw - card["score_mean"]) / card["score_std"]).max() < 1e-4
    assert raw.std() > 0.05
    as_they_are = find(home, home / name, normalize=False)
    assert as_they_are.scales == ((0.0, 1.0),)
    assert np.abs(loaded(as_they_are).score(drawn(home)) - raw).max() < 1e-5


@pytest.mark.parametrize("inside", ["model", "checkpoints/step-00000001"])
def test_a_folder_inside_a_run_has_no_figures(inside: str, home: Path) -> None:
    found = find(home, home / "rm" / inside)
    assert (*found.scales[0], found.reads) == (0.0, 1.0, "tokens")
    assert found.start.parent is None
    with pytest.raises(UsageError, match=rf"^{PLACE}: normalize: .*{inside} records no mean and deviation of its scores; set "):
        find(home, home / "rm" / inside, normalize=True)


def test_a_classifier_reads_text_and_scores_as_plain_transformers(home: Path, classifier: Path) -> None:
    found = find(home, classifier)
    assert (*found.scales[0], found.reads, found.reader.positions) == (0.0, 1.0, "text", 100)
    raw = plain_scores(AutoModelForSequenceClassification.from_pretrained(classifier), IN_LLAMA3)
    scores = loaded(found).score(drawn(home))
    assert np.abs(scores - raw).max() < 1e-5
    assert raw.std() > 0.05


def test_what_identifies_it_is_recorded(home: Path) -> None:
    found = find(home, home / "rm")
    assert found.record == {
        "name": "judge",
        "weight": 1.0,
        "model": str(home / "rm" / "model"),
        "base": weights_hash(home / "base"),
        "adapter": weights_hash(home / "rm" / "model"),
        "mean": found.scales[0].mean,
        "std": found.scales[0].std,
        "reads": "tokens",
    }
    assert found.start.parent is not None
    assert found.start.parent.path == str(home / "rm")
    assert find(home, home / "full", check=True).record["base"] == weights_hash(home / "full" / "model")


class TestTemplates:
    def test_another_template_than_the_policys_is_read_as_text(self, home: Path) -> None:
        found = find(home, home / "rm", template="none")
        assert (found.reads, found.template.text) == ("text", CHATML)

    def test_a_run_without_one_reads_prompt_and_response_as_they_stand(self, home: Path) -> None:
        assert find(home, home / "plain", template="none").reads == "tokens"
        found = find(home, home / "plain")
        assert (found.reads, found.template.text) == ("text", None)
        tokenizer = tiny_tokenizer()
        texts = [
            (tokenizer.decode(tree.prompt), tokenizer.decode(ids)) for tree in found.reader(drawn(home)) for ids in tree.responses
        ]
        assert texts == written("{}", "<|im_end|>")

    def test_where_nothing_says_which_it_is_the_policys(self, home: Path) -> None:
        """A checkpoint records no template, and its tokenizer has none."""
        found = find(home, home / "plain" / "checkpoints" / "step-00000001", template="none")
        assert (found.reads, found.template.text) == ("tokens", None)

    def test_another_end_of_turn_is_another_tokenizer(self, home: Path, tmp_path: Path) -> None:
        shutil.copytree(home / "rm" / "model", tmp_path / "rm")
        tiny_tokenizer(eos="</s>", template=CHATML).save_pretrained(tmp_path / "rm")
        assert find(home, tmp_path / "rm").reads == "text"

    def test_one_that_the_run_was_not_trained_with_is_refused(self, home: Path, tmp_path: Path) -> None:
        run = tmp_path / "rm"
        shutil.copytree(home / "rm", run)
        manifest = json.loads((run / "manifest.json").read_text())
        (run / "manifest.json").write_text(json.dumps(manifest | {"chat_template_hash": "0" * 64}))
        with pytest.raises(UsageError, match=rf"^{PLACE}: {run} was trained with another chat template than its tokenizer has"):
            find(home, run)


class TestRefused:
    def test_policies(self, home: Path) -> None:
        remedy = "a reward is judged by a run of train-rm, or by a sequence classifier with one label$"
        for name, kind in {"sft": "run of sft", "sft/model": "language model", "base": "language model"}.items():
            with pytest.raises(
                UsageError, match=rf"^{PLACE}: {home / name} is a {kind}, a policy and not a reward model; {remedy}"
            ) as caught:
                find(home, home / name)
            assert caught.value.exit_code == 2

    def test_a_mistyped_path(self, home: Path) -> None:
        with pytest.raises(UsageError, match=rf"^{PLACE}: there is no folder {home}/rmm. did you mean {home}/rm\?$"):
            find(home, home / "rmm")

    def test_a_classifier_with_two_labels(self, home: Path, tmp_path: Path) -> None:
        _save_classifier(tmp_path, labels=2, pad=0)
        with pytest.raises(UsageError, match=rf"^{PLACE}: {tmp_path}: a classifier with 2 labels is no reward model"):
            find(home, tmp_path)

    def test_an_adapter_without_a_head(self, home: Path, tmp_path: Path) -> None:
        shutil.copytree(home / "sft" / "model", tmp_path / "rm")
        config = json.loads((tmp_path / "rm" / "adapter_config.json").read_text())
        (tmp_path / "rm" / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
        with pytest.raises(UsageError, match=rf"^{PLACE}: {tmp_path}/rm: no reward head \(score.weight\) is in it"):
            find(home, tmp_path / "rm", check=True)

    def test_a_run_that_scores_everything_alike(self, home: Path, tmp_path: Path) -> None:
        run = tmp_path / "rm"
        shutil.copytree(home / "rm", run)
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["reward_model"]["score_std"] = 0.0
        (run / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UsageError, match=rf"^{PLACE}: {run} gives every response the same score .*or set normalize: false$"):
            find(home, run)
        assert find(home, run, normalize=False).scales[0].std == 1.0
