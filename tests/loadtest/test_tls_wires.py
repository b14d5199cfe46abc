"""What TLS makes of writing where the other end does not read."""

from __future__ import annotations

import random
import select
import socket
import threading
from pathlib import Path

import pytest

from loadtest.wires import Tls, wires_of
from tests.loadtest.trial_world import Certified, certify

SIZE = 32 << 20  # more than the system takes for a peer that does not read
LIMIT = 20_000  # milliseconds


class Sleeper:
    """Shakes hands, and reads when it is woken."""

    def __init__(self, certified: Certified) -> None:
        self._context = certified.context()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = self._listening.getsockname()
        self.awake = threading.Event()
        self.received = bytearray()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        accepted, _ = self._listening.accept()
        with self._listening, self._context.wrap_socket(accepted, server_side=True) as secured:
            self.awake.wait()
            while len(self.received) < SIZE and (data := secured.recv(65_536)):
                self.received += data
            secured.sendall(b"all")

    def join(self) -> None:
        self._thread.join()


def test_what_the_system_does_not_take_is_written_later(tmp_path: Path) -> None:
    certified = certify(tmp_path, "localhost")
    sleeper = Sleeper(certified)
    wires = wires_of(Tls("localhost", str(certified.cafile)), [sleeper.address])
    fd = wires.open(sleeper.address, None)
    data = random.Random(1).randbytes(SIZE)
    unsent = memoryview(data)
    poll = select.poll()
    poll.register(fd)
    while unsent:
        try:
            unsent = unsent[wires.write(fd, unsent) :]
        except BlockingIOError:
            if wires.waits_to_write(fd) and len(unsent) < SIZE:
                sleeper.awake.set()  # not before: that it would ever have to wait
            with pytest.raises(BlockingIOError):
                wires.read(fd, 1)
            poll.modify(fd, select.POLLOUT if wires.waits_to_write(fd) else select.POLLIN)
            assert poll.poll(LIMIT)
    assert sleeper.awake.is_set()
    poll.modify(fd, select.POLLIN)
    assert poll.poll(LIMIT)
    sleeper.join()
    assert wires.read(fd, 10) == b"all"
    assert sleeper.received == data
    wires.close(fd)
