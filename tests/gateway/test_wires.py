"""Wires against real sockets: what a protocol is told, and when."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.wires import READ_SIZE, Wires
from tests.gateway.connected import pair, until
from tests.patience import PATIENCE

RESET = struct.pack("ii", 1, 0)  # linger for no time: close sends a reset


class Told(asyncio.Protocol):
    """Keeps what it is told, in order."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.received = b""
        self.keeps_open = False
        self.wire: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.wire = transport

    def data_received(self, data: bytes) -> None:
        self.received += data

    def eof_received(self) -> bool:
        self.events.append("eof")
        return self.keeps_open

    def pause_writing(self) -> None:
        self.events.append("pause")

    def resume_writing(self) -> None:
        self.events.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.events.append(exc)


class Ends:
    """One connection: our protocol on its wire, and their socket."""

    def __init__(self, wires: Wires, ours: socket.socket, theirs: socket.socket) -> None:
        self.told = Told()
        self.theirs = theirs
        ours.setblocking(False)
        theirs.settimeout(PATIENCE)
        wires.connect(ours.dup(), self.told)
        self.wire = self.told.wire
        ours.close()

    def reset(self) -> None:
        self.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.theirs.close()

    async def read(self, size: int) -> bytes:
        """That many bytes at their end, while our loop turns."""
        found = b""
        self.theirs.setblocking(False)

        def more() -> bool:
            nonlocal found
            try:
                found += self.theirs.recv(size - len(found))
            except BlockingIOError:
                return False
            return len(found) == size

        await until(more)
        return found

    async def lost(self) -> Any:
        await until(lambda: self.told.events and self.told.events[-1] not in {"eof", "pause", "resume"})
        return self.told.events[-1]


@pytest.fixture
async def wires() -> AsyncIterator[Wires]:
    wires = Wires(asyncio.get_running_loop())
    yield wires
    wires.close()


@pytest.fixture
async def ends(wires: Wires) -> AsyncIterator[Ends]:
    with pair() as (ours, theirs):
        yield Ends(wires, ours, theirs)


async def test_what_is_said_arrives(ends: Ends) -> None:
    ends.wire.write(b"hello")
    assert ends.theirs.recv(100) == b"hello"
    ends.theirs.sendall(b"you")
    await until(lambda: ends.told.received == b"you")


@pytest.mark.parametrize("size", [1, READ_SIZE - 1, READ_SIZE, READ_SIZE + 1, 1_000_000])
async def test_nothing_is_lost_of_what_is_long(ends: Ends, size: int) -> None:
    text = bytes(i % 251 for i in range(size))
    sending = asyncio.get_running_loop().run_in_executor(None, ends.theirs.sendall, text)
    await until(lambda: len(ends.told.received) >= size)
    await sending
    assert ends.told.received == text


async def test_who_does_not_read_makes_us_pause_and_gets_it_all(ends: Ends) -> None:
    ends.wire.set_write_buffer_limits(high=100_000)
    sent = b""
    while not ends.told.events:
        part = len(sent).to_bytes(4) * 5_000
        ends.wire.write(part)
        sent += part
    assert ends.told.events == ["pause"]
    assert ends.wire.get_write_buffer_size() > 100_000
    ends.wire.write(b"end")
    assert await ends.read(len(sent) + 3) == sent + b"end"
    assert ends.told.events == ["pause", "resume"]
    assert ends.wire.get_write_buffer_size() == 0


async def test_a_close_sends_what_is_left(ends: Ends) -> None:
    text = b"x" * 10_000_000
    ends.wire.write(text)
    ends.wire.close()
    assert ends.wire.is_closing()
    ends.wire.write(b"too late")
    assert await ends.read(len(text)) == text
    assert await ends.lost() is None
    ends.theirs.setblocking(True)
    assert ends.theirs.recv(1) == b""


async def test_the_end_is_told_in_a_later_turn_and_once(ends: Ends) -> None:
    ends.wire.close()
    ends.wire.abort()
    ends.wire.close()
    assert ends.told.events == []
    assert await ends.lost() is None
    await asyncio.sleep(0)
    assert ends.told.events == [None]


async def test_an_abort_drops_what_is_left(ends: Ends) -> None:
    ends.wire.write(b"x" * 10_000_000)
    ends.wire.abort()
    assert await ends.lost() is None
    ends.wire.write(b"more")
    assert ends.wire.get_write_buffer_size() == 0


async def test_the_peer_may_go_on_when_we_said_all(ends: Ends) -> None:
    text = b"x" * 10_000_000
    ends.wire.write(text)
    ends.wire.write_eof()
    assert await ends.read(len(text)) == text
    ends.theirs.setblocking(True)
    assert await asyncio.get_running_loop().run_in_executor(None, ends.theirs.recv, 1) == b""
    ends.theirs.sendall(b"last words")
    await until(lambda: ends.told.received == b"last words")


