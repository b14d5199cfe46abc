"""Registered devices and their app: made once, then copied for each server that needs them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from loadtest.fleet import KEEP_ALIVE, connect_packet
from loadtest.http_pool import HttpPool
from loadtest.reactor import Reactor
from loadtest.server import Server, run_holdfast

REGISTRARS: Final = 64  # connections that register devices


@dataclass(frozen=True, slots=True)
class Population:
    directory: Path  # a data directory that no server uses
    app_key: str
    master_secret: str
    device_key: str
    names: tuple[str, ...]  # registration ids
    tokens: tuple[str, ...]

    def copy_to(self, data_dir: Path) -> None:
        shutil.copytree(self.directory, data_dir)

    def connect_packets(
        self, count: int, version: int = 4, *, clean_start: bool = False, keep_alive: int = KEEP_ALIVE
    ) -> list[bytes]:
        pairs = zip(self.names[:count], self.tokens[:count], strict=True)
        return [
            connect_packet(self.app_key, name, token, version, clean_start=clean_start, keep_alive=keep_alive)
            for name, token in pairs
        ]

    def pool(self, reactor: Reactor, server: Server, connections: int) -> HttpPool:
        """HTTP connections that speak for the app."""
        return HttpPool(
            reactor,
            server.address("http"),
            connections,
            user=self.app_key,
            password=self.master_secret,
        )


def register(
    directory: Path,
    count: int,
    *,
    is_open: bool = False,
    core: int | None = None,
    source: Path | None = None,
) -> Population:
    """An app with `count` devices, in the new data directory `directory`."""
    flags = ["--open"] if is_open else []
    app = run_holdfast("app", "create", "bench", *flags, "--data-dir", str(directory), source=source)
    settings = {"HOLDFAST_SERVER_LOG_LEVEL": "warning"}
    server = Server(directory, core=core, settings=settings, source=source)
    server.start()
    try:
        answers = _register_all(server, app["app_key"], app["master_secret"], count)
    finally:
        server.stop()
    names = tuple(answer["registration_id"] for answer in answers)
    tokens = tuple(answer["token"] for answer in answers)
    return Population(directory, app["app_key"], app["master_secret"], app["device_key"], names, tokens)


def _register_all(server: Server, key: str, secret: str, count: int) -> list[dict[str, str]]:
    reactor = Reactor()
    pool = HttpPool(reactor, server.address("http"), REGISTRARS, user=key, password=secret)
    answers: list[bytes] = []
    request = pool.build("POST", "/v1/devices", b'{"platform":"android"}')
    for _ in range(count):
        pool.send(request, lambda _status, body: answers.append(body))
    reactor.run_until(lambda: len(answers) == count, f"{count:,} devices registered", limit=600.0)
    pool.close()
    reactor.close()
    return [orjson.loads(answer) for answer in answers]
