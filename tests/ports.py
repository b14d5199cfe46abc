"""Ports for servers that tests start by number."""

from __future__ import annotations

import socket
from contextlib import closing
from random import SystemRandom
from typing import Final

_marks: Final[list[socket.socket]] = []  # kept as long as this process lives


def free_port() -> int:
    """Below those that the kernel gives to whoever connects or asks for any port, so that nobody has it before its
    server does, nor while that is down; a cluster's server takes the one 10,000 above as well. Its namesake of UDP
    marks it as taken, for other processes with tests."""
    while True:
        port = SystemRandom().randrange(11_000, 21_000)
        mark = socket.socket(type=socket.SOCK_DGRAM)
        with closing(socket.socket()) as first, closing(socket.socket()) as second:
            try:
                mark.bind(("127.0.0.1", port))
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10_000))
            except OSError:
                mark.close()
                continue
        _marks.append(mark)
        return port


def listeners() -> list[str]:
    """Flags of a server of ours that may be killed: who connects to a port of the kernel's own, when nobody is there,
    can be given that very port, and the server could not come back."""
    return [word for name in ("mqtt", "ws", "http", "admin") for word in (f"--{name}-port", str(free_port()))]
