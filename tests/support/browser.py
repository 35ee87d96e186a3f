"""A headless Chromium, driven over WebDriver's REST protocol by the standard library alone."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
PATIENCE = 60


class Browser:
    """One window; to be used in a `with`.

    Args:
        profile: An empty directory for the browser's own files.
        width, height: Of the page in CSS pixels, as on a device of that size.
        dark: Whether pages are told that the reader prefers dark colours.
    """

    def __init__(self, profile: Path, width: int = 1280, height: int = 900, dark: bool = False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            self._wait()
            session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self.url += f"/session/{session['sessionId']}"
            device = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
            self.devtools("Emulation.setDeviceMetricsOverride", device)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            self.devtools("Emulation.setEmulatedMedia", {"features": [scheme]})
        except BaseException:
            self.driver.kill()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.call("DELETE", "")
        finally:
            self.driver.kill()
            self.driver.wait()

    def _wait(self):
        for _ in range(10 * PATIENCE):
            try:
                if self.call("GET", "/status")["ready"]:
                    return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        raise TimeoutError("chromedriver does not answer")

    def call(self, method: str, path: str, content: dict | None = None):
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)["value"]

    def devtools(self, command: str, parameters: dict):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, path: Path):
        self.call("POST", "/url", {"url": path.resolve().as_uri()})

    def script(self, text: str):
        """What JavaScript returns."""
        return self.call("POST", "/execute/sync", {"script": text, "args": []})

    def click(self, selector: str):
        """A real click at the middle of the element, which must be in sight and not covered."""
        found = self.call("POST", "/element", {"using": "css selector", "value": selector})
        self.call("POST", f"/element/{next(iter(found.values()))}/click", {})

    def console(self) -> list[str]:
        """What was written to the console since the last call, errors of the page included."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def picture(self, path: Path):
        """The whole page as a PNG."""
        shown = self.devtools("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shown["data"]))
