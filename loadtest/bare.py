"""The least that could serve a broadcast: an epoll loop that writes ready-made pushes and reads their PUBACKs.

It checks and keeps nothing. Against it the fleet shows what this machine's loopback and the generator allow, so
that a number of the real server can be read as a share of that. `python -m loadtest.bare`: prints its port, then
takes lines "AT_ONCE ROUNDS" on stdin and answers each with the seconds it took. With a number of processes behind
it they share the port, and all do it.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections.abc import Sequence
from typing import Final, TextIO

from gateway.mqtt import Connack, Pingreq, Pingresp, encode, publish_frame
from loadtest.ledger import alert

PUBACK_SIZE: Final = 4
PINGREQ: Final = encode(Pingreq(), 4)
PINGRESP: Final = encode(Pingresp(), 4)
ACCEPT: Final = encode(Connack(), 4)
HEAD, TAIL = publish_frame(
    "push",
    f'{{"msg_id":"{10**17}","notification":{{"alert":"{alert(0, 18)}"}}}}'.encode(),
    qos=1,
    version=4,
)


class BareServer:
    def __init__(self, listening: socket.socket, orders: TextIO, answers: TextIO) -> None:
        self._listening = listening
        self._listening.setblocking(False)
        self._orders = orders
        self._answers = answers
        self._epoll = select.epoll()
        self._epoll.register(self._listening, select.EPOLLIN)
        self._epoll.register(self._orders, select.EPOLLIN)
        self._joining: dict[int, socket.socket] = {}
        self._devices: dict[int, socket.socket] = {}
        self._owed: dict[int, int] = {}  # fd -> bytes of PUBACKs to come

    def serve(self) -> None:
        """Until the orders end."""
        while True:
            for fd, _ in self._epoll.poll():
                if fd in self._devices:
                    self._answer(fd)
                elif fd in self._joining:
                    self._welcome(fd)
                elif fd == self._listening.fileno():
                    self._accept()
                elif not self._obey():
                    return

    def _obey(self) -> bool:
        line = self._orders.readline()
        if line:
            at_once, rounds = map(int, line.split())
            self._answers.write(f"{self._blast(at_once, rounds)}\n")
            self._answers.flush()
        return bool(line)

    def _answer(self, fd: int) -> None:
        data = os.read(fd, 1024)
        if not data:
            self._devices.pop(fd).close()
        elif data == PINGREQ:
            os.write(fd, PINGRESP)

    def _accept(self) -> None:
        try:
            while True:
                accepted, _ = self._listening.accept()
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
            if fd not in self._owed:
                continue  # a PINGREQ, which waits
            data = os.read(fd, 1024)
            left = self._owed[fd] - (len(data) - len(PINGREQ) * data.count(PINGREQ))
            if PINGREQ in data:
                os.write(fd, PINGRESP)
            if left > 0:
                self._owed[fd] = left
            else:
                del self._owed[fd]


def _fork(listening: Sequence[socket.socket]) -> list[TextIO]:
    """A server for each listening socket; what to write their orders to. They end with it."""
    orders: list[TextIO] = []
    for mine in listening:
        order_out, order_in = os.pipe()
        if os.fork():
            os.close(order_out)
            orders.append(os.fdopen(order_in, "w"))
            continue
        for other in orders:
            other.close()
        for theirs in listening:
            if theirs is not mine:
                theirs.close()
        os.close(order_in)
        BareServer(mine, os.fdopen(order_out), sys.stdout).serve()
        os._exit(0)
    return orders


def main(processes: int) -> None:
    listening = [_listen(0)]
    port = listening[0].getsockname()[1]
    listening += [_listen(port) for _ in range(1, processes)]
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    if processes == 1:
        BareServer(listening[0], sys.stdin, sys.stdout).serve()
        return
    orders = _fork(listening)
    for mine in listening:
        mine.close()
    for line in sys.stdin:
        for order in orders:
            order.write(line)
            order.flush()


def _listen(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port), backlog=4096, reuse_port=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
