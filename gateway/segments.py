"""How large the TCP segments of a connection are: whoever compresses to save one has to know."""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from broker.carriers.profile import Tcp

USUAL: Final = 1400  # bytes, where the system does not say, or a proxy beside us: what most paths let through
STEP: Final = 100  # bytes: sizes are rounded down to these, so that many devices share one encoding of a push


def segment_size(transport: asyncio.BaseTransport, tcp: Tcp) -> int:
    """Bytes that one segment carries: as the profile has it, or the system at this moment (TCP_MAXSEG)."""
    size = tcp.mss or min(_ask(transport.get_extra_info("socket")) or USUAL, USUAL)
    return max(size // STEP, 1) * STEP


def _ask(sock: socket.socket | None) -> int:
    """0: it does not say."""
    try:
        return 0 if sock is None else sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    except OSError:  # not of TCP, or gone
        return 0
