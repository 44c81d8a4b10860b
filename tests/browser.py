"""A headless Chromium, driven through the pipe that it opens for its debugging protocol: no package
and no network. ``find`` says where one is, or None."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
#: becomes the browser, with the pipes as the files that it knows them by: it reads 3 and writes 4
START = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, name in zip(pipes, (3, 4)):
    os.dup2(end, name)
os.execv(sys.argv[3], sys.argv[3:])
"""
PATIENCE = 30  # seconds for an answer, on a machine that is busy


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. ``errors``: exceptions and errors on the console since it was opened."""

    def __init__(self, profile: Path, size: tuple[int, int] = (1280, 800)) -> None:
        to_read, self.write = os.pipe()
        self.read, to_write = os.pipe()
        program = (str(find()), *FLAGS, f"--user-data-dir={profile}", "about:blank")
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", START, str(to_read), str(to_write), *program],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.last, self.buffer, self.session = 0, b"", ""
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        os.close(self.write)
        os.close(self.read)

    def call(self, method: str, **params: Any) -> Any:
        """The answer to one command; events that come before it are noted."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self.last:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]

    def _next(self) -> Any:
        while b"\0" not in self.buffer:
            part = os.read(self.read, 1 << 16)
            assert part, "the browser ended"
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        event = json.loads(text)
        self._note(event.get("method", ""), event.get("params", {}))
        return event

    def _note(self, method: str, params: Any) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, path: Path, hash: str = "") -> float:
        """Open a file afresh; seconds until the page said that it is drawn."""
        self.call("Page.navigate", url="about:blank")
        self.errors.clear()
        self.requests.clear()
        start = time.perf_counter()
        self.call("Page.navigate", url=f"{path.resolve().as_uri()}{hash}")
        self.wait(lambda: self.eval("document.documentElement?.dataset.ready") is not None)
        return time.perf_counter() - start

    def eval(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON takes it."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, met: Callable[[], Any]) -> None:
        end = time.perf_counter() + PATIENCE
        while not met():
            assert time.perf_counter() < end, f"the page did not get there: {self.errors}"
            time.sleep(0.01)

    def frame(self) -> None:
        """Until what was asked to be drawn is drawn."""
        self.eval(
            "new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => r(1))))"
        )

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        params = {"type": f"mouse{kind}", "x": x, "y": y, **more}
        self.call("Input.dispatchMouseEvent", **params)

    def click(self, x: float, y: float) -> None:
        self.mouse("Pressed", x, y, button="left", clickCount=1)
        self.mouse("Released", x, y, button="left", clickCount=1)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.mouse("Pressed", *start, button="left", clickCount=1)
        self.mouse("Moved", *end, button="left", buttons=1)
        self.mouse("Released", *end, button="left", clickCount=1)

    def key(self, key: str, text: str = "") -> None:
        down = {"type": "keyDown", "key": key}
        if text or key == "Enter":
            down["text"] = text or "\r"
        self.call("Input.dispatchKeyEvent", **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def scheme(self, name: str) -> None:
        """What the system says that it prefers: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
