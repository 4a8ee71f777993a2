"""A real browser that tests drive: headless Chromium by its DevTools protocol, over two pipes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.browser import chromium

WAIT = 90.0
"""Seconds after which something that was to come will not come."""


class Tab:
    """One page. https://chromedevtools.github.io/devtools-protocol/"""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._numbers, self._buffer = to, back, itertools.count(1), b""
        target = self._call(None, "Target.createTarget", url="about:blank")["targetId"]
        attached = self._call(None, "Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **params: object) -> Any:
        return self._call(self._session, method, **params)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until(f"document.readyState === 'complete' && location.href.startsWith({url!r})")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str) -> None:
        """Wait for an expression to be true."""
        deadline = time.monotonic() + WAIT
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < deadline, f"never: {script}; {self.run('document.body.innerText')}"
            time.sleep(0.02)

    def key(self, name: str, shift: bool = False) -> None:
        """Press and let go of a key, as a person does."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowUp": 38, "ArrowRight": 39}
        event = {"key": name, "code": name, "windowsVirtualKeyCode": codes[name], "modifiers": 8 * shift}
        text = {"text": "\r"} if name == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def drop(self, file: Path, x: int, y: int) -> None:
        """Drag a file from outside and drop it at a point of the page."""
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def screen(self, width: int, height: int, dark: bool = False, mobile: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=mobile,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def _call(self, session: str | None, method: str, **params: object) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self) -> Any:
        while b"\0" not in self._buffer:
            assert select.select([self._back], [], [], WAIT)[0], "the browser is silent"
            read = os.read(self._back, 1 << 16)
            assert read, "the browser is gone"
            self._buffer += read
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)


@contextlib.contextmanager
def browsing(profile: Path, *flags: str) -> Iterator[Tab]:
    """A browser with one tab. Skips the test where there is no Chromium."""
    browser = chromium()
    to_it, to, back, from_it = *os.pipe(), *os.pipe()

    def place() -> None:
        """It reads at file 3 and writes at 4."""
        spare_in, spare_out = os.dup(to_it), os.dup(from_it)
        os.dup2(spare_in, 3)
        os.dup2(spare_out, 4)

    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--disable-dev-shm-usage", "--no-first-run", "--lang=en", f"--user-data-dir={profile}",
               "--remote-debugging-pipe", *flags, "about:blank"]  # fmt: skip
    process = subprocess.Popen(command, preexec_fn=place, close_fds=False, stderr=subprocess.DEVNULL)
    os.close(to_it)
    os.close(from_it)
    try:
        yield Tab(to, back)
    finally:
        process.terminate()
        process.wait(30)
        os.close(to)
        os.close(back)
