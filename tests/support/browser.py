"""A headless Chromium, spoken to in its DevTools protocol over two pipes."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDE, MIDDLE, NARROW = (1280, 900), (1000, 900), (390, 844)


def chromium() -> str:
    """Its program; without it the test is skipped, in CI never."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        assert "SAEMILL_CI" not in os.environ, "no Chromium is installed"
        pytest.skip("no Chromium is installed")
    return found


class Browser:
    """One tab, and what went on in it.

    Args:
        commands: file that commands are written to.
        answers: file that answers and events come from.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._n, self._rest, self._session = 0, b"", ""
        self.requests: list[str] = []
        """Addresses that were asked for."""
        self.complaints: list[str] = []
        """What stands in the console, and errors of scripts."""
        self.n_loads = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method, and note the events that come before its answer."""
        self._n += 1
        own: dict[str, Any] = {"id": self._n, "method": method, "params": parameters}
        if self._session:
            own["sessionId"] = self._session
        os.write(self._commands, json.dumps(own).encode() + b"\0")
        while (message := self._next()).get("id") != self._n:
            self._note(message)
        assert "error" not in message, (method, message["error"])
        result: dict[str, Any] = message["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            some = os.read(self._answers, 1 << 20)
            assert some, "Chromium has ended"
            self._rest += some
        message, _, self._rest = self._rest.partition(b"\0")
        read: dict[str, Any] = json.loads(message)
        return read

    def _note(self, event: dict[str, Any]) -> None:
        about = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(about["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(about["exceptionDetails"]))
            case "Log.entryAdded" | "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(about))
            case "Page.loadEventFired":
                self.n_loads += 1

    def open(self, address: str, size: tuple[int, int] = WIDE, scheme: str = "light") -> None:
        """Open a page in a window of this size, by readers who like it light or dark."""
        width, height = size
        narrow = size == NARROW
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=narrow,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url="about:blank")
        self.requests.clear()
        self.complaints.clear()
        before = self.n_loads
        self.call("Page.navigate", url=address)
        wait_until(lambda: self.value("document.readyState") == "complete" and self.n_loads > before)

    def value(self, expression: str) -> Any:
        """What a script's expression comes to, a promise's value where it is one."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        wait_until(lambda: self.value(expression))

    def type(self, selector: str, text: str) -> None:
        """Put a text into a field, as a reader types it."""
        self.value(f"document.querySelector({selector!r}).focus()")
        self.value(f"document.querySelector({selector!r}).select()")
        self.call("Input.insertText", text=text)

    def picture(self, file: Path) -> None:
        """Keep a picture of what is seen."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        file.write_bytes(base64.b64decode(data))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Run Chromium while the block runs.

    Args:
        folder: for its profile.
    """
    command_read, commands = os.pipe()
    answers, answer_write = os.pipe()

    def as_three_and_four() -> None:
        # Chromium reads from file 3 and writes to 4; by way of high numbers, lest one overwrites the other.
        for end, number in ((os.dup2(command_read, 90), 3), (os.dup2(answer_write, 91), 4)):
            os.dup2(end, number)

    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}",
        "--no-first-run", "--hide-scrollbars",
    ]  # fmt: skip
    process = subprocess.Popen(
        [chromium(), *options],
        preexec_fn=as_three_and_four,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_read)
    os.close(answer_write)
    try:
        yield Browser(commands, answers)
    finally:
        os.close(commands)
        os.close(answers)
        process.terminate()
        process.wait()
