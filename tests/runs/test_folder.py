"""One process a folder, nothing deleted, and logs that survive a crash."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest

from rlhf_cli.errors import MachineError, NumberError, UsageError
from rlhf_cli.runs.folder import MetricsLog, open_run, read_metrics

HOLD = """
import sys
from pathlib import Path
from rlhf_cli.runs.folder import open_run
run = open_run(Path(sys.argv[1]), resume=False, force=False)
run.recipe.touch()
print("locked", flush=True)
sys.stdin.read()
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def holder(tmp_path):
    """Another process that has runs/a."""
    output = tmp_path / "runs" / "a"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield output, process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "flags", [{"resume": True, "force": False}, {"resume": False, "force": True}, {"resume": False, "force": False}]
)
def test_a_second_process_is_refused_at_once(holder, flags):
    output, process = holder
    with pytest.raises(UsageError, match=rf"^{output} is in use by process {process.pid} on \S+\n  wait for it, stop it"):
        open_run(output, **flags)
    assert names(output.parent) == ["a"]


def test_a_killed_process_leaves_no_obstacle(holder):
    output, process = holder
    process.kill()
    process.wait()
    assert (output / ".lock").exists()
    with open_run(output, resume=True, force=False):
        assert (output / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not (output / ".lock").exists()


def test_an_existing_folder_needs_resume_or_force(tmp_path):
    output = tmp_path / "a"
    open_run(output, resume=False, force=False).close()
    open_run(output, resume=False, force=False).close()  # still empty
    (output / "recipe.yaml").write_text("seed: 0")
    with pytest.raises(
        UsageError, match=r"a exists and is not empty\n  --resume continues it, --force moves it to \S+a\.old-<n>"
    ):
        open_run(output, resume=False, force=False)
    (output / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a finished run"):
        open_run(output, resume=False, force=False)
    assert names(output) == ["manifest.json", "recipe.yaml"]
    with open_run(output, resume=True, force=False) as run:
        assert run.recipe.read_text() == "seed: 0"


def test_force_renames_and_never_deletes(tmp_path):
    output = tmp_path / "a"
    for generation in range(3):
        with open_run(output, resume=False, force=True) as run:
            run.recipe.write_text(str(generation))
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"a.old-1/recipe.yaml": "0", "a.old-2/recipe.yaml": "1", "a/recipe.yaml": "2"}


def test_force_does_not_move_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(UsageError, match="is or contains the working directory"):
        open_run(tmp_path / "a", resume=False, force=True)
    assert names(tmp_path) == ["a"]


def test_resume_starts_where_nothing_is_and_refuses_other_folders(tmp_path):
    open_run(tmp_path / "new", resume=True, force=False).close()
    (tmp_path / "new" / ".recipe.yaml.tmp").touch()  # of a run killed at once
    open_run(tmp_path / "new", resume=True, force=False).close()
    (tmp_path / "new" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="holds files but no run"):
        open_run(tmp_path / "new", resume=True, force=False)
    with pytest.raises(UsageError, match="give one of them"):
        open_run(tmp_path / "other", resume=True, force=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "is a file, a run needs a folder"),
        ("file/a", "a part of the path is a file, not a folder"),
        ("x" * 300, "the path is too long"),
        ("a\0b", "cannot be the name of a folder"),
        ("dangling", "is a link to nothing"),
        ("\udcff", "is not UTF-8"),
    ],
)
def test_impossible_outputs(tmp_path, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises((MachineError, UsageError), match=message):
        open_run(tmp_path / name, resume=False, force=False)


def test_a_nearly_full_disk_is_refused_before_the_run(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**40, 2**40 - 2**20, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MachineError, match=r"a: 1 MiB of disk are free, at least 64 MiB are needed\n  free some space"):
        open_run(tmp_path / "a", resume=False, force=False)
    assert names(tmp_path / "a") == []


def test_log_lines_are_strict_and_positions_exact(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "split": "train", "loss": 2.5})
    line = b'{"step": 1, "split": "train", "loss": 2.5}\n'
    assert log.sync() == (len(line), hashlib.sha256(line).hexdigest()) and log.position == len(line)
    with pytest.raises(NumberError, match=r"^grad_norm is inf at step 2: "):
        log.append({"step": 2, "loss": 1.0, "grad_norm": float("inf")})
    assert log.path.read_bytes() == line


def test_resume_cuts_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 1})
    kept, digest = log.sync()
    log.append({"step": 2})
    log.close()
    with path.open("ab") as torn:
        torn.write(b'{"step": 3, "lo')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    again = MetricsLog(path)
    assert not again.truncate_after(kept, "0" * 64)
    assert again.truncate_after(kept, digest)
    again.append({"step": 2, "again": True})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2, "again": true}\n'
    assert again.position == path.stat().st_size
    assert again.sync() == (again.position, hashlib.sha256(path.read_bytes()).hexdigest())
    assert not any(again.truncate_after(place) for place in (kept - 1, 1000))
    assert again.truncate_after(0)
    assert path.read_bytes() == b""


def test_a_log_on_a_full_disk(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(MachineError, match="the disk is full"):
        log.append({"step": 1})
    assert log.position == 0


def test_a_half_written_line_is_taken_back(tmp_path):
    path = tmp_path / "samples.jsonl"
    code = (
        "import resource; from pathlib import Path; from rlhf_cli.runs.folder import MetricsLog\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        f"log = MetricsLog(Path({str(path)!r}))\n"
        "log.append({'prompt': 'x' * 50})\n"
        "try: log.append({'prompt': 'y' * 50})\n"
        "except Exception as error: print(type(error).__name__, log.position)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == f"MachineError {len(json.dumps({'prompt': 'x' * 50})) + 1}\n"
    assert read_metrics(path) == [{"prompt": "x" * 50}]
    assert path.read_bytes().endswith(b"\n")


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UsageError, match=rf"^{path}:2: not JSON"):
        read_metrics(path)
    assert read_metrics(tmp_path / "none.jsonl") == []
