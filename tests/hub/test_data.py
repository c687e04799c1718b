"""Data sets of a hub: configurations, splits, revisions, gates, and what is said where there is none."""

from __future__ import annotations

import io
import json
import time
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from rlhf_cli.data.hub import read_hub
from rlhf_cli.data.sources import read_data
from rlhf_cli.errors import MachineError, RunError, UsageError
from rlhf_cli.sections import Data, Rows, Source
from tests.data.uses import request_of
from tests.hub.conftest import start_again
from tests.hub.server import GRANTED, READER, Hub, Repository

NAMES = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: en.jsonl}
  - {split: test, path: en2.jsonl}
- config_name: de
  data_files: de.jsonl
---
"""


def lines(*prompts: str) -> str:
    return "".join(json.dumps({"prompt": prompt, "completion": "yes"}) + "\n" for prompt in prompts)


def prompts(path: str, **keys: str | None) -> list[str]:
    rows = list(read_hub(Rows(path, **keys), "r.yaml:4"))  # type: ignore[arg-type]
    assert [number for number, _ in rows] == list(range(1, len(rows) + 1))
    return [row["prompt"] for _, row in rows]


def refusal(path: str, kind: type[RunError] = UsageError, **keys: str | None) -> str:
    with pytest.raises(kind) as error:
        prompts(path, **keys)
    text = str(error.value)
    assert text.startswith("r.yaml:4: ") and text.count("\n") < 3
    return text.removeprefix("r.yaml:4: ")


def test_every_format_is_read(hub: Hub) -> None:
    table, parquet, csv = pa.table({"prompt": ["a", "b"], "completion": ["yes", "no"]}), io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table, parquet)
    pyarrow.csv.write_csv(table, csv)
    for suffix, content in ("jsonl", lines("a", "b")), ("parquet", parquet.getvalue()), ("csv", csv.getvalue()):
        hub.add("dataset", f"org/{suffix}", {f"train.{suffix}": content})
        assert prompts(f"org/{suffix}") == ["a", "b"]
    # No other host is asked: neither for tables of its own making, nor to count downloads.
    assert not datasets.config.USE_PARQUET_EXPORT and not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


def test_configurations_splits_and_slices(hub: Hub) -> None:
    files = {"README.md": NAMES, "en.jsonl": lines(*"abcdefghij"), "en2.jsonl": lines("x"), "de.jsonl": lines("z")}
    hub.add("dataset", "org/two", files)
    assert prompts("org/two", name="de") == ["z"]
    assert prompts("org/two", name="en", split="train[:2]") == ["a", "b"]
    assert prompts("org/two", name="en", split="train[90%:]+test") == ["j", "x"]
    assert prompts("org/two", name="en", split="all") == [*"abcdefghij", "x"]
    assert refusal("org/two") == "org/two has several configurations: `name` must say which. there are en, de"
    assert refusal("org/two", name="End") == "org/two has no configuration End. did you mean en?"
    assert refusal("org/two", name="fr") == "org/two has no configuration fr. there are en, de"
    assert refusal("org/two", name="en", split="tst") == "org/two has no split tst. did you mean test?"
    assert refusal("org/two", name="en", split="train+dev") == "org/two has no split dev. there are train, test"
    assert "train[:x]" in refusal("org/two", name="en", split="train[:x]")
    assert "no data" in refusal("org/two", name="en", split="train[50:60]")


def test_a_wrong_split_is_told_before_anything_is_fetched(hub: Hub) -> None:
    hub.add("dataset", "org/rows", {"train.jsonl": lines("a"), "test.jsonl": lines("b")})
    assert refusal("org/rows", split="validation") == "org/rows has no split validation. there are train, test"
    assert not [request for request in hub.requests if "train.jsonl" in request]


def test_a_folder_is_a_configuration(hub: Hub) -> None:
    hub.add("dataset", "org/dirs", {"one/train.jsonl": lines("a"), "two/train.jsonl": lines("b")})
    assert prompts("org/dirs") == ["a", "b"]
    assert prompts("org/dirs", name="two") == ["b"]
    assert refusal("org/dirs", name="three") == "org/dirs has no configuration three. there are default"


def test_revisions(hub: Hub) -> None:
    repository = hub.add("dataset", "org/rows", {"train.jsonl": lines("old")})
    first = repository.refs["main"]
    repository.commit({"train.jsonl": lines("tried")}, "trial")
    repository.commit({"train.jsonl": lines("new")}, "main", "v2")
    assert prompts("org/rows") == prompts("org/rows", revision="v2") == ["new"]
    assert prompts("org/rows", revision=first) == ["old"]
    assert prompts("org/rows", revision="trial") == ["tried"]
    said = "the data set org/rows has no revision trail. did you mean trial?"
    assert refusal("org/rows", revision="trail") == said
    said = "the data set org/rows has no revision 1.0. there are main, trial, v2, and the hashes of commits"
    assert refusal("org/rows", revision="1.0") == said


def test_who_may_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("dataset", "org/gated", {".gitattributes": "", "README.md": "Hello", "train.jsonl": lines("a")}, gated=True)
    hub.add("dataset", "org/private", {"train.jsonl": lines("b")}, private=True)
    page = f"the data set org/gated is gated\n  accept its conditions at {hub.endpoint}/datasets/org/gated, and "
    absent = "there is no data set org/{}, neither here nor on the hub. mend the name, or if it is private "
    unset, other = "set HF_TOKEN to a token that may read it", "use a token that may read it"
    assert refusal("org/gated", MachineError) == page + unset
    assert refusal("org/private") == absent.format("private") + unset
    assert refusal("org/missing") == absent.format("missing") + unset
    monkeypatch.setenv("HF_TOKEN", READER)
    assert refusal("org/gated", MachineError) == page + other
    assert prompts("org/private") == ["b"]
    assert refusal("org/missing") == absent.format("missing") + other
    monkeypatch.setenv("HF_TOKEN", GRANTED)
    assert prompts("org/gated") == ["a"]
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    said = "the data set org/private may not be read with your token (HF_TOKEN, or of `hf auth login`). "
    assert refusal("org/private", MachineError) == said + other


def test_programs_are_not_run(hub: Hub) -> None:
    hub.add("dataset", "org/made", {"made.py": "raise SystemExit(7)", "train.jsonl": lines("a")})
    assert refusal("org/made").startswith("org/made makes its rows by a program, made.py, which is never run.")
    assert not [request for request in hub.requests if "made.py" in request]
    hub.repositories["dataset", "org/made"].commit({"default/train.jsonl": lines("b")}, "refs/convert/parquet")
    assert prompts("org/made", revision="refs/convert/parquet") == ["b"]


def test_what_cannot_be_read(hub: Hub) -> None:
    said = {
        "none": ({"notes.md": "Hello"}, "it has no data files of a known format"),
        "card": ({"README.md": "---\nconfigs: [\n---\n", "train.jsonl": lines("a")}, "while parsing a flow node"),
        "gone": ({"README.md": NAMES, "de.jsonl": lines("a")}, "Unable to find 'hf://datasets/org/gone@"),
        "cut": ({"train.jsonl": lines("a") + '{"prompt": 1'}, "Unexpected character found when decoding object value"),
        "mixed": ({"train/a.jsonl": lines("a"), "train/b.jsonl": '{"other": 3}\n'}, "Couldn't cast"),
    }
    for name, (files, reason) in said.items():
        hub.add("dataset", f"org/{name}", files)  # type: ignore[arg-type]
        assert reason in refusal(f"org/{name}", name="de" if name == "gone" else None)


class TestCache:
    @pytest.fixture
    def repository(self, hub: Hub) -> Repository:
        repository = hub.add("dataset", "org/rows", {"train.jsonl": lines("old"), "test.jsonl": lines("t")})
        assert prompts("org/rows", revision="main") == ["old"]
        return repository

    def test_without_a_hub(
        self, repository: Repository, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The server is gone: rows come from the cache, with a warning, and what is not there is said."""
        hub.shutdown()
        hub.socket.close()
        start_again()
        gone, started = f"{hub.endpoint} cannot be reached", time.monotonic()
        assert prompts("org/rows") == ["old"]
        assert prompts("org/rows", split="test") == ["t"]
        assert capsys.readouterr().err == f"warning: {gone}: org/rows is taken from the cache\n"
        assert refusal("org/other", MachineError) == f"org/other is not in the cache, or not whole, and {gone}"
        assert refusal("org/rows", split="tset") == "org/rows has no split tset. did you mean test?"
        assert time.monotonic() - started < 3
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        start_again()
        assert prompts("org/rows") == ["old"]
        assert capsys.readouterr().err == ""
        said = "org/other is not in the cache, or not whole, and HF_HUB_OFFLINE is set"
        assert refusal("org/other", MachineError) == said

    def test_a_revision_is_never_another(self, repository: Repository, hub: Hub) -> None:
        first = repository.refs["main"]
        repository.commit({"train.jsonl": lines("new")}, "main", "v2")
        hub.fault = lambda request: 503
        silent = f"is not in the cache, or not whole, and {hub.endpoint} answers 503"
        assert prompts("org/rows", revision=first) == prompts("org/rows", revision="main") == ["old"]
        assert refusal("org/rows", MachineError, revision="v2") == f"revision v2 of org/rows {silent}"
        hub.fault = lambda request: None
        assert prompts("org/rows") == ["new"]
        hub.fault = lambda request: 503
        assert prompts("org/rows", revision="main") == ["new"]
        assert refusal("org/rows", MachineError, revision=first) == f"revision {first} of org/rows {silent}"

    def test_a_configuration_is_never_another(self, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
        hub.add(
            "dataset", "org/two", {"README.md": NAMES, "en.jsonl": lines("a"), "en2.jsonl": lines("b"), "de.jsonl": lines("c")}
        )
        assert prompts("org/two", name="en") == ["a"]
        hub.fault = lambda request: 500
        said = f"org/two has no configuration de in the cache, and {hub.endpoint} answers 500. did you mean en?"
        assert refusal("org/two", name="de") == said
        capsys.readouterr()
        assert prompts("org/two") == ["a"]
        assert "org/two: the configuration in the cache is en\n" in capsys.readouterr().out


def test_a_hub_that_falls_silent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its first answer; the library's pauses between its attempts are left out."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for index, (file, fault, said) in enumerate(
        (
            ("README.md", 503, "LocalEntryNotFoundError: An error happened while trying to locate the file on the Hub"),
            ("train.jsonl", 503, "Server error '503 Service Unavailable' for url"),
            ("train.jsonl", "cut", "peer closed connection"),
            ("train.jsonl", 429, "Client error '429 Too Many Requests'"),
        )
    ):
        hub.add("dataset", f"org/rows{index}", {"train.jsonl": lines("a")})
        hub.fault = partial(lambda file, fault, request: fault if request.endswith(f"/{file}") else None, file, fault)
        assert refusal(f"org/rows{index}", MachineError).startswith(f"org/rows{index} could not be fetched: {said}")


