"""A headless Chromium, driven through its debugging pipe: keys, touches, and what its accessibility tree says."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One tab."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._number, self._rest = read, write, 0, b""
        self._session: str | None = None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self("Page.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What a command of the DevTools protocol answers."""
        self._number += 1
        sent = {"id": self._number, "method": method, "params": parameters}
        os.write(self._write, json.dumps(sent | ({"sessionId": self._session} if self._session else {})).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                assert select.select([self._read], [], [], 30)[0], f"{method} is not answered"
                part = os.read(self._read, 1 << 20)
                assert part, "the browser has ended"
                self._rest += part
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 15) -> Any:
        """The first true value of an expression."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < deadline, f"{script}: {self.run('document.body.innerText')}"
            time.sleep(0.01)
        return found

    def open(self, url: str) -> None:
        self("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && document.title !== 'Which response is better?'")

    def size(self, width: int, height: int) -> None:
        mobile = width < 600
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self("Emulation.setTouchEmulationEnabled", enabled=mobile)

    def press(self, key: str) -> None:
        code = {"Enter": 13, "Tab": 9}.get(key, ord(key[0].upper()))
        text = {"Enter": "\r", "Tab": ""}.get(key, key)
        self("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
        self("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def middle(self, selector: str) -> tuple[float, float]:
        place = self.run(
            f"(it => {{ it.scrollIntoView({{block: 'center'}}); const r = it.getBoundingClientRect(); "
            f"return [r.x + r.width / 2, r.y + r.height / 2] }})({selector})"
        )
        return place[0], place[1]

    def touch(self, selector: str) -> None:
        x, y = self.middle(selector)
        self("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def named(self) -> list[tuple[str, str]]:
        """(role, name) of everything that a screen reader meets."""
        nodes = self("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"] and "role" in node
        ]


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser of its own, without a profile and without a network but this machine's."""
    assert CHROMIUM is not None
    (its_in, our_out), (our_in, its_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        flags += ["--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"]
        command = ["bash", "-c", f'exec "$@" 3<&{its_in} 4>&{its_out}', "-", CHROMIUM, *flags]
        process = subprocess.Popen(command, pass_fds=(its_in, its_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(its_in)
        os.close(its_out)
        try:
            yield Browser(our_in, our_out)
        finally:
            process.kill()
            process.wait()
            os.close(our_in)
            os.close(our_out)
