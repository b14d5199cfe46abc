"""A real `holdfast serve` in a process of its own: for the demo, tests and load tests."""

from __future__ import annotations

import base64
import os
import selectors
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

ANY_PORT: Final = ("--mqtt-port", "0", "--ws-port", "0", "--http-port", "0", "--admin-port", "0")
START_LIMIT: Final = (
    180.0  # seconds until the server says that it listens; one that was killed waits for its lease
)
STOP_LIMIT: Final = 30.0
ANSWER_LIMIT: Final = 60.0  # seconds for one of its administrator's calls
LOG_TAIL: Final = 2000  # characters of the log in an error


class ServerFailed(Exception):
    """The server did not start, or did not stop; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class AppKeys:
    """What an app's devices and publishers need."""

    app_key: str
    master_secret: str
    device_key: str


@dataclass(frozen=True, slots=True)
class Addresses:
    """(host, port) of MQTT listeners, base addresses of the HTTP ones."""

    mqtt: tuple[str, int]
    mqtts: tuple[str, int] | None
    ws: tuple[str, int] | None
    http: str
    admin: str


class LocalServer:
    """Listens on ports that were free at the first start, and on the same ones after each restart, so that
    devices find it again. Its data and log are in `directory`. Blocking: a start takes about half a
    second."""

    def __init__(self, directory: Path, *flags: str, own_group: bool = False) -> None:
        """`own_group`: a Ctrl-C on the terminal is for whoever started it, and not for the server."""
        self._group = 0 if own_group else None
        self.data_dir = directory / "data"
        self.log_file = directory / "server.log"
        self._flags = flags
        self._ports: tuple[str, ...] = ANY_PORT
        self._process: subprocess.Popen[bytes] | None = None
        self._addresses: Addresses | None = None
        self._demo_app: AppKeys | None = None

    @property
    def addresses(self) -> Addresses:
        assert self._addresses is not None, "not started"
        return self._addresses

    @property
    def app(self) -> AppKeys:
        """The demo app."""
        assert self._demo_app is not None, "there is no demo app"
        return self._demo_app

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log_text(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def start(self) -> None:
        """Raises ServerFailed."""
        assert self._process is None, "it runs already"
        self.data_dir.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "clients.command", "serve", "--data-dir", str(self.data_dir)]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._ports, *self._flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                process_group=self._group,
                env={name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")},
            )
        try:
            self._take_listening(self._read_line())
        except BaseException:
            self.kill()
            raise

    def _read_line(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        line, deadline = b"", time.monotonic() + START_LIMIT
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                chunk = b""
                if selector.select(deadline - time.monotonic()):
                    chunk = os.read(self._process.stdout.fileno(), 65_536)
                if not chunk:
                    raise ServerFailed(f"the server did not start:\n{self.log_text()[-LOG_TAIL:]}")
                line += chunk
        return line

    def _take_listening(self, line: bytes) -> None:
        told = orjson.loads(line)
        self._addresses = Addresses(
            mqtt=_address(told["mqtt"]),
            mqtts=_address(told["mqtts"]) if told["mqtts"] else None,
            ws=_address(told["ws"]) if told["ws"] else None,
            http=f"http://{told['http']}",
            admin=f"http://{told['admin']}",
        )
        self._demo_app = _keys(told["demo_app"]) if told["demo_app"] else None
        listeners = {"mqtt": "--mqtt-port", "mqtts": "--mqtts-port", "ws": "--ws-port"}
        listeners |= {"http": "--http-port", "admin": "--admin-port"}
        ports = [(flag, str(_address(told[name])[1])) for name, flag in listeners.items() if told[name]]
        self._ports = tuple(word for pair in ports for word in pair)

    def kill(self) -> None:
        """SIGKILL: no goodbye, nothing flushed."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """SIGTERM, as a service manager stops it: the exit status. Raises ServerFailed if it goes on."""
        return self._end(signal.SIGTERM)

    def _end(self, signal_number: int) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(signal_number)
        try:
            return process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired as error:
            process.kill()
            process.wait()
            raise ServerFailed(f"the server did not stop:\n{self.log_text()[-LOG_TAIL:]}") from error
        finally:
            assert process.stdout is not None
            process.stdout.close()

    def restart(self) -> None:
        """Kill it if it runs, and start it again on its data and ports."""
        self.kill()
        self.start()

    def create_app(self, name: str, *, open: bool = False) -> AppKeys:
        """A new app, by way of the admin API."""
        return _keys(self._administrate("/v1/app", {"name": name, "open": open}))

    def create_group(self, name: str, *app_keys: str) -> tuple[str, str]:
        """A new group of these apps: its key and its secret."""
        group = self._administrate("/v1/groups", {"name": name, "apps": app_keys})
        return group["group_key"], group["secret"]

    def _administrate(self, path: str, body: object) -> dict[str, Any]:
        admin_key = orjson.loads((self.data_dir / "admin.json").read_bytes())["key"]
        login = base64.b64encode(b"admin:" + admin_key.encode()).decode()
        request = urllib.request.Request(
            self.addresses.admin + path,
            data=orjson.dumps(body),
            headers={"Authorization": f"Basic {login}"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_LIMIT) as response:
            answer: dict[str, Any] = orjson.loads(response.read())
        return answer

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels, as they are written there."""
        with urllib.request.urlopen(f"{self.addresses.admin}/metrics", timeout=ANSWER_LIMIT) as response:
            lines = response.read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def _keys(app: dict[str, Any]) -> AppKeys:
    return AppKeys(app["app_key"], app["master_secret"], app["device_key"])
