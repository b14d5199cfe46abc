"""The least that could serve a broadcast: an epoll loop that writes ready-made pushes and reads their PUBACKs.

It checks and keeps nothing. Against it the fleet shows what this machine's loopback and the generator allow, so
that a number of the real server can be read as a share of that. `python -m loadtest.bare`: prints its port, then
takes lines "AT_ONCE ROUNDS" on stdin and answers each with the seconds it took. With a number of processes behind
it they share the port, and all do it. It ends with stdin.

It is an MQTT server, too, as far as loadtest.peers needs one: a SUBSCRIBE to one topic is granted, and what is
published there goes to all who subscribed, as it came but for the packet id: one send for each message, or with
--coalesce one for all that were read together.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Final, TextIO

from gateway.mqtt import (
    Connack,
    Pingreq,
    Pingresp,
    Puback,
    Reason,
    Suback,
    Subscribe,
    decode,
    encode,
    publish_frame,
)
from loadtest.ledger import alert

PUBACK_SIZE: Final = 4
PUBLISH, PUBACK, SUBSCRIBE = 0x30, 0x40, 0x80
READ_SIZE: Final = 4096
PACKET_IDS: Final = 65_535
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
    def __init__(
        self, listening: socket.socket, orders: TextIO, answers: TextIO, *, coalesce: bool = False
    ) -> None:
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
        self._coalesce = coalesce
        self._subscribers: dict[bytes, dict[int, None]] = {}  # topic -> fds, in order
        self._topics: dict[int, list[bytes]] = {}  # fd -> those it subscribed to
        self._partial: dict[int, bytes] = {}  # fd -> the beginning of a PUBLISH
        self._packet_id = 0

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
        try:
            data = os.read(fd, READ_SIZE)
        except ConnectionError:
            data = b""
        while data and data[0] == PUBACK:  # and perhaps what the device said next
            data = data[PUBACK_SIZE:]
            if not data:
                return
        if not data:
            self._forget(fd)
        elif fd in self._partial:
            self._publish(fd, self._partial.pop(fd) + data)
        elif data[0] & 0xF0 == PUBLISH:
            self._publish(fd, data)
        elif data[0] & 0xF0 == SUBSCRIBE:
            self._subscribe(fd, data)
        elif data == PINGREQ:
            os.write(fd, PINGRESP)

    def _forget(self, fd: int) -> None:
        for topic in self._topics.pop(fd, ()):
            self._subscribers[topic].pop(fd, None)
        self._partial.pop(fd, None)
        self._devices.pop(fd).close()

    def _subscribe(self, fd: int, data: bytes) -> None:
        found = decode(data, 0, 4, READ_SIZE)
        assert found is not None
        packet, _ = found
        assert isinstance(packet, Subscribe)
        topics = [entry.filter.encode() for entry in packet.subscriptions]
        for topic in topics:
            self._subscribers.setdefault(topic, {})[fd] = None
        self._topics.setdefault(fd, []).extend(topics)
        os.write(fd, encode(Suback(packet.packet_id, (Reason.GRANTED_QOS_1,) * len(topics)), 4))

    def _publish(self, fd: int, data: bytes) -> None:
        """Send on what a publisher sent; one that is not whole waits for its rest."""
        batches: dict[bytes, list[bytes]] = {}
        answers = b""
        end = 0
        for start, body, end in _packets(data):
            topic_end = body + 2 + int.from_bytes(data[body : body + 2])
            topic = data[body + 2 : topic_end]
            frame = data[start:end]
            if data[start] & 6:  # QoS
                answers += encode(Puback(int.from_bytes(data[topic_end : topic_end + 2])), 4)
                self._packet_id = self._packet_id % PACKET_IDS + 1
                frame = data[start:topic_end] + self._packet_id.to_bytes(2) + data[topic_end + 2 : end]
            batches.setdefault(topic, []).append(frame)
        if end < len(data):
            self._partial[fd] = data[end:]
        for topic, frames in batches.items():
            for frame in [b"".join(frames)] if self._coalesce else frames:
                for subscriber in self._subscribers.get(topic, ()):
                    os.write(subscriber, frame)
        os.write(fd, answers)

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


def _packets(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Where each whole packet starts, its body starts, and it ends. None is longer than 16 KB."""
    start, size = 0, len(data)
    while size - start > 2:
        length, body = data[start + 1], start + 2
        if length >= 0x80:
            length, body = length & 0x7F | data[start + 2] << 7, start + 3
        if body + length > size:
            return
        yield start, body, body + length
        start = body + length


def main(processes: int, port: int, *, coalesce: bool) -> None:
    listening = [_listen(port)]
    port = listening[0].getsockname()[1]
    listening += [_listen(port) for _ in range(1, processes)]
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    if processes == 1:
        BareServer(listening[0], sys.stdin, sys.stdout, coalesce=coalesce).serve()
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
    parser = argparse.ArgumentParser()
    parser.add_argument("processes", type=int, nargs="?", default=1)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--coalesce", action="store_true")
    told = parser.parse_args()
    main(told.processes, told.port, coalesce=told.coalesce)
