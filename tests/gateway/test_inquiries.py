"""What the front asks a worker."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from secrets import token_hex

import pytest

from gateway import inquiries
from gateway.inquiries import LONGEST, Inquiries, inquire

LONG = os.urandom(1 << 20)  # more than a socket takes at once


@pytest.fixture
async def address() -> AsyncIterator[str]:
    name = f"holdfast-test-{token_hex(8)}"
    answering = Inquiries({"health": lambda: b"well", "metrics": lambda: LONG})
    await answering.open(name)
    yield name
    await answering.close()


async def _raw(address: str, data: bytes) -> bytes:
    peer = socket.socket(socket.AF_UNIX)
    peer.connect("\0" + address)
    reader, writer = await asyncio.open_unix_connection(sock=peer)
    writer.write(data)
    try:
        return await reader.read()
    except ConnectionError:
        return b"reset"
    finally:
        writer.close()


async def test_each_question_gets_its_answer_as_a_whole(address: str) -> None:
    answers = await asyncio.gather(*(inquire(address, q) for q in ("health", "metrics", "health")))
    assert answers == [b"well", LONG, b"well"]


async def test_what_is_no_question_gets_nothing(address: str) -> None:
    assert await inquire(address, "secrets") is None
    assert await _raw(address, b"\xff\n") == b""
    assert await _raw(address, b"x" * (LONGEST + 1)) in (b"", b"reset")
    assert await inquire(address, "health") == b"well"


async def test_a_question_may_come_in_pieces(address: str) -> None:
    peer = socket.socket(socket.AF_UNIX)
    peer.connect("\0" + address)
    reader, writer = await asyncio.open_unix_connection(sock=peer)
    writer.write(b"hea")
    await writer.drain()
    writer.write(b"lth\n")
    assert await reader.read() == b"well"
    writer.close()


async def test_nobody_there_is_no_answer() -> None:
    assert await inquire("holdfast-test-nobody", "health") is None


async def test_who_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inquiries, "PATIENCE", 0.05)
    name = f"holdfast-test-{token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind("\0" + name)
        mute.listen()
        assert await inquire(name, "health") is None


async def test_who_asks_nothing_is_let_go(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inquiries, "PATIENCE", 0.05)
    assert await _raw(address, b"") in (b"", b"reset")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may be somebody else")
async def test_other_users_get_nothing(address: str) -> None:
    ask = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX)\n"
        f"s.connect('\\0{address}')\n"
        "try:\n    s.sendall(b'health\\n'); print(s.recv(100))\n"
        "except OSError: print(b'')"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", ask, stdout=subprocess.PIPE)
    assert (await process.communicate())[0].strip() == b"b''"