async def test_a_peer_that_ends_is_left(ends: Ends) -> None:
    ends.theirs.shutdown(socket.SHUT_WR)
    assert await ends.lost() is None
    assert ends.told.events == ["eof", None]


async def test_what_comes_from_who_has_left_is_told_with_that(ends: Ends) -> None:
    assert ends.wire.get_extra_info("left") is False
    ends.theirs.sendall(b"here")
    await until(lambda: ends.told.received == b"here")
    assert ends.wire.get_extra_info("left") is False
    left: list[bool] = []
    ends.told.data_received = lambda _: left.append(ends.wire.get_extra_info("left"))  # type: ignore[method-assign]
    ends.theirs.sendall(b"bye")
    ends.theirs.shutdown(socket.SHUT_WR)
    assert await ends.lost() is None
    assert left == [True]


async def test_who_leaves_while_nothing_is_read_is_looked_up(ends: Ends) -> None:
    ends.wire.pause_reading()
    assert ends.wire.get_extra_info("left") is False
    ends.theirs.sendall(b"more")
    ends.theirs.shutdown(socket.SHUT_WR)
    await until(lambda: ends.wire.get_extra_info("left"))
    assert ends.told.received == b""


async def test_the_name_of_the_peer_is_known_without_asking_while_a_wire_is_made(wires: Wires) -> None:
    told = Told()
    names: list[Any] = []
    told.connection_made = lambda wire: names.append(wire.get_extra_info("peername"))  # type: ignore[method-assign]
    with pair() as (ours, theirs):
        ours.setblocking(False)
        wires.connect(ours.dup(), told, ("192.0.2.1", 1))
        wires.connect(ours.dup(), told)
        assert names == [("192.0.2.1", 1), theirs.getsockname()]


async def test_who_wants_it_may_still_write_to_a_peer_that_ended(ends: Ends) -> None:
    ends.told.keeps_open = True
    ends.theirs.shutdown(socket.SHUT_WR)
    await until(lambda: ends.told.events)
    ends.wire.write(b"still here")
    assert ends.theirs.recv(100) == b"still here"
    assert not ends.wire.is_reading()


async def test_a_reset_is_told_as_an_error(ends: Ends) -> None:
    ends.reset()
    assert isinstance(await ends.lost(), ConnectionResetError)
    assert ends.wire.get_extra_info("peername", "unknown") == "unknown"


async def test_writing_to_who_is_gone_ends_it(ends: Ends) -> None:
    ends.wire.pause_reading()
    ends.reset()
    while not ends.told.events:
        ends.wire.write(b"x")
        await asyncio.sleep(0)
    assert isinstance(await ends.lost(), OSError)


async def test_nothing_comes_while_reading_is_paused(
    wires: Wires, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends.wire.pause_reading()
    ends.theirs.sendall(b"wait")
    looks: list[int] = []
    monkeypatch.setattr(type(ends.wire), "read", lambda _: looks.append(1))
    ends.reset()  # which is always reported of what is in an epoll
    for _ in range(20):
        await asyncio.sleep(0)
    assert looks == []
    monkeypatch.undo()
    ends.wire.resume_reading()
    assert isinstance(await ends.lost(), ConnectionResetError)


async def test_a_protocol_takes_over(ends: Ends) -> None:
    other = Told()
    ends.wire.set_protocol(other)
    ends.theirs.sendall(b"to the other")
    await until(lambda: other.received == b"to the other")
    assert ends.told.received == b""
    assert ends.wire.get_protocol() is other


async def test_an_error_of_one_protocol_is_its_own(wires: Wires, ends: Ends) -> None:
    failures: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: failures.append(context))
    error = RuntimeError("a bug")

    def fail(_: bytes) -> None:
        raise error

    ends.told.data_received = fail  # type: ignore[method-assign]
    with pair() as (ours, theirs):
        others = Ends(wires, ours, theirs)
        ends.theirs.sendall(b"x")
        others.theirs.sendall(b"y")
        assert await ends.lost() is error
        await until(lambda: others.told.received == b"y")
    assert [failure["exception"] for failure in failures] == [error]


async def test_who_is_ended_by_another_in_the_same_turn_is_told_no_more(wires: Wires, ends: Ends) -> None:
    with pair() as (ours, theirs):
        others = Ends(wires, ours, theirs)
        all_ends = [ends, others]
        for one in all_ends:
            one.told.data_received = lambda _: [end.wire.abort() for end in all_ends]  # type: ignore
        ends.theirs.sendall(b"x")
        others.theirs.sendall(b"y")
        for one in all_ends:
            assert await one.lost() is None
            assert one.told.events == [None]


async def test_all_are_closed_with_the_wires(wires: Wires, ends: Ends) -> None:
    wires.close()
    assert ends.theirs.recv(1) == b""
    ends.wire.abort()
    assert await ends.lost() is None
