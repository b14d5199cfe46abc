"""The least that could serve a storm of TLS devices: an epoll loop that accepts, does OpenSSL's part of the
handshake, and nothing else.

With the same certificate and the same settings of TLS as the real server, whose cost for a CONNECT over TLS can so be
read as a share of what a handshake costs anybody. `python -m loadtest.bare_tls CERTIFICATE KEY` prints its port, and
ends with its stdin.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import sys
from typing import Final

BACKLOG: Final = 4096
READ_SIZE: Final = 65_536
ACCEPTS_AT_ONCE: Final = 64


class BareTlsServer:
    def __init__(self, listening: socket.socket, context: ssl.SSLContext) -> None:
        self._listening = listening
        self._listening.setblocking(False)
        self._context = context
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()  # for all, as gateway/tls.py has it
        self._epoll = select.epoll()
        self._peers: dict[int, ssl.SSLObject] = {}

    def serve(self) -> None:
        """Until stdin ends."""
        door, end = self._listening.fileno(), sys.stdin.fileno()
        self._epoll.register(door, select.EPOLLIN)
        self._epoll.register(end, select.EPOLLIN)
        while True:
            for fd, _ in self._epoll.poll():
                if fd == end:
                    return
                if fd == door:
                    self._accept()
                else:
                    self._shake_hands(fd)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                fd = self._listening.accept()[0].detach()
            except BlockingIOError:
                return
            os.set_blocking(fd, False)
            self._peers[fd] = self._context.wrap_bio(self._incoming, self._outgoing, server_side=True)
            self._epoll.register(fd, select.EPOLLIN)

    def _shake_hands(self, fd: int) -> None:
        try:
            data = os.read(fd, READ_SIZE)
        except ConnectionError:
            data = b""
        if not data:
            del self._peers[fd]
            os.close(fd)
            return
        self._incoming.write(data)
        try:
            self._peers[fd].do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            self._incoming.read()  # the next read is an end
        answer = self._outgoing.read()
        if answer:
            os.write(fd, answer)


def main() -> None:
    listening = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 1
    context.set_alpn_protocols(["mqtt"])
    context.load_cert_chain(*sys.argv[1:3])
    sys.stdout.write(f"{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    BareTlsServer(listening, context).serve()


if __name__ == "__main__":
    main()
