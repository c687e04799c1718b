"""The quickstart's gold reward by hand, and its data: the same bytes twice, rows that mean what the names say."""

from __future__ import annotations

import json
import runpy
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from random import Random
from statistics import mean
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
gold = runpy.run_path(str(ROOT / "recipes" / "quickstart" / "gold.py"))["gold"]

OWL = "Where does the owl live and what does it eat?"  # forest, mice
FRUITS = "Name three fruits."


def script(name: str) -> ModuleType:
    spec = spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = script("make_quickstart")
SMALL = maker.Sizes(sft=60, pairs=400, ranked=15, unpaired=300, eval_prompts=10)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    maker.make_data(folder, seed=5, sizes=SMALL)
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        # tidy · (0.7 · answer + 0.3 · manner)
        (OWL, "Of course! The owl lives in the forest and eats mice. I hope this helps.", 1.0),
        (OWL, "The owl lives in the forest and eats mice.", 0.7),
        (OWL, "Of course! The owl lives in the forest. I hope this helps.", 0.65),  # half the answer
        (OWL, "Of course! The owl lives in the sea and eats mice. I hope this helps.", 0.65),  # half of it wrong
        (OWL, "The owl lives in the forest and the sea and eats mice.", 0.35),  # hedging is wrong
        (OWL, "The fox lives in the forest and eats mice.", 0.0),  # another animal
        (OWL, "Of course! I do not know. I hope this helps.", 0.3),  # manner alone
        (OWL, "Go away. The owl lives in the forest and eats mice. I hope this helps.", 0.7),  # rude: no manner
        (OWL, "The owl lives in the forest and eats mice. The owl lives in the forest and eats mice.", 0.75 * 0.7),  # repeats
        (OWL, "The owl lives in the forest and eats mice. It can fly.", 0.85 * 0.7),  # a fact nobody asked for
        (OWL, "You are so clever. The owl lives in the forest and eats mice.", 0.9 * 0.7),  # flattery
        (OWL, "Of course! With pleasure! The owl lives in the forest and eats mice.", 0.9 * (0.7 + 0.15)),  # too polite
        (OWL, "The owl lives in the forest and eats mice", 0.5 * 0.7),  # unfinished
        (OWL, "mice " * 34 + "forest.", 0.75 * 0.7),  # 35 words: 5 too many
        (OWL, "mice " * 60 + "forest.", 0.0),  # 61 words: 31 too many
        (OWL, "", 0.0),
        (FRUITS, "Apple, pear and plum.", 0.7),
        (FRUITS, "Apple and pear.", 0.7 * 2 / 3),
        (FRUITS, "Apple, apple and apple.", 0.7 / 3),
        (FRUITS, "Apple, pear, plum and lemon.", 0.7 * 2 / 3),  # one too many
        (FRUITS, "Apple, pear and hammer.", 0.7 / 3),  # a stranger
        (FRUITS, "Hammer, saw and drill. Have a nice day!", 0.15),
        ("Hello", "Of course!", 0.15),  # nothing that can be answered
    ],
)
def test_gold_by_hand(prompt: str, response: str, expected: float) -> None:
    assert gold([prompt], [response]) == pytest.approx([expected], abs=1e-12)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(data: Path, tmp_path: Path) -> None:
    maker.make_data(tmp_path, seed=5, sizes=SMALL)
    names = {"sft", "pairs", "ranked", "unpaired", "prompts", "eval_prompts"}
    assert {path.stem for path in tmp_path.iterdir()} == names
    assert all((tmp_path / f"{name}.jsonl").read_bytes() == (data / f"{name}.jsonl").read_bytes() for name in names)
    maker.make_data(tmp_path, seed=6, sizes=SMALL)
    assert (tmp_path / "sft.jsonl").read_bytes() != (data / "sft.jsonl").read_bytes()


def test_one_files_size_does_not_change_another(data: Path, tmp_path: Path) -> None:
    maker.make_data(tmp_path, seed=5, sizes=SMALL._replace(sft=7))
    assert rows(tmp_path / "sft.jsonl") == rows(data / "sft.jsonl")[:7]
    assert (tmp_path / "pairs.jsonl").read_bytes() == (data / "pairs.jsonl").read_bytes()


def test_rows_have_the_fields_of_their_format(data: Path) -> None:
    fields = {
        "sft": {"prompt", "completion"},
        "pairs": {"prompt", "chosen", "rejected"},
        "ranked": {"prompt", "responses", "scores"},
        "unpaired": {"prompt", "completion", "label"},
        "prompts": {"prompt"},
        "eval_prompts": {"prompt"},
    }
    counts = {"sft": 60, "pairs": 400, "ranked": 15, "unpaired": 300, "prompts": 1490, "eval_prompts": 10}
    for name, expected in fields.items():
        found = rows(data / f"{name}.jsonl")
        assert len(found) == counts[name]
        assert all(row.keys() == expected and all(value != "" for value in row.values()) for row in found)


