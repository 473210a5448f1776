"""A headless Chromium, driven through a pipe (DevTools protocol): no driver program and no other package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# the browser reads from descriptor 3 and writes to descriptor 4
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--use-gl=angle", "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader", "--hide-scrollbars", "--mute-audio",
)  # fmt: skip


def find_browser() -> str | None:
    """The program, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of a browser with a profile of its own; use it in a ``with`` block."""

    def __init__(self, program: str, folder: Path, size: tuple[int, int] = (1280, 800)) -> None:
        self.downloads = folder / "downloads"
        self.requests: list[str] = []  # addresses that the page asked for
        self.problems: list[str] = []  # exceptions of its program, and what the console calls an error
        self.number, self.events, self.left = 0, [], b""
        theirs_in, self.to = os.pipe()
        self.of, theirs_out = os.pipe()
        for one in (theirs_in, theirs_out):  # not 3 or 4, which they become
            os.set_inheritable(one, True)
        command = [sys.executable, "-c", START, str(theirs_in), str(theirs_out), program, *FLAGS]
        command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={size[0]},{size[1]}", "about:blank"]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in), os.close(theirs_out)
        self.session = ""
        pages = self.call("Target.getTargets")["targetInfos"]
        page = next(one["targetId"] for one in pages if one["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        self.resize(*size)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.to), os.close(self.of)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.to, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def _next(self, seconds: float = 60) -> dict[str, Any]:
        while b"\0" not in self.left:
            ready, _, _ = select.select([self.of], [], [], seconds)
            part = os.read(self.of, 2**20) if ready else b""
            assert part, f"the browser gave no answer within {seconds:g} s (exit code {self.process.poll()})"
            self.left += part
        text, _, self.left = self.left.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, event: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            detail = event["exceptionDetails"]
            self.problems.append(detail.get("exception", {}).get("description", detail["text"]))
        elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
            self.problems.append(event["entry"]["text"])

    def open(self, file: Path) -> None:
        """Open a file and wait until its program ran."""
        self.call("Page.navigate", url=file.resolve().as_uri())
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, f"not true within {seconds:g} s: {condition}; {self.problems}"
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """Press and release the left button in the middle of an element."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def wheel(self, selector: str, distance: float) -> None:
        """Turn the wheel above an element."""
        x, y = self.middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=distance)

    def drag(
        self, selector: str, by: tuple[float, float], button: str = "left", start: tuple[float, float] = (0, 0)
    ) -> None:
        """Drag from the middle of an element, or from a place ``start`` pixels away from it."""
        x, y = (a + b for a, b in zip(self.middle(selector), start, strict=True))
        mask = {"left": 1, "right": 2}[button]
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, button=button, buttons=mask, clickCount=1)
        for part in (0.5, 1.0):
            place = {"x": x + by[0] * part, "y": y + by[1] * part}
            self.call("Input.dispatchMouseEvent", type="mouseMoved", button=button, buttons=mask, **place)
        self.call(
            "Input.dispatchMouseEvent", type="mouseReleased", x=x + by[0], y=y + by[1], button=button, clickCount=1
        )

    def middle(self, selector: str) -> tuple[float, float]:
        """Where an element is on the screen."""
        script = f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
        script += " e.scrollIntoView({block: 'nearest'});"
        script += " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        x, y = self.run(script)
        return x, y

    def press(self, *keys: str) -> None:
        """Press keys, one after the other: letters, or names as ``ArrowDown``."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, **(text if kind == "keyDown" else {}))

    def type(self, text: str) -> None:
        """Enter a text where the focus is."""
        self.call("Input.insertText", text=text)

    def downloaded(self, name: str, seconds: float = 30) -> str:
        """The content of a file that the page has saved."""
        file, end = self.downloads / name, time.monotonic() + seconds
        while not file.exists():
            assert time.monotonic() < end, f"{name} was not saved"
            self.run("0")  # takes in what the browser has to say
            time.sleep(0.05)
        with file.open(encoding="utf-8", newline="") as stream:
            text = stream.read()
        file.unlink()
        return text

    def resize(self, width: int, height: int) -> None:
        """Give the page a size in pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def picture(self, file: Path) -> None:
        """Save a PNG of what is on the screen."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
