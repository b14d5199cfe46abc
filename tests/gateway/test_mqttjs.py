"""MQTT.js over WebSocket, in Node and in headless Chromium, against the running server.

Both run mqttjs/scenario.js, which reports what it saw to an HTTP server of the test, where a browser finds its page.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import orjson
import pytest

from clients.local_server import LocalServer
from tests.conftest import StartServer
from tests.gateway.peer import eventually, push
from tests.patience import PATIENCE

ROOT: Final = Path(__file__).parents[2]
SCRIPTS: Final = Path(__file__).parent / "mqttjs"
PACKAGE: Final = Path(os.environ.get("NODE_MODULES", ROOT / ".venv/node/node_modules")) / "mqtt"
START_PATIENCE: Final = 180.0  # seconds: a browser's first start on a busy machine
CHROMIUM: Final = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    not (PACKAGE / "dist/mqtt.min.js").exists(),
    reason=f"MQTT.js: npm install --prefix .venv/node mqtt@5 (`make test` does), or NODE_MODULES; not in {PACKAGE}",
)
needs_node = pytest.mark.skipif(not shutil.which("node"), reason="node: apt-get install nodejs")
needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="chromium: apt-get install chromium")


class Desk:
    """Gives out the page and the task, and takes the reports."""

    def __init__(self, task: dict[str, object]) -> None:
        self._reports: queue.Queue[dict[str, Any]] = queue.Queue()
        files = {
            "/": ("text/html", SCRIPTS / "page.html"),
            "/scenario.js": ("text/javascript", SCRIPTS / "scenario.js"),
            "/mqtt.min.js": ("text/javascript", PACKAGE / "dist/mqtt.min.js"),
        }
        reports = self._reports

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/task":
                    self._answer(200, "application/json", orjson.dumps(task))
                elif self.path in files:
                    kind, path = files[self.path]
                    self._answer(200, kind, path.read_bytes())
                else:
                    self._answer(404, "text/plain", b"")

            def do_POST(self) -> None:
                reports.put(orjson.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self._answer(200, "text/plain", b"")

            def _answer(self, status: int, kind: str, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> Desk:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def silent(self) -> bool:
        """Whether every report was expected."""
        return self._reports.empty()

    def expect(self, step: str, patience: float = PATIENCE) -> Any:
        """What the next report saw, which is of this step."""
        report = self._reports.get(timeout=patience)
        assert report["step"] == step, report["seen"]
        return report["seen"]


@contextmanager
def running(*command: str) -> Iterator[None]:
    """The program, with all that it starts. What it writes is shown if the test fails."""
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def node(base: str, folder: Path) -> tuple[str, ...]:
    return "node", str(SCRIPTS / "node.cjs"), str(PACKAGE), base


def chromium(base: str, folder: Path) -> tuple[str, ...]:
    return "chromium", *CHROMIUM, f"--user-data-dir={folder}", base + "/"


@pytest.fixture(scope="module")
def restarted(start_server: StartServer) -> LocalServer:
    return start_server()


def task(server: LocalServer, name: str, version: int) -> dict[str, object]:
    """What the scenario needs to know."""
    assert server.addresses.ws is not None
    return {
        "url": "ws://{}:{}/mqtt".format(*server.addresses.ws), "name": name, "version": version,
        "username": server.app.app_key, "password": server.app.device_key,
    }  # fmt: skip


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    "host", [pytest.param(node, marks=needs_node), pytest.param(chromium, marks=needs_chromium)]
)
def test_mqttjs(
    restarted: LocalServer, tmp_path: Path, host: Callable[[str, Path], tuple[str, ...]], version: int
) -> None:
    server, name = restarted, f"{host.__name__}-{version}"
    with Desk(task(server, name, version)) as desk, running(*host(desk.address, tmp_path)):
        desk.expect("ready for a push", START_PATIENCE)
        msg_id = push(server, server.app, f"{name}-listener")
        [pushed] = desk.expect("push")
        assert (pushed["topic"], pushed["qos"]) == ("push", 1)
        assert orjson.loads(pushed["payload"])["msg_id"] == msg_id

        assert [grant["qos"] for grant in desk.expect("granted")] == [0, 1, 2]
        talk = desk.expect("talk")
        assert [(m["topic"], m["payload"], m["qos"]) for m in talk] == [
            (f"talk/{qos}", str(i), qos) for qos in (0, 1, 2) for i in range(10)
        ]
        if version == 5:
            for message in talk:
                expiry = message["properties"].pop("messageExpiryInterval")
                assert 80_000 <= expiry <= 86_400
                assert message["properties"] == {
                    "userProperties": {"a": ["1", "2"], "b": "3"}, "contentType": "text/plain",
                    "responseTopic": "answers", "correlationData": "id", "payloadFormatIndicator": True,
                }  # fmt: skip

        [retained] = desk.expect("retained")
        assert (retained["payload"], retained["retain"]) == ("for later", True)
        [will] = desk.expect("will")
        assert (will["topic"], will["payload"]) == ("talk/1", "it died")
        resumed = desk.expect("resumed")
        assert resumed["present"]
        assert [(m["topic"], m["payload"]) for m in resumed["messages"]] == [
            ("talk/1", "meanwhile"), ("talk/2", "meanwhile"),
        ]  # fmt: skip

        desk.expect("ready for a restart")
        server.restart()
        [after] = desk.expect("resubscribed")
        assert (after["topic"], after["payload"], after["qos"]) == ("talk/2", "after the restart", 2)
        desk.expect("done")


@needs_chromium
def test_a_page_of_another_host_may_not_connect(restarted: LocalServer, tmp_path: Path) -> None:
    """Any page can try to; a browser says in Origin where it comes from (mqtt.ws_origins)."""
    sample = 'holdfast_refusals_total{reason="websocket origin"}'
    with Desk(task(restarted, "stranger", 5)) as desk:
        elsewhere = desk.address.replace("127.0.0.1", "localhost")
        with running(*chromium(elsewhere, tmp_path)):
            eventually(lambda: restarted.metrics().get(sample, 0) > 0, START_PATIENCE)
        assert desk.silent
