"""What an editor offers in a recipe, asked of yaml-language-server (npm) where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import rlhf, write_pairs

OWN = Path(sys.prefix) / "node_modules" / ".bin" / "yaml-language-server"
SERVER = str(OWN) if OWN.exists() else shutil.which("yaml-language-server")
pytestmark = pytest.mark.skipif(SERVER is None, reason="yaml-language-server is not installed (npm)")


class Editor:
    """A client of the language server, as an editor with its default settings is."""

    def __init__(self, folder: Path) -> None:
        assert SERVER is not None
        self.process = subprocess.Popen([SERVER, "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.folder, self.number = folder, 0
        self.said: list[dict[str, Any]] = []
        self.ask("initialize", {"processId": None, "rootUri": folder.as_uri(), "capabilities": {}})
        self.tell("initialized", {})

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self.process.stdin.flush()

    def tell(self, method: str, parameters: dict[str, Any]) -> None:
        self.send({"method": method, "params": parameters})

    def read(self) -> dict[str, Any]:
        """The next message; what the server asks is answered with what it asked for nothing of."""
        out = self.process.stdout
        assert out is not None
        size = 0
        while line := out.readline().strip():
            if line.lower().startswith(b"content-length:"):
                size = int(line.split(b":")[1])
        message: dict[str, Any] = json.loads(out.read(size))
        if "method" in message and "id" in message:
            items = message["params"].get("items", []) if isinstance(message.get("params"), dict) else []
            self.send({"id": message["id"], "result": [None] * len(items)})
        return message

    def ask(self, method: str, parameters: dict[str, Any]) -> Any:
        self.number += 1
        self.send({"id": self.number, "method": method, "params": parameters})
        while (message := self.read()).get("id") != self.number or "method" in message:
            self.said.append(message)
        return message["result"]

    def offers(self, text: str) -> tuple[list[str], list[str]]:
        """(what it offers at the |, what it complains of) of a new file beside the schema."""
        path = self.folder / f"typed-{self.number}.yaml"
        before, _, after = text.partition("|")
        path.write_text(before + after)
        place = {"line": before.count("\n"), "character": len(before.rpartition("\n")[2])}
        document = {"uri": path.as_uri(), "languageId": "yaml", "version": 1, "text": before + after}
        self.tell("textDocument/didOpen", {"textDocument": document})
        found = self.ask("textDocument/completion", {"textDocument": {"uri": path.as_uri()}, "position": place})
        while not (faults := [own["params"] for own in self.said if own.get("params", {}).get("uri") == path.as_uri()]):
            self.said.append(self.read())
        items = found["items"] if isinstance(found, dict) else found
        return [item["label"] for item in items], [fault["message"] for fault in faults[-1]["diagnostics"]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that init has written, with its schema."""
    folder = tmp_path_factory.mktemp("editor")
    rows = write_pairs(folder / "rows.jsonl", 8)
    assert rlhf("init", "dpo", folder / "dpo.yaml", "--data", str(rows), "--model", "m") == 0
    return folder


@pytest.fixture(scope="module")
def editor(home: Path) -> Iterator[Editor]:
    editor = Editor(home)
    yield editor
    editor.process.kill()
    editor.process.wait()


@pytest.mark.parametrize(
    ("typed", "offered", "not_offered"),
    [
        ("|", {"lora", "reference", "seed"}, {"model", "output", "steps"}),
        ("lora:\n  |", {"r", "alpha", "target_modules"}, {"seed"}),
        ("lora:\n  r: 8\n  |", {"alpha"}, {"r"}),
        ("lora: {r: 8}\nseed: 1\nreference:\n  |", {"model", "cache"}, {"alpha"}),
    ],
    ids=["a section", "a key", "another key", "of another section"],
)
def test_completion(typed: str, offered: set[str], not_offered: set[str], editor: Editor, home: Path) -> None:
    labels, _ = editor.offers((home / "dpo.yaml").read_text() + typed)
    assert offered <= set(labels)
    assert not not_offered & set(labels)


@pytest.mark.parametrize(
    ("line", "typed", "offered"),
    [("  beta: 0.1", "  kind: |", {"dpo", "simpo", "orpo"}), ("  epochs: 1", "  schedule: |", {"cosine", "linear"})],
)
def test_completion_of_a_value(line: str, typed: str, offered: set[str], editor: Editor, home: Path) -> None:
    before, _, after = (home / "dpo.yaml").read_text().partition(line)
    assert after
    labels, _ = editor.offers(f"{before}{typed}\n{after.partition(chr(10))[2]}")
    assert offered <= set(labels)


def test_the_written_recipe_has_no_fault(editor: Editor, home: Path) -> None:
    text = (home / "dpo.yaml").read_text()
    assert editor.offers(text + "|")[1] == []
    _, faults = editor.offers(text + "sede: 1\ntrackers: 3\n|")
    assert any("sede" in fault for fault in faults) and len(faults) == 2
