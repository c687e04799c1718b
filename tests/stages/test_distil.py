"""`rlhf sft` with kind distil: the divergences that plain transformers gives, on the data's responses and on the policy's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.deaths import die_and_resume
from tests.invariance.agreement import agree, steps_of
from tests.ranks import two_ranks
from tests.tiny import make_base, make_model, read_lines, rlhf, split_lines, write_recipe, write_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a teacher: an adapter on it that has learned the rows."""
    folder = tmp_path_factory.mktemp("distil")
    make_base(folder / "base")
    write_rows(folder / "rows.jsonl", 14)
    write_rows(folder / "eval.jsonl", 3, seed=1)
    train = {"steps": 6, "learning_rate": 0.02, "save_every": None}
    parts = folder / "base", folder / "rows.jsonl", folder / "teacher"
    assert rlhf("sft", write_recipe(folder / "teacher.yaml", *parts, lora={"r": 4}, train=train)) == 0
    return folder


def recipe(home: Path, output: Path, **sections: Any) -> Path:
    train = {"steps": 4, "batch_size": 5, "save_every": None, "eval_every": 2} | sections.pop("train", {})
    objective = {"kind": "distil", "teacher": str(home / "teacher")} | sections.pop("objective", {})
    data = {"eval": str(home / "eval.jsonl"), "max_length": 80} | sections.pop("data", {})
    parts = home / "base", home / "rows.jsonl", output
    given = {"lora": {"r": 4}, "train": train, "objective": objective, "data": data} | sections
    return write_recipe(output.with_suffix(".yaml"), *parts, **given)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_the_logged_loss_is_that_of_plain_transformers(kind: str, home: Path, tmp_path: Path) -> None:
    objective = {"divergence": kind, **({"beta": 0.3} if kind == "jsd" else {})}
    run = tmp_path / "run"
    assert rlhf("sft", recipe(home, run, objective=objective, train={"steps": 1, "eval_every": None})) == 0
    student = AutoModelForCausalLM.from_pretrained(home / "base")
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    teacher = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), home / "teacher" / "model")
    found, alike = list[float](), list[bool]()
    for row in read_lines(home / "eval.jsonl"):
        asked = [{"role": "user", "content": row["prompt"]}]
        whole = [*asked, {"role": "assistant", "content": row["completion"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        text = tokenizer.apply_chat_template(whole, tokenize=False).rstrip("\n")
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)[None]
        with torch.no_grad():
            p, q = (Categorical(logits=model(ids).logits[0, len(prompt) - 1 : -1].double()) for model in (student, teacher))
        mixed = Categorical(0.3 * q.probs + 0.7 * p.probs)
        found += {
            "forward": kl_divergence(q, p),
            "reverse": kl_divergence(p, q),
            "jsd": 0.3 * kl_divergence(q, mixed) + 0.7 * kl_divergence(p, mixed),
        }[kind].tolist()
        alike += (p.probs.argmax(-1) == q.probs.argmax(-1)).tolist()
    first = read_lines(run / "metrics.jsonl")[0]
    assert (first["step"], first["split"]) == (0, "eval")
    assert first["loss"] == pytest.approx(sum(found) / len(found), rel=1e-5)
    assert first["teacher/agreement"] == pytest.approx(sum(alike) / len(alike))


def test_a_teacher_that_is_the_start_teaches_nothing(home: Path, tmp_path: Path) -> None:
    sgd = {"optimizer": "sgd", "learning_rate": 0.02}
    assert rlhf("sft", recipe(home, tmp_path / "run", objective={"teacher": str(home / "base")}, train=sgd)) == 0
    for line in read_lines(tmp_path / "run" / "metrics.jsonl"):
        assert line["loss"] == pytest.approx(0, abs=1e-6)
        assert line["teacher/agreement"] == 1


def test_the_policy_comes_near_its_teacher_on_its_own_samples(home: Path, tmp_path: Path) -> None:
    """All weights learn, so that the teacher is a model beside; the manifest and the report name it."""
    run, rollout = tmp_path / "run", {"max_new_tokens": 6, "responses_per_prompt": 2}
    sections = {"objective": {"divergence": "reverse"}, "rollout": rollout, "train": {"steps": 12, "learning_rate": 0.02}}
    assert rlhf("sft", recipe(home, run, lora=None, **sections)) == 0
    lines = split_lines(run, "eval")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert all(0 < line["response/eos_rate"] <= 1 < line["response/length"] <= 6 for line in split_lines(run, "train"))
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["teacher"]["adapter"] and [own["path"] for own in manifest["parents"]] == [str(home / "teacher")]
    report = (run / "report.md").read_text()
    assert f"Started from `{home / 'base'}` and trained" in report, "and not from its teacher"
    assert f"- teacher `{home / 'teacher' / 'model'}`, weights {manifest['teacher']['adapter']}" in report


def test_a_run_that_died_goes_on_with_the_same_samples(home: Path, tmp_path: Path) -> None:
    words = ["sft", recipe(home, tmp_path / "whole", rollout={"max_new_tokens": 6}, train={"save_every": 1})]
    assert rlhf(*words) == 0
    die_and_resume(words, tmp_path / "again", "optimise", 3)
    one, two = (tmp_path / run / "model" / "adapter_model.safetensors" for run in ("whole", "again"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("rollout", [None, {"max_new_tokens": 6}], ids=["data", "samples"])
def test_neither_the_cut_nor_ranks_change_anything(rollout: Any, home: Path, tmp_path: Path) -> None:
    given = {"rollout": rollout} if rollout else {}
    assert rlhf("sft", recipe(home, tmp_path / "one", **given)) == 0
    assert rlhf("sft", recipe(home, tmp_path / "cut", train={"tokens_per_device": 30}, **given)) == 0
    two_ranks("sft", recipe(home, tmp_path / "two", train={"tokens_per_device": 30}, **given))
    for other in ("cut", "two"):
        agree(tmp_path / "one", tmp_path / other, steps_of(4, 2))


def test_what_makes_no_sense_is_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(**sections: Any) -> str:
        assert rlhf("sft", recipe(home, tmp_path / "bad", **sections), "--check") == 2
        return "".join(capsys.readouterr())

    assert "objective.beta: has no effect with divergence: forward" in refused(objective={"beta": 0.1})
    assert "data.train_on: has no effect where responses are drawn" in refused(rollout={}, data={"train_on": "last"})
    assert "rollout.missing_eos_penalty: has no effect where nothing is scored" in refused(rollout={"missing_eos_penalty": 1.0})
    bad = write_recipe(
        tmp_path / "sft.yaml", home / "base", home / "rows.jsonl", tmp_path / "x", rollout={}, data={"max_length": 200}
    )
    assert rlhf("sft", bad, "--check") == 2
    assert "rollout: kind: sft learns from the responses of its data" in "".join(capsys.readouterr())
    make_model(tmp_path / "other")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokens.add_tokens(["more"])
    tokens.save_pretrained(tmp_path / "other")
    said = refused(objective={"teacher": str(tmp_path / "other")})
    assert "objective.teacher: " in said and "has another tokenizer than" in said
    assert "objective.teacher" in refused(objective={"teacher": str(tmp_path / "nowhere")})
