"""A headless Chromium, driven over a pipe by the DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page:
    """A page, and what it has said and asked for: errors, and addresses of requests.

    Args:
        folder: for what Chromium writes.
    """

    def __init__(self, address: str, folder: Path, dark: bool = False, width: int = 1400):
        assert CHROMIUM
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.count = 0
        down, up = os.pipe(), os.pipe()
        options = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run"
        command = f'exec "$0" {options} --user-data-dir="$1" about:blank 3<&{down[0]} 4>&{up[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, str(folder)],
            pass_fds=(down[0], up[1]),
            stderr=subprocess.DEVNULL,
        )
        for fd in (down[0], up[1]):
            os.close(fd)
        self.to, self.source, self.buffer = os.fdopen(down[1], "wb", 0), up[0], b""
        self.session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.resize(width)
        self.send("Page.navigate", url=address)
        self.wait_for("document.readyState === 'complete'")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol, and note what else arrives before its answer."""
        self.count += 1
        message: dict[str, Any] = dict(id=self.count, method=method, params=params)
        if self.session:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            self.note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.source, 1 << 20)
            assert part, "Chromium has ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.errors.append(str(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.errors.append(params["entry"]["text"])
            case "Runtime.consoleAPICalled":
                self.errors.append(str(params["args"]))

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript; a promise is awaited."""
        options: Any = dict(returnByValue=True, awaitPromise=True)
        answer = self.send("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        script = f"""new Promise((done, fail) => {{
            const check = () => {condition} ? done(true) : setTimeout(check, 20);
            setTimeout(() => fail("timeout"), 20000);
            check();
        }})"""
        assert self.run(script), condition

    def resize(self, width: int, height: int = 900) -> None:
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def screenshot(self, path: Path) -> None:
        """The whole page, however long."""
        options = dict(captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", **options)["data"]))

    def close(self) -> None:
        self.to.close()
        os.close(self.source)
        self.process.terminate()
        self.process.wait(10)
