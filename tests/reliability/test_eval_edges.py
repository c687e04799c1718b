"""Evaluations at their edges: models that overflow, series that cannot be compared, what makes a finished one unfinished."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_cli.data.sources import read_data
from rlhf_cli.evaluation import responses
from rlhf_cli.evaluation.eval_json import EvaluationResult
from rlhf_cli.models import placement
from rlhf_cli.recipe import recipes
from rlhf_cli.recipe.load import load_recipe
from rlhf_cli.reports.findings_evaluation import findings
from rlhf_cli.stages.prepare import row_request
from tests.data.tiny_tokenizer import ZEPHYR, tiny_tokenizer
from tests.stages.tiny_runs import (
    FUNCTIONS,
    LETTERS,
    MODEL,
    PROMPTS,
    SPLIT,
    TRAINED,
    lines,
    make_home,
    note_draws,
    notes,
    result,
    signal_while_drawing,
    write_eval,
)
from tests.tiny import forget_functions, make_base, rlhf, write_recipe

SAMPLED: dict[str, Any] = {
    "reference": "sft",
    "prompts": PROMPTS,
    "rollout": {"max_new_tokens": 6, "responses_per_prompt": 2},
    "reward": [MODEL],
    "gold": [LETTERS],
}
BOTH = {"sft": "HOME/sft", "bare": "HOME/base"}

SERIES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("sft", {"lora": {"r": 4}}),
    "from-base": ("base", {"lora": {"r": 4}}),
    "full": ("base", {"lora": None}),
    "full-from-sft": ("sft", {"lora": None}),
    "strange": ("foreign", {"lora": {"r": 4}}),
}
"""Runs of one checkpoint: what each starts from, and how it is trained."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `foreign`: the base with another chat template."""
    folder = make_home(tmp_path_factory.mktemp("edges"), "sft", "rm", "dpo")
    make_base(folder / "foreign", seed=2)
    tiny_tokenizer(eos="<|im_end|>", template=ZEPHYR).save_pretrained(folder / "foreign")
    (folder / "foreign" / "chat_template.jinja").write_text(ZEPHYR)
    return folder


@pytest.fixture(scope="module")
def series(home: Path) -> Path:
    """The home, with SERIES in it."""
    for name, (start, sections) in SERIES.items():
        own = sections | {"train": {"steps": 1, "save_every": 1, "learning_rate": 0.001}, "data": {"max_length": 96}}
        path = write_recipe(home / f"{name}.yaml", home / start, home / "pairs.jsonl", home / name, **own)
        assert rlhf("dpo", path) == 0
    return home


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished evaluation with pairs; its recipe, the pairs and the functions lie beside it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "own.py").write_text(FUNCTIONS)
    path = write_eval(folder / "ev.yaml", home, **sections_of(folder))
    assert rlhf("eval", path) == 0
    return folder


def sections_of(folder: Path, **sections: Any) -> dict[str, Any]:
    own = {"gold": [{"function": f"{folder / 'own.py'}:letters"}], "dump_pairs": str(folder / "ranked.jsonl")}
    return SAMPLED | {"models": BOTH, "winrate": {"baseline": "sft", "judge": "gold"}} | own | sections


@pytest.fixture
def finished(home: Path, whole: Path, tmp_path: Path) -> Path:
    """The recipe of a copy of `whole`, where nothing has changed."""
    forget_functions()
    shutil.copytree(whole, tmp_path / "copy")
    for name in ("ev.yaml", "ev/recipe.yaml", "ev/inputs.json"):
        path = tmp_path / "copy" / name
        path.write_text(path.read_text().replace(str(whole), str(tmp_path / "copy")))
    return tmp_path / "copy" / "ev.yaml"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return note_draws(monkeypatch)


