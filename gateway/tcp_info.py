"""What the kernel knows of a connection (TCP_INFO), looked up for a sample of them, by carrier.

A round-trip time is what it is at the moment; segments and retransmissions are counts since the connection began, and
what is wanted of them is how they rise. So some connections, COHORT at most, are watched for a while each: a first
look says where the counts stand, each later one how much was added, and the last one comes at the end of the
connection, where what it could not deliver is most of all. Then the place is somebody else's. A connection that is
not watched costs nothing.
"""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from gateway.connection import Connection
    from gateway.metrics import NodeMetrics

COHORT: Final = 256  # connections watched at a time: 0.1 MB
LOOKS_AT_ONCE: Final = 16  # in one tick: some 70 us
LOOK_PAUSE: Final = 10.0  # seconds between two looks at one
STAY: Final = 600.0  # seconds until one makes room for another
RTT_BOUNDS: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3),
    *(0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0),
)
MICROSECOND: Final = 1e-6
COUNTER_MASK: Final = 0xFFFF_FFFF  # the kernel's counts begin anew after this

# struct tcp_info of linux/tcp.h, as far as Linux 4.6 has it; only ever extended at its end.
_LAYOUT: Final = struct.Struct(
    "=2x B 5x"  # .. retransmits: of the oldest segment, without an answer so far
    "8x I 4x I 40x"  # .. snd_mss .. unacked ..
    "I I 24x"  # rtt, rttvar in us ..
    "I 32x"  # total_retrans ..
    "I 16x I"  # segs_out .. data_segs_out
)

Note = Callable[["Connection", float, int, int], None]
"""Of a connection: the round-trip time in seconds, and since the look before: data segments sent, and how many of
them again."""


class TcpInfo(NamedTuple):
    """Times in seconds; the counts are of the connection's whole life, modulo 2^32."""

    retransmits: int  # in a row, of the segment that is waited for now
    snd_mss: int  # bytes of data in one segment to the peer
    unacked: int  # segments
    rtt: float  # smoothed, 0.0: not known
    rttvar: float
    total_retrans: int
    segs_out: int
    data_segs_out: int  # those sent again included


def parse_tcp_info(raw: bytes) -> TcpInfo | None:
    """None: an older kernel's, which counts less."""
    if len(raw) < _LAYOUT.size:
        return None
    retransmits, snd_mss, unacked, rtt, rttvar, total, sent, data = _LAYOUT.unpack_from(raw)
    return TcpInfo(retransmits, snd_mss, unacked, rtt * MICROSECOND, rttvar * MICROSECOND, total, sent, data)


def read_tcp_info(transport: Any) -> TcpInfo | None:
    """None: closed, or no TCP. `transport`: anything with `get_extra_info`."""
    connected = transport.get_extra_info("socket")
    if connected is None:
        return None
    try:
        return parse_tcp_info(connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAYOUT.size))
    except OSError:
        return None


class _Watch:
    """What was seen of a connection."""

    __slots__ = ("connection", "info", "look_at", "until")

    def __init__(self, connection: Connection, info: TcpInfo, now: float) -> None:
        self.connection = connection
        self.info = info
        self.look_at = now + LOOK_PAUSE
        self.until = now + STAY


class TcpSamples:
    """Of one node, whose tick calls `tick`; `left` is called for each connection that ends."""

    def __init__(self, metrics: NodeMetrics) -> None:
        self.learn: Note = _nobody  # told the same as the metrics
        self._metrics = metrics
        self._watched: dict[Connection, _Watch] = {}
        self._line: deque[_Watch] = deque()  # by look_at; those that left are skipped when their turn comes

    def __len__(self) -> int:
        return len(self._watched)

    def tick(self, due: Sequence[Connection], now: float) -> None:
        """`due`: connections that are looked after in this tick anyway; who of them is watched is up to chance."""
        self._look_again(now)
        room = min(LOOKS_AT_ONCE, COHORT - len(self._watched))
        for connection in due[:room] if room > 0 else ():
            self._take_in(connection, now)

    def left(self, connection: Connection) -> None:
        watch = self._watched.pop(connection, None)
        if watch is not None:
            self._look(watch)

    def _take_in(self, connection: Connection, now: float) -> None:
        if connection in self._watched or not _is_of_device(connection):
            return
        info = read_tcp_info(connection.transport)
        if info is not None:
            watch = _Watch(connection, info, now)
            self._watched[connection] = watch
            self._line.append(watch)
            self._note(connection, info, 0, 0)

    def _look_again(self, now: float) -> None:
        for _ in range(LOOKS_AT_ONCE):
            if not self._line or self._line[0].look_at > now:
                return
            watch = self._line.popleft()
            if self._watched.get(watch.connection) is not watch:
                continue
            if self._look(watch) and now < watch.until:
                watch.look_at = now + LOOK_PAUSE
                self._line.append(watch)
            else:
                del self._watched[watch.connection]

    def _look(self, watch: _Watch) -> bool:
        """Whether there is anything to see."""
        info, before = read_tcp_info(watch.connection.transport), watch.info
        if info is None:
            return False
        segments = (info.data_segs_out - before.data_segs_out) & COUNTER_MASK
        again = (info.total_retrans - before.total_retrans) & COUNTER_MASK
        watch.info = info
        if segments or again:  # or what is known of its round-trip time is as old as before
            self._note(watch.connection, info, segments, again)
        return True

    def _note(self, connection: Connection, info: TcpInfo, segments: int, again: int) -> None:
        carrier, metrics = connection.profile.name, self._metrics
        if info.rtt:
            metrics.tcp_rtt.labels(carrier).observe(info.rtt)
        metrics.tcp_segments.labels(carrier).value += segments
        metrics.tcp_retransmits.labels(carrier).value += again
        self.learn(connection, info.rtt, segments, again)


def _is_of_device(connection: Connection) -> bool:
    """It did CONNECT, and the socket's other end is not a proxy or another node."""
    return connection.session is not None and connection.direct and not connection.proxy


def _nobody(connection: Connection, rtt: float, segments: int, retransmits: int) -> None:
    """Learns."""
