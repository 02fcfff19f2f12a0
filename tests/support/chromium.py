"""Test support: a real Chromium, led over the pipe of its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from support.patience import limit_s

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page of a headless browser. Use as a context manager."""

    def __init__(self, profile: Path, *, width: int = 1400, height: int = 900) -> None:
        assert CHROMIUM is not None
        their_read, self._write = os.pipe()
        self._read, their_write = os.pipe()
        flags = f"--headless --no-sandbox --disable-gpu --hide-scrollbars --window-size={width},{height}"
        self._process = subprocess.Popen(
            [
                "bash", "-c", f'exec "$0" {flags} --user-data-dir="$1" --remote-debugging-pipe about:blank '
                f"3<&{their_read} 4>&{their_write}", CHROMIUM, str(profile),
            ],
            pass_fds=(their_read, their_write), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(their_read)
        os.close(their_write)
        self._held = b""
        self._number = 0
        self._session = ""
        #: What the page complained about.
        self.errors: list[str] = []

    def __enter__(self) -> Browser:
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Runtime.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(limit_s())
        os.close(self._write)
        os.close(self._read)

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The value of the expression, once it is true."""
        within_s = limit_s(60)
        deadline = time.monotonic() + within_s
        while not (value := self.evaluate(expression)):
            if time.monotonic() > deadline:  # say what there is instead
                page = self.evaluate("document.body.innerText")
                raise AssertionError(f"not within {within_s:.0f} s: {expression}; {self.errors}; the page says: {page}")
            time.sleep(0.05)
        return value

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        request: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            request["sessionId"] = self._session
        os.write(self._write, json.dumps(request).encode() + b"\0")
        while True:
            message = self._receive()
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(message["params"]["exceptionDetails"])[:500])
            if message.get("id") == self._number:
                assert "error" not in message, message["error"]
                found: dict[str, Any] = message["result"]
                return found

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._read], [], [], limit_s(60))
            assert ready, "the browser says nothing"
            self._held += os.read(self._read, 1 << 16)
        line, _, self._held = self._held.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message
