"""The page: nobody but its own annotators may speak to it; and a browser judges on it by keys, by touch and by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from rlhf_cli.errors import MachineError
from rlhf_cli.labels.questions import Row, queues
from rlhf_cli.labels.server import LARGEST, Site, serving
from rlhf_cli.labels.verdicts import Judging
from tests.labels.browser import CHROMIUM, Browser, browser

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "<b>2+2?</b> & more"},
    {"role": "assistant", "content": "In words?"},
    {"role": "user", "content": "Yes"},
]
WORDS = {"a": "a", "b": "b", "t": "tie", "x": "both-bad", "s": "skip"}


CONTRAST = """(() => {
const parts = text => text.match(/[\\d.]+/g).map(Number);
const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = text => { const [r, g, b] = parts(text).map(linear); return .2126 * r + .7152 * g + .0722 * b };
const back = it => {
  for (; it; it = it.parentElement) {
    const own = getComputedStyle(it).backgroundColor;
    if (parts(own)[3] !== 0) return own;
  }
};
const texts = it => [...it.childNodes].some(node => node.nodeType === 3 && node.data.trim());
return [...document.querySelectorAll('body *')].filter(it => texts(it) && it.checkVisibility() && it.tagName !== 'SCRIPT')
  .map(it => [light(getComputedStyle(it).color), light(back(it))].sort((a, b) => b - a))
  .map(([a, b]) => (a + .05) / (b + .05));
})()"""
"""The contrast of each text that is to be seen with what is behind it."""


def some_rows(count: int) -> list[Row]:
    """Every fifth one has four responses."""
    said = ("four " * 40, "<script>document.title = 'hacked'</script>", "no idea", "4")
    return [Row(k, [*TALK[:-1], {"role": "user", "content": f"Yes {k}"}], said[: 4 if k % 5 == 4 else 2]) for k in range(count)]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    gold = [Row(0, "known?", ("yes", "no"), known=(0, 1))]
    asked = queues(some_rows(29), gold, ("ann", "bo"), 1.0, "all", 0)
    with serving(Judging(asked, tmp_path / "verdicts.jsonl"), 0) as site:
        yield site


def lines(site: Site, name: str) -> list[dict[str, Any]]:
    return [vars(line) for line in site.judging.said(name)]


def ask(
    site: Site, path: str = "", body: Any = None, name: str = "ann", method: str = "", **headers: str
) -> tuple[int, str, dict[str, str]]:
    connection = HTTPConnection("127.0.0.1", site.server_port, timeout=20)
    sent = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    own = {"Content-Type": "application/json"} if body is not None else {}
    own |= {header.replace("_", "-"): value for header, value in headers.items()}
    token = urlsplit(site.links[name]).path
    connection.request(method or ("GET" if body is None else "POST"), path if path.startswith("//") else token + path, sent, own)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), dict(answer.headers)
    connection.close()
    return found


class TestWhoMaySpeak:
    def test_each_annotator_has_a_secret_path(self, site: Site) -> None:
        ann, bo = (urlsplit(link).path for link in site.links.values())
        assert ann != bo and len(ann) > 30
        assert json.loads(ask(site, "/state", name="bo")[1])["annotator"] == "bo"
        for path in ("", "state", ann[:-1], f"{ann}x/state", "//" + ann):
            assert ask(site, f"//x/../{path}")[0] == 404

    @pytest.mark.parametrize(
        "headers",
        [
            {"Host": "evil.example"},
            {"Host": "127.0.0.1.evil.example:80"},
            {"Host": "[::1"},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:1"},
            {"Sec_Fetch_Site": "cross-site"},
            {"Sec_Fetch_Site": "same-site"},
        ],
        ids=str,
    )
    def test_no_other_page_and_no_name_that_points_here(self, headers: dict[str, str], site: Site) -> None:
        shown = json.loads(ask(site, "/state")[1])["question"]
        assert ask(site, "/state", **headers)[0] == 404
        assert ask(site, "/verdict", {"question": shown["id"], "verdict": "skip"}, **headers)[0] == 404
        assert site.judging.lines == []

    def test_its_own_page_may_also_through_a_tunnel(self, site: Site) -> None:
        host = "localhost:9999"
        assert ask(site, "/state", Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin")[0] == 200
        assert ask(site, "", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200  # a link in a mail

    def test_what_is_sent(self, site: Site) -> None:
        status, page, headers = ask(site)
        assert status == 200
        policy = headers["Content-Security-Policy"]
        (nonce,) = set(re.findall(r"'nonce-([^']+)'", policy))
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert page.count(f'nonce="{nonce}"') == 2
        assert f'nonce="{nonce}"' not in ask(site)[1]
        assert (headers["Cache-Control"], headers["Referrer-Policy"]) == ("no-store", "no-referrer")
        assert not re.search(r"https?://|(src|href)=(?!\"data:,)", page)

    def test_nothing_tells_what_is_known_of_a_question(self, site: Site) -> None:
        known = False
        for _ in range(30):
            state = json.loads(ask(site, "/state")[1])
            assert state.keys() == {"annotator", "done", "total", "finished", "question"}
            assert state["question"].keys() == {"id", "prompt", "responses"}
            known |= state["question"]["prompt"] == [{"role": "user", "text": "known?"}]
            assert ask(site, "/verdict", {"question": state["question"]["id"], "verdict": "both-bad"})[0] == 200
        assert known

    @pytest.mark.parametrize(
        ("path", "body", "status"),
        [
            ("/verdict", b"{", 400),
            ("/verdict", b"[" * 60000, 400),
            ("/verdict", [], 400),
            ("/verdict", {"question": "x", "verdict": "a"}, 409),
            ("/undo", {}, 409),
            ("/finish", {}, 400),
            ("/other", {}, 400),
            ("/verdict", b" " * (LARGEST + 1), 413),
        ],
    )
    def test_nonsense(self, path: str, body: Any, status: int, site: Site) -> None:
        assert ask(site, path, body)[0] == status
        assert site.judging.lines == [] and not site.ended.is_set()

    def test_a_form_of_another_page_is_no_verdict(self, site: Site) -> None:
        shown = json.loads(ask(site, "/state")[1])["question"]
        body = json.dumps({"question": shown["id"], "verdict": "skip"}).encode()
        assert ask(site, "/verdict", body, Content_Type="text/plain")[0] == 404
        wrong = {"question": shown["id"], "verdict": "nonsense"}
        assert ask(site, "/verdict", wrong)[0] == 400
        assert ask(site, "/verdict", {"question": shown["id"], "verdict": "skip", "reason": [1]})[0] == 400
        assert site.judging.lines == []

    def test_a_full_disk_ends_it_and_nothing_is_said_to_be_saved(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise MachineError("the disk is full")

        monkeypatch.setattr(site.judging._log, "append", full)
        shown = json.loads(ask(site, "/state")[1])["question"]
        assert ask(site, "/verdict", {"question": shown["id"], "verdict": "skip"})[0] == 500
        assert site.ended.wait(5) and str(site.fault) == "the disk is full"

    def test_a_port_that_is_taken(self, site: Site) -> None:
        with pytest.raises(MachineError, match=rf"--port {site.server_port}: Address already in use"):
            Site(site.judging, site.server_port)


def title(page: Browser, text: str) -> None:
    page.until(f"document.title.startsWith({text!r})")


def responses(page: Browser) -> int:
    return int(page.run("document.querySelectorAll('#responses > li').length"))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
class TestInABrowser:
    def test_thirty_verdicts_by_keys_and_thirty_by_touch(self, site: Site) -> None:
        """One annotator on a desk, with a reload and an undo amid it, one on a phone; then both finish."""
        with browser() as page:
            said = self._by_keys(site, page)
            assert [line["verdict"] for line in lines(site, "ann")] == said
            page.press("f")
            title(page, "Thank you")
            assert not site.ended.is_set()
            touched = self._by_touch(site, page)
            assert [line["verdict"] for line in lines(site, "bo")] == touched
            page.touch("document.querySelector('#choices button')")
            title(page, "Thank you")
            assert site.ended.wait(5)
        assert lines(site, "ann")[0]["reason"] == "that is why, a b t"

    def _by_keys(self, site: Site, page: Browser) -> list[Any]:
        page.size(1280, 800)
        page.open(site.links["ann"])
        said: list[Any] = []
        undone = False
        page.run("document.querySelector('summary').click(), document.querySelector('textarea').focus()")
        for letter in "that is why, a b t":
            page.press(letter)
        assert page.run("document.title") == "Question 1 of 30"  # letters in the text judge nothing
        page.run("document.activeElement.blur()")
        while len(said) < 30:
            title(page, f"Question {len(said) + 1} of 30")
            if responses(page) > 2:
                for key in ("3", "1", "=", "4", "Enter"):  # 2 stays last
                    page.press(key)
                said.append([2, 3, 1, 2])
            else:
                key = "abtxs"[len(said) % 5]
                page.press(key)
                said.append(WORDS[key])
            if len(said) == 12:
                page.until("document.title.startsWith('Question 13')")
                page.open(site.links["ann"])
            if len(said) == 17 and not undone:
                title(page, "Question 18 of 30")
                assert page.run("document.activeElement.id") == "title"
                assert page.run("document.getElementById('status').textContent").startswith("Saved: ")
                page.press("u")
                title(page, "Question 17 of 30")
                undone = bool(said.pop())
        title(page, "All is judged")
        return said

    def _by_touch(self, site: Site, page: Browser) -> list[Any]:
        page.size(375, 667)
        page.open(site.links["bo"])
        said: list[Any] = []
        dragged = 0
        while len(said) < 30:
            title(page, f"Question {len(said) + 1} of 30")
            assert page.run("document.documentElement.scrollWidth") == 375
            if responses(page) > 2:
                self._drag(page, "#grip2", "#r0")
                page.until("document.querySelector('#responses > li').dataset.k === '2'")
                page.touch("document.querySelector('#tie1')")
                page.touch("document.querySelector('#choices button')")
                said.append([2, 2, 1, 3])
                dragged += 1
            else:
                at = len(said) % 5
                page.touch(f"document.querySelectorAll('#choices button')[{at}]")
                said.append(("a", "tie", "b", "both-bad", "skip")[at])
        assert dragged == 5
        title(page, "All is judged")
        return said

    def _drag(self, page: Browser, grip: str, to: str) -> None:
        x, y = page.middle(f"document.querySelector('{grip}')")
        end = page.run(f"document.querySelector('{to}').closest('li').getBoundingClientRect().y + 2")
        page("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        for step in range(1, 6):
            page("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": x, "y": y + (end - y) * step / 5}])
        page("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def test_what_a_screen_reader_meets(self, site: Site) -> None:
        with browser() as page:
            page.open(site.links["ann"])
            number = 1
            title(page, "Question 1 of 30")
            while responses(page) != 4:
                page.press("s")
                number += 1
                title(page, f"Question {number} of 30")
            found = page.named()
            roles = {role for role, _ in found}
            assert roles >= {"banner", "main", "navigation", "heading", "list", "listitem", "status", "alert", "progressbar"}
            told = ("button", "checkbox", "progressbar", "region")
            assert [role for role, name in found if role in told and not name] == []
            names = [name for role, name in found if role == "button"]
            assert {"Move up Response 2", "Move down Response 1", "Ties with the one above: Response 3"} <= set(names)
            assert page.run("document.title") != "hacked"
            page.run("document.getElementById('down0').focus()")
            page.press("Enter")
            assert page.run("[...document.querySelectorAll('#responses > li')].map(it => it.dataset.k).join('')") == "1023"
            assert page.run("document.activeElement.id") == "down0"
            assert page.run("document.getElementById('status').textContent") == "Response 1 is at place 2 of 4."

    def test_keys_can_be_turned_off_and_a_lost_command_is_told(self, site: Site) -> None:
        with browser() as page:
            page.open(site.links["ann"])
            page.run("document.getElementById('keys').click()")
            page.press("s")
            page.run("document.getElementById('keys').click()")
            assert site.judging.lines == []
            site.shutdown()
            site.judging.close()
            page.press("s")
            page.until("document.getElementById('fault').textContent.startsWith('Not saved')")
            assert site.judging.lines == []

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_contrast(self, scheme: str, site: Site) -> None:
        """At least 4.5 to 1 for every text (WCAG 2.2, 1.4.3)."""
        with browser() as page:
            page("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            page.open(site.links["ann"])
            found = page.run(CONTRAST)
            assert len(found) > 15
            assert min(found) >= 4.5