ALIKE = {
    "sft": [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 1},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
            ]
        },
    ],
    "dpo": [{"prompt": "q", "chosen": "a", "rejected": "b", "subset": "x"}, {"prompt": "r", "chosen": "c", "rejected": "d"}],
    "train-rm": [
        {"prompt": "q", "responses": ["a", "b", "c"], "scores": [3, 2.5, 0]},
        {"prompt": "r", "responses": ["d", "e"], "scores": [1, 0]},
    ],
    "kto": [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "r", "completion": "b", "label": False}],
}


@pytest.mark.parametrize("stage", ALIKE)
def test_the_same_records_as_from_a_file(stage: str, hub: Hub, tmp_path: Path) -> None:
    """A column or key that only some rows have is empty in the others: that is as if they had none."""
    content = "".join(json.dumps(row) + "\n" for row in ALIKE[stage])
    (tmp_path / "rows.jsonl").write_text(content)
    hub.add("dataset", "org/rows", {"train.jsonl": content})
    file, repository = (
        read_data(Data([Source(path)]), request_of(stage)).train for path in (str(tmp_path / "rows.jsonl"), "org/rows")
    )
    assert len(file) == 2
    assert [record._replace(where="") for record in repository] == [record._replace(where="") for record in file]
    assert [record.where for record in repository] == ["org/rows[train]:1", "org/rows[train]:2"]
