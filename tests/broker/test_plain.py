"""The plain answer, byte by byte beside what aiohttp says: no peer can tell which one it got."""

from __future__ import annotations

import asyncio
import logging
import re
from base64 import b64encode
from collections.abc import AsyncIterator
from typing import Any

import pytest

CALLS = [
    ("GET", "/v3/push/cid"),  # without the router
    ("GET", "/v3/push/cid?count=1"),  # through it
    ("GET", "/v3/aliases/ann"),
    ("DELETE", "/v3/aliases/ann"),  # nothing in its body
]
PUSH = b'{"platform":"all","audience":"all","notification":{"alert":"hi"}}'
UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
DATE = re.compile(rb"Date: [^\r]*")


class Wire:
    def __init__(self, service: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._login = b64encode(f"{service.app.key}:{service.app.master_secret}".encode()).decode()
        self._reader = reader
        self.writer = writer

    def ask(self, method: str, path: str, *lines: str, version: str = "1.1") -> None:
        head = [f"{method} {path} HTTP/{version}", "Host: x", f"Authorization: Basic {self._login}", *lines]
        self.writer.write("\r\n".join([*head, "", ""]).encode())

    def push(self) -> None:
        self.ask("POST", "/v3/push", f"Content-Length: {len(PUSH)}")
        self.writer.write(PUSH)

    async def answer(self) -> tuple[bytes, bytes]:
        """Head and body."""
        head = await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), 60)
        size = re.search(rb"Content-Length: (\d+)", head)
        return head, await self._reader.readexactly(int(size[1])) if size else b""


@pytest.fixture
async def wire(service: Any) -> AsyncIterator[Wire]:
    await service.register("a", alias="ann")
    host, port = service.base.removeprefix("http://").split(":")
    wire = Wire(service, *await asyncio.open_connection(host, int(port)))
    yield wire
    wire.writer.close()


@pytest.mark.parametrize(("method", "path"), CALLS)
async def test_both_answers_are_the_same_but_for_the_end_of_the_connection(
    wire: Wire, method: str, path: str
) -> None:
    wire.ask(method, path)
    plain = await wire.answer()
    wire.ask(method, path, "Connection: close")  # which is not plain
    usual = await wire.answer()
    assert [_lasting(part) for part in plain] == [
        _lasting(part).replace(b"Connection: close\r\n", b"") for part in usual
    ]
    assert b"Connection: close" in usual[0]


def _lasting(part: bytes) -> bytes:
    """But for what differs each time."""
    return DATE.sub(b"Date", UUID.sub(b"UUID", part))


async def test_an_old_client_is_told_that_the_connection_stays(wire: Wire) -> None:
    wire.ask("GET", "/v3/push/cid", "Connection: keep-alive", version="1.0")
    head, _ = await wire.answer()
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"Connection: keep-alive\r\n" in head


async def test_calls_that_are_sent_ahead_are_answered_in_their_order(wire: Wire) -> None:
    for count in range(1, 9):
        wire.ask("GET", f"/v3/push/cid?count={count}")
        wire.ask("GET", "/v3/push/cid")
    sizes = [len(UUID.findall((await wire.answer())[1])) for _ in range(16)]
    assert sizes == [size for count in range(1, 9) for size in (count, 1)]


async def test_who_waits_for_a_sign_before_the_body_gets_it(wire: Wire) -> None:
    wire.ask("POST", "/v3/push", "Expect: 100-continue", f"Content-Length: {len(PUSH)}")
    assert (await wire.answer())[0] == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.writer.write(PUSH)
    head, answer = await wire.answer()
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b'"msg_id"' in answer


@pytest.mark.parametrize("accepted", [True, False])
async def test_callers_that_do_not_wait_for_their_answer_disturb_nobody(
    service: Any, caplog: pytest.LogCaptureFixture, accepted: bool
) -> None:
    await service.register("a")
    host, port = service.base.removeprefix("http://").split(":")
    for _ in range(20):
        wire = Wire(service, *await asyncio.open_connection(host, int(port)))
        wire.push()
        if accepted:
            await service.doorbell()
        wire.writer.transport.abort()
    assert (await service.call("GET", "/v3/push/cid")).status == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
