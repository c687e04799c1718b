"""report.html: well-formed, nothing from outside, nothing hostile, and a browser shows it."""

from __future__ import annotations

import base64
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_cli.evaluation.eval_json import EvaluationResult
from rlhf_cli.figures import Interval
from rlhf_cli.reports.document import (
    Block,
    Code,
    Column,
    Document,
    Example,
    Examples,
    Finding,
    Paragraph,
    Picture,
    Response,
    Section,
    Table,
)
from rlhf_cli.reports.evaluation import write_report
from rlhf_cli.reports.html import render
from rlhf_cli.runs.folder import RunFolder
from tests.reports.an_evaluation import HOSTILE, MODELS, evaluation, samples, tables

VOID = {"meta", "img", "br", "link", "input"}


class Reader(HTMLParser):
    """What a page has, and whether each element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("an <b>evaluation")
    write_report(RunFolder(folder), EvaluationResult.from_json(evaluation()), tables(samples()))
    return folder / "report.html"


def test_well_formed_and_named(written: Path) -> None:
    read = Reader(written.read_text("utf-8"))
    assert read.open == []
    assert read.all("html") == [{"lang": "en"}]
    assert len(read.all("h1")) == len(read.all("title")) == 1
    assert all(name in read.text for name in MODELS)
    anchors = {own["href"] for own in read.all("a")}
    ids = [own["id"] for _, own in read.found if "id" in own]
    assert len(ids) == len(set(ids))
    assert anchors == {f"#{own['id']}" for own in read.all("section")}
    assert len(read.all("caption")) == len(read.all("table")) == 11
    assert all(own.get("scope") in ("row", "col") for own in read.all("th"))
    assert all(own["alt"] for own in read.all("img"))


def test_nothing_from_outside(written: Path) -> None:
    text = written.read_text("utf-8")
    read = Reader(text)
    policy = [own["content"] for own in read.all("meta") if own.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    sources = [own[name] or "" for _, own in read.found for name in ("src", "href", "srcset", "action", "data") if name in own]
    assert sources
    assert all(re.match(r"#[a-z]+$|data:image/png;base64,", source) for source in sources)
    style = text.split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|https?:", style)
    assert not {"script", "link", "iframe", "object", "form", "base"} & {tag for tag, _ in read.found}
    assert not [name for _, own in read.found for name in own if name.startswith("on")]


def test_pictures_are_those_of_the_folder(written: Path) -> None:
    shown = [base64.b64decode((own["src"] or "").split(",")[1]) for own in Reader(written.read_text("utf-8")).all("img")]
    assert sorted(shown) == sorted(path.read_bytes() for path in (written.parent / "plots").glob("*.png"))
    assert len(shown) == 6


def test_hostile_text_is_shown_and_does_nothing(written: Path) -> None:
    text = written.read_text("utf-8")
    visible = HOSTILE.replace("\x00", "\\x00").replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert visible in Reader(text).text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)


def test_long_texts_are_shortened(tmp_path: Path) -> None:
    lines = samples(("sft", "dpo"), prompts=2, responses=1)
    lines[2]["response"] = "long <&> " * 1_200_000  # 10.8 MB
    lines[3]["response"] = " \n"
    write_report(RunFolder(tmp_path), EvaluationResult.from_json(evaluation()), tables(lines))
    text = (tmp_path / "report.html").read_text("utf-8")
    assert len(text) < 1_000_000
    assert f"{10_800_000 - 5000:,} more characters are in samples.jsonl." in text
    assert "4,500 characters more" in text
    assert "(empty: white space only)" in text
    assert (tmp_path / "report.md").stat().st_size < 100_000


def page(*blocks: Block) -> str:
    return render(Document("t", "l", (Section("s", "S", blocks),)))


def test_code_in_sentences_and_lines_of_it() -> None:
    """What stands between backquotes is code, and is escaped like all else."""
    text = page(Paragraph("set `a<b` or `c` to 5 %"), Code(("import x", "", "y = '<&>'")))
    assert '<p dir="auto">set <code>a&lt;b</code> or <code>c</code> to 5\u00a0%</p>' in text
    assert '<pre tabindex="0"><code>import x\n\ny = &#39;&lt;&amp;&gt;&#39;</code></pre>' in text


def test_examples_with_a_title_are_folded_in() -> None:
    own = (Example("Why?", (Response("before", "", "did not end"), Response("after", "So.", ""))),)
    open_ones, folded = Reader(page(Examples("", own))), Reader(page(Examples("of a model", own)))
    assert (len(open_ones.all("details")), len(folded.all("details"))) == (0, 1)
    assert "(empty)" in open_ones.text and "did not end" in open_ones.text
    assert open_ones.open == folded.open == []


def test_bars() -> None:
    """A scale from 0 to 1 on 120 pixels with 4 at either side: 0.25 is at 4 + 0.25 · 112 = 32, 0.5 at 60, 0.75 at 88."""
    own = Table("c", (Column("m"), Column("v", 0.5, (0.0, 1.0))), (("a", Interval(0.5, 0.25, 0.75)), ("b", "")))
    text = page(own)
    assert '<line class="span" x1="32.0" y1="6.0" x2="88.0" y2="6.0"/><circle cx="60.0" cy="6.0"' in text
    assert '<line class="mark" x1="60.0"' in text
    assert text.count("<svg") == 1
    alone = Table("c", (Column("m"), Column("v")), (("a", Interval(3.0, 3.0, 3.0)),))
    assert '<circle cx="60.0"' in page(alone)  # nothing to be scaled by: the middle
    assert "<td" in text


def test_neighbours_are_one_list() -> None:
    found, picture = Finding("note", "h", "t"), Picture("p", "p.png", "alt", b"")
    read = Reader(page(found, found, Paragraph("words"), found, picture, picture))
    assert [own.get("class") for own in read.all("ul")] == [None, "findings", "findings"]
    assert [own.get("class") for own in read.all("div")].count("pictures") == 1
    assert read.open == []


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(file: Path, profile: Path, *flags: str) -> str:
    command = [
        *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}"),
        *flags,
        file.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode("utf-8", "replace")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_reads_the_same(written: Path, tmp_path: Path) -> None:
    shown, sent = Reader(browse(written, tmp_path, "--dump-dom")), Reader(written.read_text("utf-8"))
    for tag in ("tr", "td", "img", "svg", "section", "article", "details"):
        assert len(shown.all(tag)) == len(sent.all(tag)) > 0
    assert not shown.all("script")
    assert "<script>document.title='owned'</script>" in shown.text
    assert re.search(r"^an <b>evaluation\d*: evaluation", shown.text.strip())  # the title, as it was


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_draws_it(written: Path, tmp_path: Path, width: int) -> None:
    from matplotlib.image import imread

    picture = tmp_path / "page.png"
    browse(written, tmp_path / "profile", f"--screenshot={picture}", f"--window-size={width},6000")
    assert struct.unpack(">II", picture.read_bytes()[16:24]) == (width, 6000)
    pixels = imread(picture)[..., :3]
    ground = pixels[5, 2]
    assert (abs(pixels - ground).max(-1) > 0.2).mean() > 0.02  # text and pictures
    assert abs(pixels[200:, -4:] - ground).max() < 0.2  # nothing runs out of the page at the right
    blue = abs(pixels - [0x48 / 255, 0x78 / 255, 0xA8 / 255]).max(-1) < 0.01
    assert blue.sum() > 200  # matplotlib's own colour: the pictures were decoded
