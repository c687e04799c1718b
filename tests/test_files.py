"""Nothing half-written, nothing non-finite, and the disk's refusals in words."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_cli.errors import MachineError, NumberError
from rlhf_cli.files import hash_tree, sha256_file, write_atomic, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    write_atomic(path, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError) as caught:
        write_atomic(path, "new")
    assert str(caught.value) == f"cannot write {path}: the disk is full\n  free some space, then continue with --resume"
    assert path.read_text() == "old"
    assert names(tmp_path) == ["manifest.json"]


def test_a_size_limit_of_the_kernel_keeps_the_old_file(tmp_path):
    path = tmp_path / "big"
    path.write_text("old")
    code = (
        "import resource; from pathlib import Path; from rlhf_cli.files import write_atomic\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"try: write_atomic(Path({str(path)!r}), bytes(2000))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"MachineError cannot write {path}: the file would pass the size limit\n")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["big"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="a part of the path is a file, not a folder"):
        write_atomic(tmp_path / "file" / "x", "data")


def test_json_is_strict_and_names_the_key(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(NumberError, match=r"^final_metrics\.eval\.loss is nan: "):
        write_json(path, {"steps": 1, "final_metrics": {"eval": {"loss": float("nan")}}})
    assert not path.exists()
    write_json(path, {"b": "é\ud800", "a": [1, 0.5]})
    assert path.read_bytes() == b'{\n  "b": "\xc3\xa9\\ud800",\n  "a": [\n    1,\n    0.5\n  ]\n}\n'
    assert json.loads(path.read_bytes()) == {"b": "é\ud800", "a": [1, 0.5]}


def test_hashes(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"abc")
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"x")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "sub" / "b") == abc
    assert hash_tree(tmp_path) == {"a": hashlib.sha256(b"").hexdigest(), "sub/b": abc}
    assert hash_tree(Path(tmp_path / "none")) == {}
