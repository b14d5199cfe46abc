"""The least that could serve a broadcast: an epoll loop that writes ready-made pushes and reads their PUBACKs.

It checks and keeps nothing. Against it the fleet shows what this machine's loopback and the generator allow, so
that a number of the real server can be read as a share of that. `python -m loadtest.bare`: prints its port, then
takes lines "AT_ONCE ROUNDS" on stdin and answers each with the seconds it took.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from typing import Final

from gateway.mqtt import Connack, encode, publish_frame
from loadtest.ledger import alert

PUBACK_SIZE: Final = 4
ACCEPT: Final = encode(Connack(), 4)
HEAD, TAIL = publish_frame(
    "push",
    f'{{"msg_id":"{10**17}","notification":{{"alert":"{alert(0, 18)}"}}}}'.encode(),
    qos=1,
    version=4,
)


class BareServer:
    def __init__(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.listening.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self.listening, select.EPOLLIN)
        self._epoll.register(sys.stdin, select.EPOLLIN)
        self._joining: dict[int, socket.socket] = {}
        self._devices: dict[int, socket.socket] = {}
        self._owed: dict[int, int] = {}  # fd -> bytes of PUBACKs to come

    def serve(self) -> None:
        """Until stdin ends."""
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self.listening.fileno():
                    self._accept()
                elif fd in self._joining:
                    self._welcome(fd)
                elif fd == sys.stdin.fileno():
                    line = sys.stdin.readline()
                    if not line:
                        return
                    at_once, rounds = map(int, line.split())
                    sys.stdout.write(f"{self._blast(at_once, rounds)}\n")
                    sys.stdout.flush()

    def _accept(self) -> None:
        try:
            while True:
                accepted, _ = self.listening.accept()
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                accepted.setblocking(False)
                self._joining[accepted.fileno()] = accepted
                self._epoll.register(accepted, select.EPOLLIN)
        except BlockingIOError:
            return

    def _welcome(self, fd: int) -> None:
        os.read(fd, 1024)
        os.write(fd, ACCEPT)
        self._devices[fd] = self._joining.pop(fd)

    def _blast(self, at_once: int, rounds: int) -> float:
        started = time.perf_counter()
        for first in range(1, rounds + 1, at_once):
            packet_ids = range(first, min(first + at_once, rounds + 1))
            frames = b"".join(HEAD + packet_id.to_bytes(2) + TAIL for packet_id in packet_ids)
            self._owed = dict.fromkeys(self._devices, PUBACK_SIZE * len(packet_ids))
            for i, fd in enumerate(self._devices):
                os.write(fd, frames)
                if i % 256 == 255:
                    self._take_acks()
            while self._owed:
                self._take_acks()
        return time.perf_counter() - started

    def _take_acks(self) -> None:
        for fd, _ in self._epoll.poll(0, 1024):
            left = self._owed[fd] - len(os.read(fd, 1024))
            if left:
                self._owed[fd] = left
            else:
                del self._owed[fd]


if __name__ == "__main__":
    server = BareServer()
    sys.stdout.write(f"{server.listening.getsockname()[1]}\n")
    sys.stdout.flush()
    server.serve()