def is_finished(path: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    """Does --resume find nothing to do? Else it goes on to the end."""
    capsys.readouterr()
    assert rlhf("eval", path, "--resume") == 0
    return bool(re.search(r" is finished: \S+report\.html$", capsys.readouterr().out.rstrip()))


def overflowing(run: Path, folder: Path) -> Path:
    """A copy of the run's adapter whose product is beyond float32."""
    shutil.copytree(run / "model", folder)
    weights = folder / "adapter_model.safetensors"
    state = {name: torch.full_like(own, 1e38) if "lora_B" in name else own for name, own in load_file(weights).items()}
    save_file(state, weights, {"format": "pt"})
    return folder


REWARD, POLICY = {"model": "TMP/rm-beyond"}, {"sft": "HOME/sft", "beyond": "TMP/dpo-beyond"}
OVERFLOWS: dict[str, tuple[dict[str, Any], str]] = {
    "reward model": ({"models": {"beyond": "TMP/rm-beyond"}, "preferences": PROMPTS}, "beyond is broken"),
    "reward": ({"models": {"sft": "HOME/sft"}, "reward": [REWARD], "preferences": PROMPTS}, "reward/rm-beyond is broken"),
    "gold": ({"models": {"sft": "HOME/sft"}, "gold": [REWARD], "preferences": PROMPTS}, "gold/rm-beyond is broken"),
    "policy": ({"models": POLICY, "reference": "sft", "preferences": PROMPTS}, "beyond or sft is broken"),
    "reference": ({"models": POLICY, "reference": "beyond", "preferences": PROMPTS}, "sft or beyond is broken"),
    "text": ({"models": POLICY, "text": PROMPTS}, "beyond is broken"),
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_weights_that_overflow(name: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message has the model and the first held-out row; the evaluation is never taken for finished."""
    for run in ("rm", "dpo"):
        overflowing(home / run, tmp_path / f"{run}-beyond")
    recipe = load_recipe("dpo", home / "dpo.yaml").recipe
    assert isinstance(recipe, recipes.DpoRecipe)
    where = read_data(recipe.data, row_request(recipe, str)).held_out[0].where
    sections, message = OVERFLOWS[name]
    path = write_eval(tmp_path / "ev.yaml", home, **json.loads(json.dumps(sections).replace("TMP", str(tmp_path))))
    for words in ((), ("--resume",)):
        assert rlhf("eval", path, *words) == 3
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert re.fullmatch(rf"error: {re.escape(where)}: .* response 1 is (nan|-?inf)", errors[0]), errors
        assert errors[1].startswith(f"error: {message}: ") and "an earlier checkpoint" in errors[1] and len(errors) == 2
        assert not {"manifest.json", "eval.json", "report.md", "report.html"} & {f.name for f in (tmp_path / "ev").iterdir()}


@pytest.mark.parametrize("count", [1, 2])
def test_text_of_one_row(
    count: int, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before weights are loaded; two are enough."""
    loaded: list[str] = []
    original = placement.load_model

    def loading(settings: Any, base: str, *others: Any) -> Any:
        loaded.append(base)
        return original(settings, base, *others)

    monkeypatch.setattr(placement, "load_model", loading)
    rows = (home / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "text.jsonl").write_text("".join(rows[:count]))
    path = write_eval(tmp_path / "ev.yaml", home, models=BOTH, text=str(tmp_path / "text.jsonl"))
    assert rlhf("eval", path) == (2 if count == 1 else 0)
    if count == 1:
        message = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r": text: fewer than 2 rows are left", message), message
        assert not loaded and not (tmp_path / "ev").exists()
    else:
        assert loaded and result(tmp_path / "ev")["models"]["sft"]["perplexity"]["mean"] > 1


@pytest.mark.slow
def test_a_series_in_other_tokens_has_no_curve(series: Path, tmp_path: Path) -> None:
    """That of another series is there."""
    models = {"sft": "HOME/sft", "strange": "HOME/strange/checkpoints/*", "lora": "HOME/lora/checkpoints/*"}
    path = write_eval(tmp_path / "ev.yaml", series, **SAMPLED | {"models": models, "best_of_n": [2]})
    assert rlhf("eval", path) == 0
    found = result(tmp_path / "ev")
    assert [(point["series"], point["model"]) for point in found["overoptimisation"]] == [
        ("lora", "sft"),
        ("lora", "lora/step-00000001"),
        ("best of n", "sft"),
        ("best of n", "sft"),
    ]
    assert set(found["fits"]) == {"lora", "best of n"}
    assert "objective/scores" in found["models"]["strange/step-00000001"]
    said = {each.head.partition(": ")[0] for each in findings(EvaluationResult.from_json(found)) if ": " in each.head}
    assert said == {"lora", "best of n"}


@pytest.mark.parametrize(
    ("name", "reference", "stranger"),
    [
        ("lora", "sft", False),
        ("lora", "base", True),
        ("from-base", "base", False),
        ("from-base", "sft", True),
        ("full", "base", False),
        ("full", "sft", True),
        ("full-from-sft", "sft", False),
        ("full-from-sft", "base", True),
        ("lora", "dpo", True),
    ],
)
def test_a_series_that_began_elsewhere_is_named(name: str, reference: str, stranger: bool, series: Path, tmp_path: Path) -> None:
    models = {reference: f"HOME/{reference}", "own": f"HOME/{name}/checkpoints/*"}
    path = write_eval(tmp_path / "ev.yaml", series, models=models, reference=reference, preferences=PROMPTS)
    assert rlhf("eval", path) == 0
    expected = f"own: that run did not start from {reference}, so the point at KL 0 is where distances are measured from, not "
    assert notes(tmp_path / "ev") == ([expected + "where the run began."] if stranger else [])


def test_finished_and_nothing_changed(finished: Path, drawn: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in finished.parent.rglob("*") if path.is_file()}
    assert is_finished(finished, capsys) and drawn == []
    assert {path: path.read_bytes() for path in finished.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["ev/eval.json", "ev/report.md", "ev/report.html", "ranked.jsonl", "ev/manifest.json"])
def test_what_was_removed_is_written_again(
    name: str, finished: Path, drawn: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished.parent / name
    before = path.read_bytes()
    path.unlink()
    assert not is_finished(finished, capsys) and drawn == []
    assert "manifest" in name or path.read_bytes() == before
    assert path.exists() and is_finished(finished, capsys)


def test_a_reward_function_that_was_mended(finished: Path, drawn: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """Its new numbers are those of the same responses; then it is finished again."""
    folder = finished.with_suffix("")
    before = result(folder)["models"]["bare"]["gold/letters"]["mean"]
    assert before > 0
    (finished.parent / "own.py").write_text(FUNCTIONS.replace("/ 10", "/ 5"))
    assert not is_finished(finished, capsys) and drawn == []
    assert result(folder)["models"]["bare"]["gold/letters"]["mean"] == pytest.approx(2 * before)
    assert all(line["terms"]["gold/letters"] == len(line["response"]) / 5 for line in lines(folder / "samples.jsonl"))
    assert is_finished(finished, capsys)


def test_a_model_with_another_template_put_first(home: Path, finished: Path, drawn: list[int]) -> None:
    """Tokens of all inputs are then read another way, which is no other input."""
    before = lines(finished.with_suffix("") / "samples.jsonl")
    more = sections_of(finished.parent, models={"foreign": "HOME/foreign"} | BOTH)
    assert rlhf("eval", write_eval(finished, home, **more), "--resume") == 0
    found = lines(finished.with_suffix("") / "samples.jsonl")
    assert drawn == [26] and [line for line in found if line["model"] != "foreign"] == before
    assert len(found) == 3 * 26 and found[0]["model"] == "foreign"


def test_another_way_to_write_a_path(home: Path, finished: Path, drawn: list[int]) -> None:
    before = result(finished.with_suffix(""))
    same = sections_of(finished.parent, models={"sft": "HOME/./sft", "bare": "HOME/sft/../base"})
    assert rlhf("eval", write_eval(finished, home, **same), "--resume") == 0
    assert drawn == [] and result(finished.with_suffix("")) == before


@pytest.mark.parametrize(("what", "run"), [("model own", "dpo"), ("reward rm-own", "rm")])
def test_a_refusal_says_what_differs(what: str, run: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The field, before and after; what is equal is not there."""
    shutil.copytree(home / run / "model", tmp_path / "rm-own")
    own = str(tmp_path / "rm-own")
    models = {"sft": "HOME/sft"} | ({"own": own} if run == "dpo" else {})
    reward = [{"model": own}] if run == "rm" else [MODEL]
    path = write_eval(tmp_path / "ev.yaml", home, **SAMPLED | {"models": models, "reward": reward})
    assert rlhf("eval", path) == 0
    weights = tmp_path / "rm-own" / "adapter_model.safetensors"
    old = json.loads(json.loads((tmp_path / "ev" / "inputs.json").read_text())[what])["adapter"]
    save_file({name: value + 0.01 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    capsys.readouterr()
    assert rlhf("eval", path, "--resume") == 2
    message = capsys.readouterr().err
    assert re.search(rf"^(?:error:)? +{what}: adapter {old} → (?!{old})[0-9a-f]{{32}}$", message, re.MULTILINE), message


def test_a_line_with_an_unknown_key(finished: Path, drawn: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished.with_suffix("")
    first, *others = lines(folder / "samples.jsonl")
    own = [first | {"politeness": 3}, *others]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    (folder / "eval.json").unlink()
    before = (folder / "samples.jsonl").read_bytes()
    assert rlhf("eval", finished, "--resume") == 2
    message = capsys.readouterr().err
    assert f"{folder / 'samples.jsonl'}: " in message and "politeness" in message and "--force" in message
    assert drawn == [] and (folder / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize(("key", "value"), [("number", 0), ("number", 7), ("number", -1), ("row", 99)])
def test_a_line_in_another_place(key: str, value: int, finished: Path, drawn: list[int]) -> None:
    """Of 26 of the second model the last, response 1 to its prompt: that model is drawn again, and the other is not."""
    folder = finished.with_suffix("")
    before, own = result(folder), lines(folder / "samples.jsonl")
    assert own[-1]["model"] == "bare" and own[-1]["number"] == 1
    text = (folder / "samples.jsonl").read_bytes()
    own[-1][key] = value
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    (folder / "eval.json").unlink()
    assert rlhf("eval", finished, "--resume") == 0
    assert drawn == [26] and result(folder) == before and (folder / "samples.jsonl").read_bytes() == text


def test_fewer_responses_for_best_of_n(home: Path, tmp_path: Path, drawn: list[int]) -> None:
    """Those that are asked for no more are no reason to draw the others again."""
    more, fewer = (SAMPLED | {"models": BOTH, "best_of_n": ns} for ns in ([4], []))
    assert rlhf("eval", write_eval(tmp_path / "ev.yaml", home, **more)) == 0
    assert rlhf("eval", write_eval(tmp_path / "ev.yaml", home, **fewer), "--resume") == 0
    assert drawn == [52, 26] and len(lines(tmp_path / "ev" / "samples.jsonl")) == 52
    assert result(tmp_path / "ev")["overoptimisation"] == []


UNWRITABLE: dict[str, tuple[str, str]] = {
    "folder": ("TMP/folder.jsonl", "is a folder"),
    "data": ("TMP/pairs.jsonl", "is read by this evaluation, and would be overwritten"),
    "data by another way": ("TMP/folder.jsonl/../link.jsonl", "is read by this evaluation, and would be overwritten"),
    "what was drawn": ("TMP/ev/samples.jsonl", "is read by this evaluation, and would be overwritten"),
}


@pytest.mark.parametrize("name", UNWRITABLE)
@pytest.mark.parametrize("by_word", [False, True])
def test_pairs_overwrite_no_input(
    name: str, by_word: bool, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    shutil.copy(home / "pairs.jsonl", tmp_path)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "pairs.jsonl")
    dump, message = UNWRITABLE[name]
    dump = dump.replace("TMP", str(tmp_path))
    sections = SAMPLED | {"models": BOTH, "prompts": str(tmp_path / "pairs.jsonl")}
    path = write_eval(tmp_path / "ev.yaml", home, **sections | ({} if by_word else {"dump_pairs": dump}))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert rlhf("eval", path, *(("--dump-pairs", dump) if by_word else ())) == 2
    found = capsys.readouterr().err
    assert "dump_pairs: " in found and f"{Path(dump)} {message}" in found
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("section", ["prompts", "preferences", "text"])
def test_data_errors_name_the_keys_of_this_stage(
    section: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not `data.max_lost`, which is a key of training."""
    rows = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in ("red", "blue", "green " * 90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"models": BOTH, section: str(tmp_path / "rows.jsonl")}
    common |= {"prompts": {"rollout": {"max_new_tokens": 6}}, "preferences": {"reference": "sft"}, "text": {}}[section]

    def message(code: int, **sections: Any) -> str:
        path = write_eval(tmp_path / "ev.yaml", home, **common | sections)
        capsys.readouterr()
        assert rlhf("eval", path, *(() if code else ("--check",))) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    found = message(2)
    assert "1 of 3 rows (33.3%) are dropped or truncated; max_lost allows 5.0%" in found
    assert "set max_lost to 0.334 or more" in found and "data." not in found
    assert "longer than max_length" in found or "tokens" in found
    found = message(2, overlong="error")
    assert re.search(r"tokens.*, but max_length is 96", found) and "set overlong to " in found and "data." not in found
    found = message(0, max_lost=0.5)
    assert re.search(rf"\n  {section} +2 rows \(dropped: 1 longer than max_length\)\n", found), found


def test_an_interrupt_between_two_tokens(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While the first model draws, and, gone on, while the second one does."""
    path = write_eval(tmp_path / "ev.yaml", home, **sections_of(whole, dump_pairs=None))
    folder = tmp_path / "ev"
    for words, call, name, count in (((), 1, "sft", 0), (("--resume",), 2, "bare", 26)):
        with monkeypatch.context() as patch:
            signal_while_drawing(patch, signal.SIGINT, call)
            assert rlhf("eval", path, *words) == 130
        message = capsys.readouterr().err.splitlines()[-1]
        assert f"stopped by SIGINT while {name} was evaluated" in message and message.endswith("continue with --resume")
        assert len(lines(folder / "samples.jsonl")) == count
        assert not {".lock", "manifest.json", "eval.json"} & {file.name for file in folder.iterdir()}
    assert rlhf("eval", path, "--resume") == 0
    assert result(folder) == result(whole / "ev")
    assert (folder / "samples.jsonl").read_bytes() == (whole / "ev" / "samples.jsonl").read_bytes()


def test_a_file_of_somebody_else_is_not_overwritten(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump = tmp_path / "mine.jsonl"
    dump.write_text("mine")
    path = write_eval(tmp_path / "ev.yaml", home, **SAMPLED, models=BOTH)
    for more in ((), ("--resume",)):
        assert rlhf("eval", path, "--dump-pairs", dump, *more) == 2
        assert "exists already. name another file, or --force to move it to" in capsys.readouterr().err
        assert dump.read_text() == "mine"
    assert rlhf("eval", path, "--dump-pairs", dump, "--force") == 0
    assert (tmp_path / "mine.jsonl.old-1").read_text() == "mine"
    assert "responses" in lines(dump)[0]
    assert "the responses of sft, bare to " in capsys.readouterr().out
    assert rlhf("eval", path, "--dump-pairs", dump) == 2
    assert rlhf("eval", path, "--dump-pairs", dump, "--resume", "--set", "seed=0") == 0


def test_a_run_of_another_command_is_not_resumed(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_eval(tmp_path / "ev.yaml", home, **SAMPLED, models=BOTH)
    assert rlhf("eval", path, "--output", home / "dpo", "--resume") == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: --resume: {home / 'dpo'} is a run of another command, not of eval. choose another output"
    ]


@pytest.mark.parametrize(
    ("share", "seed", "warned"), [(0.4, SPLIT, False), (0.4, None, False), (0.2, SPLIT, True), (0.4, 1, True)]
)
def test_rows_that_training_has_seen(
    share: float, seed: int | None, warned: bool, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """dpo has held out 0.4 of the pairs by a seed, which is the default here; sft has learned from other rows."""
    rows = {"path": "HOME/pairs.jsonl", "holdout": share, "holdout_seed": seed}
    models = {"sft": "HOME/sft", "dpo": "HOME/dpo"}
    path = write_eval(tmp_path / "ev.yaml", home, models=models, reference="sft", preferences=rows)
    assert rlhf("eval", path) == 0
    expected = f"dpo {TRAINED} {home / 'pairs.jsonl'}, preferences here: "
    said = [note for note in result(tmp_path / "ev")["about"]["notes"] if TRAINED in note]
    assert [note.startswith(expected) for note in said] == [True] * warned
    assert (f"warning: {expected}" in capsys.readouterr().err) == warned


def test_a_model_that_takes_its_time(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(responses, "PATIENCE", 0.0)
    assert rlhf("eval", write_eval(tmp_path / "ev.yaml", home, **SAMPLED, models=BOTH)) == 0
    assert "bare: drawing and scoring, 0 s so far\n" in capsys.readouterr().out
