"""What TLS makes of writing: it waits to read before the first, and to write where the other end does not read."""

from __future__ import annotations

import random
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from loadtest.wires import Tls, Wires, wires_of
from tests.loadtest.trial_world import Certified, certify

SIZE = 32 << 20  # more than the system takes for a peer that does not read
LIMIT = 60_000  # milliseconds
END, ALL = b"that is all", b"all"


class Sleeper:
    """Shakes hands when it is greeted, without tickets, and reads when it is woken."""

    def __init__(self, certified: Certified) -> None:
        self._context = certified.context()
        self._context.num_tickets = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = self._listening.getsockname()
        self.greeted, self.awake = threading.Event(), threading.Event()
        self.received = bytearray()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        accepted, _ = self._listening.accept()
        self.greeted.wait()
        with (
            self._listening,
            suppress(OSError),  # a test that failed
            self._context.wrap_socket(accepted, server_side=True) as secured,
        ):
            self.awake.wait()
            while not self.received.endswith(END) and (data := secured.recv(65_536)):
                self.received += data
            secured.sendall(ALL)

    def join(self) -> None:
        self.greeted.set()
        self.awake.set()
        self._thread.join()


@pytest.fixture
def sleeper(tmp_path: Path) -> Sleeper:
    return Sleeper(certify(tmp_path, "localhost"))


@pytest.fixture
def wires(tmp_path: Path, sleeper: Sleeper) -> Wires:
    return wires_of(Tls("localhost", str(tmp_path / "authority.pem")), [sleeper.address])


@pytest.fixture
def fd(wires: Wires, sleeper: Sleeper) -> Iterator[int]:
    """Of a connection to the sleeper."""
    fd = wires.open(sleeper.address, None)
    yield fd
    wires.close(fd)
    sleeper.join()


def test_a_read_leaves_what_a_write_waits_for(wires: Wires, fd: int, sleeper: Sleeper) -> None:
    """Nothing else may ever come to wake it."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    assert poll.poll(LIMIT)  # it is connected
    poll.modify(fd, select.POLLIN)
    with pytest.raises(BlockingIOError):
        wires.write(fd, END)
    sleeper.greeted.set()
    sent = 0
    while not sent:
        assert not wires.waits_to_write(fd)
        assert poll.poll(LIMIT)
        with pytest.raises(BlockingIOError):
            wires.read(fd, 1)
        assert poll.poll(0)
        with suppress(BlockingIOError):
            sent = wires.write(fd, END)
    sleeper.awake.set()
    assert poll.poll(LIMIT)
    assert wires.read(fd, 10) == ALL


def test_what_the_system_does_not_take_is_written_later(wires: Wires, fd: int, sleeper: Sleeper) -> None:
    sleeper.greeted.set()
    data = random.Random(1).randbytes(SIZE) + END
    unsent = memoryview(data)
    poll = select.poll()
    poll.register(fd)
    while unsent:
        try:
            unsent = unsent[wires.write(fd, unsent) :]
        except BlockingIOError:
            if wires.waits_to_write(fd) and len(unsent) < len(data):
                sleeper.awake.set()  # not before: that it would ever have to wait
            with pytest.raises(BlockingIOError):
                wires.read(fd, 1)
            poll.modify(fd, select.POLLOUT if wires.waits_to_write(fd) else select.POLLIN)
            assert poll.poll(LIMIT)
    assert sleeper.awake.is_set()
    poll.modify(fd, select.POLLIN)
    assert poll.poll(LIMIT)
    sleeper.join()
    assert wires.read(fd, 10) == ALL
    assert sleeper.received == data
