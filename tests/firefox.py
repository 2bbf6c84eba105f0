"""Drive Firefox by WebDriver BiDi, which it speaks itself: Playwright drives its own build of Firefox only."""

import base64
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("firefox-esr", "firefox")


class Firefox:
    """A headless Firefox with one window, as a context manager."""

    def __init__(self, profile: Path, dark: bool = False):
        from websockets.sync.client import connect

        profile.mkdir()
        # 0: dark, 1: light. A page without a network needs none of the browser's own requests.
        settings = {"layout.css.prefers-color-scheme.content-override": 0 if dark else 1, "network.proxy.type": 1}
        settings |= {"network.proxy.http": "127.0.0.1", "network.proxy.http_port": 9, "network.proxy.ssl_port": 9}
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in settings.items()]
        (profile / "user.js").write_text("".join(lines))
        path = next(filter(None, map(shutil.which, NAMES)))
        words = [path, "--headless", "--no-remote", "--profile", str(profile), "--remote-debugging-port", "0"]
        log = profile / "log.txt"
        env = {**os.environ, "HOME": str(profile), "MOZ_CRASHREPORTER_DISABLE": "1"}
        with log.open("w") as file:
            self.process = subprocess.Popen(words, stdout=file, stderr=file, env=env)
        self.number, self.errors = 0, []
        try:
            self.socket = connect(f"{_address(log, self.process)}/session", max_size=None, proxy=None)
            self.send("session.new", {"capabilities": {}})
            self.send("session.subscribe", {"events": ["log.entryAdded"]})
            self.context = self.send("browsingContext.getTree", {})["contexts"][0]["context"]
        except BaseException:
            self.process.kill()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)

    def send(self, method: str, parameters: dict) -> dict:
        """Send a command and return its result. Errors that the page logs meanwhile are collected in `errors`."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message["type"] == "event" and message["params"].get("level") in ("error", "warn"):
                self.errors.append(message["params"]["text"])
            if message.get("id") == self.number:
                assert message["type"] == "success", message
                return message["result"]

    def open(self, address: str, width: int = 1500, height: int = 950) -> None:
        self.send(
            "browsingContext.setViewport", {"context": self.context, "viewport": {"width": width, "height": height}}
        )
        self.send("browsingContext.navigate", {"context": self.context, "url": address, "wait": "complete"})

    def evaluate(self, expression: str):
        """Return the value of a JavaScript expression, by way of JSON."""
        target = {"context": self.context}
        text = f"JSON.stringify({expression})"
        result = self.send("script.evaluate", {"expression": text, "target": target, "awaitPromise": True})
        assert result["type"] == "success", result
        return json.loads(result["result"].get("value", "null"))

    def wait(self, condition: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < end, f"{condition} stayed false"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press and release a key: a character, or its code in WebDriver (right arrow: \\ue014)."""
        actions = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        source = {"type": "key", "id": "keyboard", "actions": actions}
        self.send("input.performActions", {"context": self.context, "actions": [source]})

    def screenshot(self, path: Path) -> None:
        result = self.send("browsingContext.captureScreenshot", {"context": self.context})
        path.write_bytes(base64.b64decode(result["data"]))


def _address(log: Path, process: subprocess.Popen) -> str:
    """Return the address that Firefox says it listens on."""
    for _ in range(600):
        found = re.search(r"listening on (ws://\S+)", log.read_text())
        if found:
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise TimeoutError(log.read_text())