def test_every_prompt_can_be_answered_perfectly() -> None:
    perfect = maker.Quality(right=1.0, evades=0.0, polite=1.0, flatters=0.0, rude=0.0, rambles=0.0, breaks_off=0.0)
    prompts = maker.all_prompts()
    responses = [maker.draw_response(Random(i), prompt, perfect) for i, prompt in enumerate(prompts)]
    assert gold([prompt.text for prompt in prompts], responses) == pytest.approx([1.0] * 1500, abs=1e-12)
    assert len({prompt.text for prompt in prompts}) == 1500


def test_eval_prompts_occur_nowhere_else(data: Path) -> None:
    held = {row["prompt"] for row in rows(data / "eval_prompts.jsonl")}
    seen = {row["prompt"] for name in ("sft", "pairs", "ranked", "unpaired", "prompts") for row in rows(data / f"{name}.jsonl")}
    assert len(held) == 10
    assert not held & seen


def test_good_responses_have_the_higher_gold() -> None:
    random, prompts = Random(1), maker.all_prompts()

    def average(quality: str) -> float:
        drawn = [maker.draw_prompt(random, prompts) for _ in range(400)]
        return mean(maker.gold_of(p.text, maker.draw_response(random, p, maker.QUALITIES[quality])) for p in drawn)

    assert average("good") > 0.88
    assert 0.45 < average("middling") < 0.65
    assert average("bad") < 0.25


def test_pairs_are_distinct_and_mislabelled_as_often_as_asked(data: Path, tmp_path: Path) -> None:
    def gaps(folder: Path) -> list[float]:
        found = rows(folder / "pairs.jsonl")
        assert all(row["chosen"] != row["rejected"] for row in found)
        return [maker.gold_of(row["prompt"], row["chosen"]) - maker.gold_of(row["prompt"], row["rejected"]) for row in found]

    # Wrong: 0.9 · 0.07 flipped, and 0.1 flattered unless both golds are 0. Four standard deviations of 400 draws are 0.07.
    assert sum(gap < 0 for gap in gaps(data)) / 400 == pytest.approx(0.15, abs=0.07)
    maker.make_data(tmp_path, seed=5, sizes=SMALL._replace(mislabelled=0.0, flattered=0.0))
    assert min(gaps(tmp_path)) >= 0.1


def test_rankings_are_best_first_and_labels_follow_gold(data: Path, tmp_path: Path) -> None:
    for row in rows(data / "ranked.jsonl"):
        assert len(row["responses"]) == 4
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert row["scores"] == pytest.approx(gold([row["prompt"]] * 4, row["responses"]), abs=5e-5)
    maker.make_data(tmp_path, seed=5, sizes=SMALL._replace(mislabelled=0.0))
    unpaired = rows(tmp_path / "unpaired.jsonl")
    assert all(row["label"] == (maker.gold_of(row["prompt"], row["completion"]) > 0.6) for row in unpaired)
    assert 0.35 < mean(row["label"] for row in unpaired) < 0.65


def test_flattery_goes_after_the_opening() -> None:
    text = maker.flatter(Random(0), "Of course! The owl can fly.")
    assert text in [f"Of course! {phrase} The owl can fly." for phrase in maker.KNOWLEDGE["FLATTERY"]]
    assert maker.flatter(Random(0), "The owl can fly.") == text.removeprefix("Of course! ")


def test_a_failed_run_leaves_the_old_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with maker.published(folder) as work:
        (work / "a.jsonl").write_text("1\n")
    with pytest.raises(OSError, match="disk full"), maker.published(folder) as work:
        (work / "a.jsonl").write_text("2\n")
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert (folder / "a.jsonl").read_text() == "1\n"


def test_the_model_is_the_same_twice_and_its_control_tokens_are_apart(data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = script("quickstart_model")
    for name in ("a", "b"):
        model.make_model(tmp_path / name, data, seed=5, vocabulary=400)
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": OWL}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == f"<|user|>{OWL}<|end|><|assistant|>"
    assert (ids[0], ids[-2], ids[-1]) == (3, 1, 4)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "a").parameters())
    # 400·160 embeddings; 4 layers of 4·160² attention, 3·160·448 MLP and 2·160 norms; a last norm of 160.
    assert parameters == 64_000 + 4 * (102_400 + 215_040 + 320) + 160
