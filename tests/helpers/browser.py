"""A headless Chromium by the WebDriver protocol, which Debian's chromium-driver speaks over HTTP."""

import base64
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

KEYS = {"down": "\ue015", "right": "\ue014", "left": "\ue012", "home": "\ue011", "end": "\ue010", "tab": "\ue004"}
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]


def missing_browser() -> str | None:
    """Why there is no browser to test in, None where there is one."""
    for program in ("chromium", "chromedriver"):
        if not shutil.which(program):
            return f"{program} is not installed: apt-get install chromium chromium-driver"
    return None


class Browser:
    """A window of the browser. errors: what its pages complained of."""

    def __init__(self, session: str) -> None:
        self.session = session

    def call(self, method: str, path: str, **body: Any) -> Any:
        response = httpx.request(method, self.session + path, json=body if method == "POST" else None, timeout=110)
        response.raise_for_status()
        return response.json()["value"]

    def open(self, file: Path, at: str = "") -> None:
        """Open a page of `dirl view` and wait until it is ready."""
        self.call("POST", "/url", url="about:blank")
        self.visit(f"{file.absolute().as_uri()}{at}")

    def visit(self, address: str) -> None:
        """Open a page at an address and wait until it is ready."""
        self.call("POST", "/url", url=address)
        ends = time.monotonic() + 60
        while not self.run("return document.body.dataset.ready"):
            assert time.monotonic() < ends, f"the page is not ready: {self.complaints()}"
            time.sleep(0.05)

    def run(self, script: str) -> Any:
        """What a script returns."""
        return self.call("POST", "/execute/sync", script=script, args=[])

    def text(self, selector: str) -> str:
        return self.run(f"return document.querySelector({selector!r}).innerText")

    def press(self, *keys: str) -> None:
        """Press keys one after another, by their letter or a name of KEYS."""
        actions = []
        for key in keys:
            code = KEYS.get(key, key)
            actions += [{"type": "keyDown", "value": code}, {"type": "keyUp", "value": code}]
        self.call("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def devtools(self, command: str, **params: Any) -> Any:
        return self.call("POST", "/goog/cdp/execute", cmd=command, params=params)

    def prefer(self, scheme: str = "light", media: str = "screen") -> None:
        """Show pages light or dark, on a screen or as printed."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", media=media, features=features)

    def resize(self, width: int, height: int) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))

    def complaints(self) -> list[str]:
        """What the console of the page has been told since this was last asked."""
        return [entry["message"] for entry in self.call("POST", "/se/log", type="browser")]


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that is closed afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        session = open_session(address)
        yield Browser(session)
        httpx.delete(session, timeout=30)
    finally:
        driver.terminate()
        driver.wait()


def open_session(address: str) -> str:
    """The address of a new session; waits until the driver answers."""
    capabilities = {
        "goog:chromeOptions": {"args": OPTIONS, "binary": shutil.which("chromium")},
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    ends = time.monotonic() + 60
    while True:
        try:
            response = httpx.post(
                f"{address}/session", json={"capabilities": {"alwaysMatch": capabilities}}, timeout=110
            )
            break
        except httpx.ConnectError:
            assert time.monotonic() < ends, "chromedriver does not answer"
            time.sleep(0.1)
    assert response.status_code == 200, response.text
    return f"{address}/session/{response.json()['value']['sessionId']}"
