"""A headless Chromium over its debugging pipe (--remote-debugging-pipe): no driver, no package."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")


def find():
    """The path of an installed browser, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab, ``with Page(binary) as page``.

    events: what the browser reported besides answers since the last ``open``.
    """

    def __init__(self, binary):
        read_commands, self.commands = os.pipe()
        self.answers, write_answers = os.pipe()
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        plumb = f'exec "$0" "$@" 3<&{read_commands} 4>&{write_answers}'
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--disable-dev-shm-usage",
        ]
        self.process = subprocess.Popen(
            [
                "bash",
                "-c",
                plumb,
                binary,
                *flags,
                f"--user-data-dir={self.folder.name}",
                "about:blank",
            ],
            pass_fds=(read_commands, write_answers),
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self.buffer, self.count, self.events, self.session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _next(self):
        while b"\0" not in self.buffer:
            part = os.read(self.answers, 1 << 16)
            assert part, "the browser went away"
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(line)

    def call(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path, *, width, height=900, dark=False):
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        url = path.resolve().as_uri()
        assert "errorText" not in self.call("Page.navigate", url=url), url
        # not by its event: that of the blank page before may come late
        here = f"location.href === {json.dumps(url)} && document.readyState === 'complete'"
        while not self.evaluate(here):
            time.sleep(0.02)

    def evaluate(self, expression):
        return self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )["result"]["value"]

    def screenshot(self, path):
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.commands)
        os.close(self.answers)
        self.folder.cleanup()
