"""Files, folders and the hub → records; limits, hold-out and mixing."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_cli.data.batches import epoch_order
from rlhf_cli.data.files import MAX_LINE, is_hub_id
from rlhf_cli.data.records import Facts, Message, Record
from rlhf_cli.data.sources import check_lost, prompt_share, read_data
from rlhf_cli.errors import UsageError
from rlhf_cli.recipe.stages import ROW_USES
from rlhf_cli.sections import Data, Source
from tests.data.uses import purpose_of, request_of

ROWS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(20)]
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
GOOD = json.dumps(ROWS[0]).encode()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with open(name, "w") as file:  # noqa: PTH123
        file.write(text)


def read(*sources, stage="sft", seed=0, where=str, margin=None, **data):
    sources = [source if isinstance(source, Source) else Source(source) for source in sources]
    return read_data(Data(sources, **data), request_of(stage, seed, where=where, margin_column=margin))


def answers(records):
    return [record.responses[0] for record in records]


LONG_LINE = b'{"prompt": "q", "completion": "' + b"a" * MAX_LINE + b'"}'
BAD_LINES = {
    "bad JSON": (b'{"prompt": "q" "completion": "a"}', "not JSON (Expecting ',' delimiter, column 16)"),
    "no JSON": (b"prompt,completion", "not JSON (Expecting value, column 1)"),
    "a cut line": (b'{"prompt": "q", "completion": "a', "not JSON (Unterminated string starting, column 31)"),
    "two rows in a line": (b'{"prompt": "q"} {"prompt": "q"}', "not JSON (Extra data, column 17)"),
    "a BOM within": (b"\xef\xbb\xbf" + GOOD, "not JSON (Expecting value, column 1)"),
    "a raw NUL": (b'{"prompt": "q\0", "completion": "a"}', "not JSON (Invalid control character, column 14)"),
    "only NULs": (b"\0" * 40, "not JSON (Expecting value, column 1)"),
    "an escaped NUL": (b'{"prompt": "q", "completion": "\\u0000a"}', "'completion' has a NUL character"),
    "a lone surrogate": (b'{"prompt": "q", "completion": "\\ud83d"}', "'completion' is not valid Unicode (character 1)"),
    "invalid UTF-8": (b'{"prompt": "q", "completion": "\xe4"}', "not UTF-8 (byte 32)"),
    "a raw surrogate": (b'{"prompt": "q", "completion": "\xed\xa0\x80"}', "not UTF-8 (byte 32)"),
    "a line of 10 MB": (LONG_LINE, "longer than 8 MiB"),
    "deep nesting": (b"[" * 100_000, "nested too deeply"),
    "many digits": (b'{"prompt": ' + b"1" * 5000 + b"}", "not JSON (a number has too many digits)"),
    "null": (b"null", "the row is null, expected an object"),
    "a list": (b'["q", "a"]', "the row is a list, expected an object"),
    "a number": (b"7", "the row is a number, expected an object"),
    "text": (b'"q"', "the row is text, expected an object"),
    "a key twice": (b'{"prompt": "q", "completion": "a", "prompt": "r"}', "a key is given twice ('prompt')"),
    "NaN": (b'{"prompt": "q", "completion": "a", "score": NaN}', "NaN and Infinity are not JSON (NaN)"),
    "Infinity": (b'{"prompt": "q", "completion": "a", "score": -Infinity}', "NaN and Infinity are not JSON (-Infinity)"),
    "an empty object": (b"{}", "'prompt' is missing"),
    "a missing key": (b'{"prompt": "q"}', "'completion' is missing"),
    "a null field": (b'{"prompt": "q", "completion": null}', "'completion' is null, expected text"),
    "a wrong type": (
        b'{"prompt": ["q"], "completion": "a"}',
        "a turn of 'prompt' is text, expected an object with role and content (turn 1)",
    ),
    "an empty text": (b'{"prompt": "q", "completion": ""}', "'completion' is empty"),
    "a blank text": (b'{"prompt": " \\n", "completion": "a"}', "'prompt' is blank"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_and_the_next_one_is_read(kind, tmp_path):
    line, message = BAD_LINES[kind]
    (tmp_path / "x.jsonl").write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    reading = read("x.jsonl")
    assert [record.where for record in reading.train] == ["x.jsonl:1", "x.jsonl:3"]
    report = reading.reports[0]
    assert report.bad_examples == (f"x.jsonl:2: {message}",)
    assert (report.read, report.kept, list(report.bad.values())) == (3, 2, [1])


def test_every_bad_line_of_a_file_is_counted_in_one_pass(tmp_path):
    lines = [line for line, _ in BAD_LINES.values() if len(line) < 1000]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([GOOD, *lines]))
    report = read("x.jsonl").reports[0]
    assert (report.read, report.kept, sum(report.bad.values())) == (len(lines) + 1, 1, len(lines))
    assert report.bad["not JSON"] == 7
    assert len(report.bad_examples) == 10


def test_bom_at_the_start_crlf_and_blank_lines_are_no_fault(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \n" + GOOD + b"\r\n")
    reading = read("x.jsonl")
    assert [record.where for record in reading.train] == ["x.jsonl:1", "x.jsonl:4"]
    assert reading.reports[0].bad == {}


def to_gz(rows):
    with gzip.open("x.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return "x.jsonl.gz"


def to_json(rows):
    with open("x.json", "w") as file:  # noqa: PTH123
        json.dump(rows, file, indent=1)
    return "x.json"


def to_csv(rows):
    with open("x.csv", "w", newline="") as file:  # noqa: PTH123
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return "x.csv"


def to_parquet(rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "x.parquet")
    return "x.parquet"


@pytest.mark.parametrize(
    ("save", "lines"),
    [(to_gz, (1, 2, 3)), (to_json, (2, 6, 10)), (to_csv, (2, 4, 5)), (to_parquet, (1, 2, 3))],
)
def test_the_same_rows_in_every_file_type(save, lines):
    rows = [{"prompt": "q\né", "completion": 'a, "b"'}, *ROWS[1:3]]
    write("x.jsonl", rows)
    reading, expected = read(save(rows)), read("x.jsonl")
    assert [record._replace(where="") for record in reading.train] == [record._replace(where="") for record in expected.train]
    assert [int(record.where.rpartition(":")[2]) for record in reading.train] == list(lines)
    assert reading.reports[0].fingerprint == expected.reports[0].fingerprint
    assert reading.reports[0].format == "prompt-completion"


def test_the_fingerprint_follows_the_content():
    write("x.jsonl", ROWS)
    first = read("x.jsonl").reports[0].fingerprint
    write("x.jsonl", [*ROWS[:-1], {"prompt": "q19", "completion": "A19"}])
    assert read("x.jsonl").reports[0].fingerprint != first
    write("x.jsonl", ROWS)
    assert read(Source("x.jsonl", limit=3)).reports[0].fingerprint == first


def test_typed_cells_of_a_csv(tmp_path):
    (tmp_path / "x.csv").write_text('prompt,completion,label\nq,a,TRUE\nq,b,false\nq,c,maybe\n"q",d\n"q"x,e,true\n')
    report = read("x.csv").reports[0]
    assert (report.kept, report.unused) == (1, {"undesirable (not for sft)": 1})
    assert report.bad_examples == (
        "x.csv:4: 'label' is neither true nor false, 1 nor 0 ('maybe')",
        "x.csv:5: another number of cells than the header (2, expected 3)",
        "x.csv:6: not CSV (',' expected after '\"')",
    )
    (tmp_path / "y.csv").write_bytes(b'prompt,responses,ranks\nq,"[""a"", ""b""]","[2, 1]"\nq,\xff,1\nq,[,1\n')
    reading = read("y.csv")
    assert answers(reading.train) == ["b"]
    assert reading.reports[0].bad_examples == ("y.csv:3: not UTF-8", "y.csv:4: 'responses' is text, expected a list")


def test_bad_elements_of_a_json_list_are_named_by_line(tmp_path):
    (tmp_path / "x.json").write_text('[\n{"text": "a"},\n{"text": NaN}, 7,\n{"text": "b", "text": "c"}\n]')
    assert read("x.json").reports[0].bad_examples == (
        "x.json:3: NaN and Infinity are not JSON (NaN)",
        "x.json:3: the row is a number, expected an object",
        "x.json:4: a key is given twice ('text')",
    )


def test_json_lines_under_the_name_json():
    write("x.json", ROWS[:2])
    assert answers(read("x.json").train) == ["a0", "a1"]


CUT_GZ = gzip.compress(b"\n".join(json.dumps({"text": f"{i * 7919}"}).encode() for i in range(5000)))[:-2000]
WHOLE_FILE = {
    "empty.jsonl": (b"", "empty.jsonl: no rows; expected one of {needs}"),
    "blank.jsonl": (b"\n \n", "blank.jsonl: no rows; expected one of {needs}"),
    "empty.json": (b"[]", "empty.json: no rows; expected one of {needs}"),
    "empty.csv": (b"prompt,completion\n", "empty.csv: no rows; expected one of {needs}"),
    "nothing.csv": (b"", "nothing.csv: no rows; expected one of {needs}"),
    "bad.jsonl": (
        b"{\n}\nnull",
        "bad.jsonl: no good row among 3: 2 × not JSON, 1 × the row is null, expected an object; expected one of {needs}\n"
        "  bad.jsonl:1: not JSON (Expecting property name enclosed in double quotes, column 2)",
    ),
    "blanks.jsonl": (
        b'{"text": ""}\n{"text": " "}',
        "blanks.jsonl: no good row among 2: 1 × 'text' is empty, 1 × 'text' is blank; expected text rows (text)\n"
        "  blanks.jsonl:1: 'text' is empty",
    ),
    "columns.jsonl": (
        b'{"a": 1}',
        "data.train.0.path: columns.jsonl: found the columns a; sft needs {needs}; in a recipe, beside the path, "
        "name those that are meant: columns: {ours: theirs}",
    ),
    "not.jsonl.gz": (GOOD, "not.jsonl.gz: not a gzip file, or cut off (Not a gzipped file (b'{\"')); copy or write it again"),
    "list.json": (
        b'[{"text": "a"},\n{"text": }]',
        "list.json:2: not JSON (Expecting value, column 10); expected one list of objects",
    ),
    "open.json": (
        b'[{"text": "a"}\n',
        "open.json:2: not JSON (Expecting ',' or ']' after a row, column 1); expected one list of objects",
    ),
    "more.json": (
        b'[{"text": "a"}] x',
        "more.json:1: not JSON (Extra data after the list, column 17); expected one list of objects",
    ),
    "bytes.json": (b'[\n{"text": "\xff"}]', "bytes.json:2: not UTF-8; save the file as UTF-8"),
    "twice.csv": (b"prompt,prompt\na,b\n", "twice.csv:1: the header names a column twice: prompt, prompt"),
    "quote.csv": (b'text\na\n"b\nc\nd\n', "quote.csv:3: a quote is opened and never closed"),
    "x.pkl": (b"cos\nsystem\n.", "data.train.0.path: cannot read x.pkl; expected .jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet"),
}
NEEDS = purpose_of("sft").needs


@pytest.mark.parametrize("name", WHOLE_FILE)
def test_a_file_that_cannot_be_used_at_all(name, tmp_path):
    content, message = WHOLE_FILE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as error:
        read(name)
    assert str(error.value) == message.replace("{needs}", NEEDS)


def test_damaged_archives(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(CUT_GZ)
    with pytest.raises(UsageError, match=r"^x\.jsonl\.gz: cut off or damaged after line \d+ \("):
        read("x.jsonl.gz")
    (tmp_path / "x.parquet").write_bytes(b"PAR1nothing")
    with pytest.raises(UsageError, match=r"^x\.parquet: not a parquet file, or damaged \("):
        read("x.parquet")


def test_another_stages_data_and_a_wrong_format():
    write("x.jsonl", [{"prompt": "q"}])
    with pytest.raises(UsageError) as error:
        read("x.jsonl", where=lambda key: f"r.yaml:{key}")
    assert str(error.value) == (
        f"r.yaml:data.train.0.path: x.jsonl: the columns prompt: found prompt data (prompt), which ppo can use; sft needs {NEEDS}"
        "; in a recipe, beside the path, name those that are meant: columns: {ours: theirs}"
    )
    with pytest.raises(UsageError, match=r"^r\.yaml:data\.eval\.0\.format: x\.jsonl: found prompt data"):
        write("y.jsonl", ROWS)
        read("y.jsonl", eval=[Source("x.jsonl", format="prompt")], where=lambda key: f"r.yaml:{key}")
    with pytest.raises(UsageError) as error:
        read(Source("x.jsonl", format="hh"))
    assert str(error.value) == (
        "x.jsonl: no good row among 1: 1 × 'chosen' is missing; expected hh rows (chosen + rejected)\n"
        "  x.jsonl:1: 'chosen' is missing"
    )
    write("x.jsonl", [{"prompt": "q", "completion": "a", "label": False}] * 3)
    with pytest.raises(UsageError) as error:
        read("x.jsonl")
    assert str(error.value) == "data.train.0.path: sft can use none of the 3 rows: 3 × undesirable (not for sft)"


def test_columns_are_renamed():
    write("x.jsonl", [{"question": "q", "good": "a", "bad": "b", "text": "?"}])
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    reading = read(Source("x.jsonl", columns={**columns, "subset": "text"}))
    assert reading.train[0][:3] == ("q", ("a",), "x.jsonl:1")
    assert (reading.train[0].facts.subset, reading.reports[0].format) == ("?", "preference")
    write("y.jsonl", [{"chosen": "worse", "rejected": "better", "prompt": "q"}])
    assert answers(read(Source("y.jsonl", columns={"chosen": "rejected", "rejected": "chosen"})).train) == ["better"]
    with pytest.raises(UsageError) as error:
        read(Source("x.jsonl", columns={"prompt": "qestion"}))
    assert str(error.value) == "data.train.0.columns: the data has no column 'qestion'; found question, good, bad, text"
    with pytest.raises(UsageError) as error:
        read(Source("x.jsonl", columns={"promt": "question"}))
    assert str(error.value) == "data.train.0.columns: 'promt' is none of our columns. did you mean prompt?"


class Trap:
    def __reduce__(self):
        return (open, ("sprung", "w"))


JUDGED = [
    {"prompt": "q", "chosen": "a", "rejected": "b", "s": 2, "score_rejected": 1.5, "p": 0.75, "by": -1},
    {"prompt": "q", "chosen": "a", "rejected": "c", "s": None, "score_rejected": None, "p": None, "by": 3.25},
]


@pytest.mark.parametrize("save", [to_gz, to_json, to_csv, to_parquet])
def test_numbers_of_pairs_in_every_file_type(save):
    """Renamed columns have the types of ours also where a file holds nothing but texts."""
    source = Source(save(JUDGED), columns={"score_chosen": "s", "probability": "p"})
    facts = [record.facts for record in read(source, stage="dpo", margin="by").train]
    assert facts == [Facts(scores=(2.0, 1.5), probability=0.75, margin=-1.0), Facts(margin=3.25)]
    assert [record.facts.margin for record in read(source, stage="dpo").train] == [None, None]


def test_the_column_of_the_margins(tmp_path):
    rows = [{**PAIR, "by": 2}, {**PAIR, "by": -0.5}]
    write("x.jsonl", [*rows, {**PAIR, "by": None}, PAIR, {**PAIR, "by": "3"}])
    report = read("x.jsonl", stage="train-rm", margin="by").reports[0]
    assert (report.kept, report.bad_examples) == (
        2,
        (
            "x.jsonl:3: 'by' is null, expected a number",
            "x.jsonl:4: 'by' is missing",
            "x.jsonl:5: 'by' is text, expected a number",
        ),
    )
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected,by\nq,a,b,1e1\nq,a,b,\nq,a,b,much\n")
    reading = read("x.csv", stage="train-rm", margin="by")
    assert [record.facts.margin for record in reading.train] == [10.0]
    assert reading.reports[0].bad_examples[1] == "x.csv:4: 'by' is text, expected a number"
    write("y.jsonl", [PAIR])
    write("z.jsonl", [{"prompt": "q", "responses": ["a", "b"], "by": 1}])
    for name, message in (
        ("y.jsonl", "the data has no column 'by'; found prompt, chosen, rejected"),
        ("z.jsonl", "ranked rows have no one margin; only pairs of chosen and rejected have"),
    ):
        with pytest.raises(UsageError) as error:
            read(name, stage="train-rm", margin="by")
        assert str(error.value) == f"objective.margin_column: {name}: {message}"


def test_tied_rankings_are_counted_as_unused():
    tied = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}
    write("x.jsonl", [tied, {**tied, "scores": [1, 2]}])
    report = read("x.jsonl", stage="dpo").reports[0]
    assert (report.kept, report.bad, report.unused) == (1, {}, {"all responses are tied": 1})
    write("y.jsonl", [tied])
    with pytest.raises(UsageError) as error:
        read("y.jsonl", stage="dpo")
    assert str(error.value) == "data.train.0.path: dpo can use none of the 1 rows: 1 × all responses are tied"


def test_folders_and_globs(tmp_path):
    (tmp_path / "d").mkdir()
    write("d/b.jsonl", ROWS[2:4])
    write("d/a.jsonl", ROWS[:2])
    write("d/.hidden.jsonl", ROWS[4:])
    (tmp_path / "d" / "c.pkl").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "d" / "d.py").write_text("open('sprung', 'w')")
    assert [record.where for record in read("d").train] == ["d/a.jsonl:1", "d/a.jsonl:2", "d/b.jsonl:1", "d/b.jsonl:2"]
    assert answers(read("d/*").train) == answers(read(f"{tmp_path}/*/?.jsonl").train) == ["a0", "a1", "a2", "a3"]
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(UsageError) as error:
        read("d/*.txt")
    assert str(error.value) == (
        "data.train.0.path: the pattern d/*.txt has no data file among its 0 entries; "
        "expected .jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet"
    )


def test_each_file_of_a_folder_must_have_a_good_row(tmp_path):
    (tmp_path / "d").mkdir()
    write("d/a.jsonl", ROWS)
    write("d/b.jsonl", [{"text": "a"}])
    with pytest.raises(UsageError) as error:
        read("d")
    assert str(error.value) == (
        "d/b.jsonl: no good row among 1: 1 × 'prompt' is missing; expected prompt-completion rows (prompt + completion)\n"
        "  d/b.jsonl:1: 'prompt' is missing"
    )


MISSING = {
    "data/trian.jsonl": "no such file or folder: data/trian.jsonl (did you mean data/train.jsonl?)",
    "dta/train.jsonl": "no such file or folder: dta/train.jsonl (did you mean data?)",
    "./dta": "no such file or folder: ./dta (did you mean data?)",
    "data/other": "no such file or folder: data/other",
    "owner/train.jsonl": "no such file or folder: owner/train.jsonl",
    "a/b/c": "no such file or folder: a/b/c",
    "squad": "no such file or folder: squad (a data set on the hub is named owner/name)",
}


@pytest.mark.parametrize("path", MISSING)
def test_a_mistyped_path_is_no_hub_id(path, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_cli.hub.find", lambda *_: pytest.fail("asked the hub"))
    (tmp_path / "data").mkdir()
    write("data/train.jsonl", ROWS)
    with pytest.raises(UsageError) as error:
        read(path)
    assert str(error.value) == f"data.train.0.path: {MISSING[path]}"


def test_hub_ids():
    assert is_hub_id("owner/name-v1.5")
    assert not is_hub_id("owner/name.json")
    assert not is_hub_id("/owner/name")
    assert not is_hub_id("~/name")


def test_local_files_import_no_hub_library():
    write("x.jsonl", ROWS)
    code = (
        "import sys; from rlhf_cli.data.sources import read_data; from rlhf_cli.sections import Data, Source; "
        "from tests.data.uses import request_of; read_data(Data([Source('x.jsonl')]), request_of('sft')); "
        "print({'datasets', 'torch', 'transformers', 'pyarrow'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}  # of the tests, which are not installed
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_limit():
    write("x.jsonl", ROWS)
    first = answers(read(Source("x.jsonl", limit=5), shuffle=False).train)
    assert first == ["a0", "a1", "a2", "a3", "a4"]
    drawn = read(Source("x.jsonl", limit=5), seed=1)
    assert len(set(answers(drawn.train))) == 5
    assert answers(drawn.train) == answers(read(Source("x.jsonl", limit=5), seed=1).train)
    assert answers(drawn.train) != answers(read(Source("x.jsonl", limit=5), seed=2).train)
    report = drawn.reports[0]
    assert (report.read, report.kept, report.bad, report.unused) == (20, 5, {}, {"beyond the limit": 15})
    assert len(read(Source("x.jsonl", limit=50)).train) == 20


def as_every_format(i):
    prompt, good, bad = f"question {i}", f"good {i}", f"bad {i}"
    ask, say = {"role": "user", "content": prompt}, {"role": "assistant", "content": good}
    return {
        "prompt": {"prompt": prompt},
        "prompt-completion": {"prompt": [ask], "completion": good},
        "messages": {"messages": [ask, say]},
        "preference": {"prompt": prompt, "chosen": good, "rejected": bad},
        "hh": {
            "chosen": f"\n\nHuman: {prompt}\n\nAssistant: {good}",
            "rejected": f"\n\nHuman: {prompt}\n\nAssistant: {bad}",
        },
        "ranked": {"prompt": prompt, "responses": [good, bad]},
        "unpaired": {"prompt": prompt, "completion": good, "label": True},
    }


def number_of(record):
    prompt = record.prompt if isinstance(record.prompt, str) else record.prompt[-1].content
    return int(prompt.split()[-1])


def test_the_same_prompts_are_held_out_in_every_format_and_stage():
    rows = [as_every_format(i) for i in range(300)]
    held = {}
    for format in rows[0]:
        write(f"{format}.jsonl", [row[format] for row in rows])
        for stage in (stage for stage, use in ROW_USES.items() if format in use.formats):
            reading = read(f"{format}.jsonl", stage=stage, holdout_seed=3, holdout=0.2)
            held[stage, format] = {number_of(record) for record in reading.held_out}
            assert held[stage, format] | {number_of(record) for record in reading.train} == set(range(300))
            assert len(reading.train) + len(reading.held_out) == 300
    expected = held["sft", "messages"]
    assert all(numbers == expected for numbers in held.values())
    # Binomial(300, 0.2): mean 60, standard deviation 6.9.
    assert 40 <= len(expected) <= 80
    assert expected != {number_of(record) for record in read("hh.jsonl", holdout_seed=4, holdout=0.2).held_out}
    some = read(Source("hh.jsonl", limit=100), seed=5, holdout_seed=3, holdout=0.2).held_out
    assert {number_of(record) for record in some} <= expected


def test_longer_versions_of_a_dialogue_fall_where_it_does():
    """Its first user turn decides; capitals, spaces and a system turn do not."""
    first = Record("Which fruit is it?", ("a",), "x:1")
    later = ({"role": "assistant", "content": "A plum."}, {"role": "user", "content": "Why?"})
    begin = (Message("system", "Be brief."), Message("user", " which  FRUIT\nis it? "))
    longer = (first._replace(prompt=begin), first._replace(prompt=(*begin, *(Message(**turn) for turn in later))))
    assert {prompt_share(record, 3) for record in (first, *longer)} == {prompt_share(first, 3)}
    assert prompt_share(first._replace(prompt="Why?"), 3) != prompt_share(first, 3) != prompt_share(first, 4)


def test_equal_prompts_are_never_on_both_sides():
    write("x.jsonl", [{"prompt": f"q{i % 7}", "completion": f"a{i}"} for i in range(70)])
    write("y.jsonl", [{"prompt": f"q{i % 7}", "completion": f"b{i}"} for i in range(7)])
    reading = read("x.jsonl", "y.jsonl", holdout=0.4)
    train, held = ({record.prompt for record in side} for side in (reading.train, reading.held_out))
    assert train and held and not train & held
    assert len(reading.held_out) == 11 * len(held)
    assert reading.sizes == (10 * len(train), len(train))


@pytest.mark.parametrize("share", [1e-9, 0.9])
def test_both_sides_get_a_prompt(share):
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(2)]
    write("x.jsonl", rows * 3)
    for seed in range(20):
        reading = read("x.jsonl", holdout_seed=seed, holdout=share)
        low = min(reading.train + reading.held_out, key=lambda record: prompt_share(record, seed))
        assert {record.prompt for record in reading.held_out} == {low.prompt}
        assert len(reading.train) == len(reading.held_out) == 3


def test_hold_out_errors():
    write("x.jsonl", [{"prompt": "q", "completion": f"a{i}"} for i in range(9)])
    with pytest.raises(UsageError) as error:
        read("x.jsonl", holdout=0.5)
    assert str(error.value) == "data.holdout: all rows have the same prompt, so none can be held out; set data.eval instead"


def test_several_sources_and_eval():
    write("x.jsonl", ROWS[:5])
    write("y.jsonl", ROWS[5:8])
    write("z.jsonl", [{"text": "t"}])
    reading = read(Source("x.jsonl", weight=3.0), "y.jsonl", eval=[Source("z.jsonl")])
    assert (reading.sizes, reading.shares) == ((5, 3), (0.75, 0.25))
    assert answers(reading.train) == [f"a{i}" for i in range(8)]
    assert [record.prompt for record in reading.held_out] == [""]
    assert [report.format for report in reading.eval_reports] == ["text"]


def test_one_source_is_a_permutation_of_its_own_in_each_epoch():
    orders = [epoch_order([50], [1.0], 7, epoch, True) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert (epoch_order([50], [1.0], 7, 1, True) == orders[1]).all()
    assert (epoch_order([50], [1.0], 8, 1, True) != orders[1]).any()
    assert (epoch_order([50], [1.0], 7, 4, False) == np.arange(50)).all()


def test_shares_of_an_epoch():
    order = epoch_order([900, 100], [0.25, 0.75], 0, 0, True)
    assert len(order) == 1000
    assert (order < 900).sum() == 250
    assert len(set(order[order < 900])) == 250
    # 750 draws from 100 rows: seven whole cycles and half of the eighth.
    times = np.bincount(order[order >= 900] - 900)
    assert sorted(times) == [7] * 50 + [8] * 50
    # A source is spread over the epoch, not read in one block.
    assert 60 <= (order[:100] >= 900).sum() <= 90


def test_no_row_repeats_before_its_source_is_exhausted():
    sizes, shares = [8, 12], [0.2, 0.8]  # 20 rows an epoch: 4 and 16
    epochs = [epoch_order(sizes, shares, 5, epoch, True) for epoch in range(6)]
    small = [set(order[order < 8]) for order in epochs]
    assert all(small[i] | small[i + 1] == set(range(8)) for i in (0, 2, 4))
    large = np.concatenate([order[order >= 8] for order in epochs])
    # 96 draws over 12 rows: each row eight times.
    assert np.bincount(large - 8).tolist() == [8] * 12


def test_a_wrapped_list_is_read():
    with open("x.json", "w") as file:  # noqa: PTH123
        json.dump({"about": "fruit", "data": ROWS}, file, indent=1)
    reading = read("x.json")
    assert [record.where for record in reading.train] == [f"x.json:{k}" for k in range(1, 21)]
    assert answers(reading.train) == [f"a{k}" for k in range(20)]


@pytest.mark.parametrize(
    ("value", "found"), [({"a": ROWS, "b": ROWS}, "the lists a, b"), ({"prompt": "q", "completion": "a"}, "no list")]
)
def test_one_object_that_wraps_no_one_list_is_refused(value, found):
    with open("x.json", "w") as file:  # noqa: PTH123
        json.dump(value, file, indent=1)
    with pytest.raises(UsageError, match=f"^x.json: one object with {found}; expected one list of objects"):
        read("x.json")


def test_a_wrapped_list_is_as_strict_as_rows_of_their_own():
    Path("x.json").write_text('{"data": [\n{"prompt": "q", "completion": "a", "prompt": "r"}\n]}')
    with pytest.raises(UsageError, match=r"^x.json: a key is given twice \('prompt'\); expected one list of objects"):
        read("x.json")


@pytest.mark.parametrize(
    ("first", "reason"),
    [('{"prompt": "q", ', "not JSON"), ('{"prompt": NaN}', "NaN and Infinity are not JSON"), ('{"prompt": "\xff"}', "not UTF-8")],
)
def test_a_damaged_first_line_is_one_bad_row_of_many(first, reason):
    lines = [first, *(json.dumps(row) for row in ROWS)]
    Path("x.json").write_bytes("\n".join(lines).encode("latin-1"))
    reading = read("x.json", max_lost=0.5)
    assert (len(reading.train), reading.reports[0].bad) == (20, {reason: 1})


TRANSCRIPT = "\n\nHuman: Hi there\n\nAssistant: Hello.\n\nHuman: 2+2?\n\nAssistant:"


def test_a_transcript_in_a_prompt_is_read_as_its_turns():
    write("x.jsonl", [{"prompt": TRANSCRIPT, "chosen": " 4", "rejected": " 5"}, PAIR])
    (spoken, plain) = read("x.jsonl", stage="dpo").train
    assert [turn[:2] for turn in spoken.prompt] == [("user", "Hi there"), ("assistant", "Hello."), ("user", "2+2?")]
    assert plain.prompt == "q"
    request = dataclasses.replace(request_of("dpo"), chat=False)
    assert read_data(Data([Source("x.jsonl")]), request).train[0].prompt == TRANSCRIPT


def test_sources_mix_anew_in_every_epoch():
    epochs = [epoch_order([50, 50], [0.5, 0.5], 5, epoch, True) < 50 for epoch in range(3)]
    assert all(first.sum() == 50 for first in epochs)
    assert len({tuple(first) for first in epochs}) == 3


def test_file_order_with_several_sources():
    assert epoch_order([4, 2], [2 / 3, 1 / 3], 0, 0, False).tolist() == [0, 4, 1, 2, 5, 3]
    # Half of each: three rows of the first, and the second, exhausted, begins again and goes on in the next epoch.
    assert epoch_order([4, 2], [0.5, 0.5], 0, 0, False).tolist() == [0, 4, 1, 5, 2, 4]
    assert epoch_order([4, 2], [0.5, 0.5], 0, 1, False).tolist() == [3, 5, 0, 4, 1, 5]


def test_shares_are_rounded_to_whole_rows_and_an_empty_source_yields_its_own():
    third = [1 / 3] * 3
    order = epoch_order([4, 3, 3], third, 0, 0, True)
    assert np.histogram(order, [0, 4, 7, 10])[0].tolist() == [4, 3, 3]
    assert sorted(epoch_order([4, 0, 2], third, 0, 0, True)) != []
    assert (epoch_order([4, 0, 4], third, 0, 0, True) < 4).sum() == 4


def test_lost_rows():
    check_lost(5, 100, 0.05, [])
    check_lost(0, 0, 0.0, [])
    with pytest.raises(UsageError) as error:
        check_lost(6, 100, 0.05, ["x:1: a", "x:2: b", "x:3: c", "x:4: d"])
    assert str(error.value) == (
        "6 of 100 rows (6.0%) are dropped or truncated; data.max_lost allows 5.0%\n"
        "  x:1: a; x:2: b; x:3: c\n"
        "  mend these rows, or set data.max_lost to 0.06 or more"
    )
    with pytest.raises(UsageError, match=r"data\.max_lost to 0\.334 or more"):
        check_lost(1, 3, 0.05, ["x:1: a"])
