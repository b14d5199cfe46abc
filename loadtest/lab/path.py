"""A path between devices and a server: packets and *now* in, the same packets and when they arrive out; no I/O.

    device -> lane up -> NAT -> server        what the lane loses does not wake the NAT's memory
    device <- lane down <- NAT <- server      a packet for a flow that the NAT forgot vanishes

The n-th packet of a direction has the same fate in each run with one seed, and bursts come at the same times: no
contender has better luck.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Final, Literal

from loadtest.lab.networks import Network
from loadtest.lab.packets import (
    PINGREQ,
    End,
    Segment,
    must_not_be_cut,
    read_segment,
    with_source,
    with_target,
)

FIRST_PORT: Final = 20_000
PORTS: Final = 40_000  # that a NAT gives out, in turn
MAX_FLOWS: Final = 4096  # that a NAT knows: the one longest silent is forgotten first

Way = Literal["up", "down"]
Due = tuple[float, bytes]  # when it arrives, the packet


@dataclass(slots=True)
class Counts:
    """Packets and bytes are those that were sent, whatever became of them."""

    up: int = 0
    up_bytes: int = 0
    down: int = 0
    down_bytes: int = 0
    lost: int = 0  # by chance
    full: int = 0  # dropped by a full queue
    forgotten: int = 0  # of a flow that the NAT does not know (any more)
    dead: int = 0  # on a dead path
    too_long: int = 0
    heartbeats: int = 0  # PINGREQs of devices, a repetition by TCP not counted

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


class Lane:
    """One direction: loss, then a queue in front of a thin link, then delay."""

    def __init__(self, network: Network, seed: str) -> None:
        self._network = network
        self._seed = seed
        self._random = Random(seed)
        self._jitter = Random(f"{seed} jitter")  # its own, or what was lost would change what follows
        self._in_burst = True
        self._turns_at: float | None = None  # from bursts to none, or back
        self._free_at = 0.0  # the link has sent what it was given
        self._last = 0.0  # arrival of the packet before

    def start(self, now: float) -> None:
        """Bursts come at the same times after it in each run."""
        self._random.seed(self._seed)
        self._in_burst = True
        self._turns_at = now

    def loses(self, now: float) -> bool:
        """One packet's fate. In bursts it is decided by a chain of two states (Gilbert 1960) in continuous time: one
        that went on by packets would be left never by a TCP that is silent for longer after each loss."""
        if not self._network.burst:
            return self._random.random() < self._network.loss
        if self._turns_at is None:
            self.start(now)
        while self._turns_at is not None and now >= self._turns_at:
            self._in_burst = not self._in_burst
            self._turns_at += self._random.expovariate(1 / self._mean())
        return self._in_burst

    def _mean(self) -> float:
        """Seconds, of the state it is in."""
        network = self._network
        return network.burst if self._in_burst else network.burst * (1 - network.loss) / network.loss

    def arrival(self, size: int, now: float) -> float | None:
        """None: the queue is full."""
        network = self._network
        sent = now
        if network.rate:
            begin = max(now, self._free_at)
            if begin - now > network.queue:
                return None
            sent = self._free_at = begin + size * 8 / network.rate
        jitter = self._jitter.random() * network.jitter if network.jitter else 0.0
        self._last = max(self._last, sent + network.delay + jitter)
        return self._last


class Nat:
    """Endpoint-dependent and silent: what is not of a flow it knows, it drops. A packet in either direction keeps its
    flow in memory. `forget`: seconds of silence; 0: it remembers all."""

    def __init__(self, forget: float, public: Sequence[bytes]) -> None:
        """`public`: its addresses, the next one each time that it moves."""
        self._forget = forget
        self._public = public
        self._moves = 0
        self._next = 0
        self._outside: dict[tuple[int, End, End], End] = {}  # protocol, device, server -> public end
        self._inside: dict[tuple[int, End, End], tuple[int, End, End]] = {}  # protocol, public end, server
        self._heard: dict[tuple[int, End, End], float] = {}  # the longest silent first

    def move(self) -> None:
        self._moves += 1
        self._outside.clear()
        self._inside.clear()
        self._heard.clear()

    def outwards(self, packet: bytes, segment: Segment, now: float) -> bytes | None:
        flow = (segment.protocol, segment.source, segment.target)
        if not self._knows(flow, now):
            if not segment.opens:
                return None
            self._remember(flow)
        self._hear(flow, now)
        return with_source(packet, segment, self._outside[flow])

    def inwards(self, packet: bytes, segment: Segment, now: float) -> bytes | None:
        flow = self._inside.get((segment.protocol, segment.target, segment.source))
        if flow is None or not self._knows(flow, now):
            return None
        self._hear(flow, now)
        return with_target(packet, segment, flow[1])

    def _knows(self, flow: tuple[int, End, End], now: float) -> bool:
        heard = self._heard.get(flow)
        if heard is None:
            return False
        if self._forget and now - heard > self._forget:
            self._drop(flow)
            return False
        return True

    def _hear(self, flow: tuple[int, End, End], now: float) -> None:
        self._heard.pop(flow, None)
        self._heard[flow] = now

    def _remember(self, flow: tuple[int, End, End]) -> None:
        if len(self._heard) >= MAX_FLOWS:
            self._drop(next(iter(self._heard)))
        outside = (self._public[self._moves % len(self._public)], FIRST_PORT + self._next)
        self._next = (self._next + 1) % PORTS
        self._outside[flow] = outside
        self._inside[flow[0], outside, flow[2]] = flow

    def _drop(self, flow: tuple[int, End, End]) -> None:
        outside = self._outside.pop(flow)
        del self._inside[flow[0], outside, flow[2]]
        del self._heard[flow]


class Path:
    """Both directions of a network, for all devices of one contender. Until `start` nothing happens to it but what
    always does."""

    def __init__(
        self, network: Network, seed: str, public: Sequence[bytes], servers: Sequence[bytes]
    ) -> None:
        """`servers`: its addresses, the first one is address 1 of an event."""
        self._network = network
        self._servers = servers
        self._lanes = {way: Lane(network, f"{seed} {network.name} {way}") for way in ("up", "down")}
        self._nat = Nat(network.forget, public)
        self._started: float | None = None
        self._moves = 0
        self._last_ping: dict[tuple[End, End], int] = {}  # flow -> sequence number of its last PINGREQ
        self.counts = self._counts = Counts()  # the second one is another when the network's time is over

    def start(self, now: float) -> None:
        """Here begins the time of the events, and what is counted."""
        self._started = now
        self._counts = self.counts = Counts()
        for lane in self._lanes.values():
            lane.start(now)

    def up(self, packet: bytes, now: float) -> Due | None:
        """None: lost."""
        segment = read_segment(packet)
        if segment is None:
            return None
        self._pass_time(now)
        self._count_up(packet, segment)
        if self._is_dead("up", segment.target[0], now) or self._is_too_long(packet) or self._loses("up", now):
            return None
        changed = self._nat.outwards(packet, segment, now)
        return self._send("up", changed, now)

    def down(self, packet: bytes, now: float) -> Due | None:
        segment = read_segment(packet)
        if segment is None:
            return None
        self._pass_time(now)
        self._counts.down += 1
        self._counts.down_bytes += len(packet)
        if self._is_dead("down", segment.source[0], now) or self._is_too_long(packet):
            return None
        changed = self._nat.inwards(packet, segment, now)
        return None if self._loses("down", now) else self._send("down", changed, now)

    def _count_up(self, packet: bytes, segment: Segment) -> None:
        self._counts.up += 1
        self._counts.up_bytes += len(packet)
        if segment.size == len(PINGREQ) and segment.payload == PINGREQ:
            flow = (segment.source, segment.target)
            if self._last_ping.get(flow) != segment.sequence:
                self._last_ping[flow] = segment.sequence
                self._counts.heartbeats += 1

    def _pass_time(self, now: float) -> None:
        if self._started is None:
            return
        since = now - self._started
        if since > self._network.end:
            self._counts = Counts()
        moves = sum(event.happened(since) for event in self._network.event if event.what == "moved")
        if moves > self._moves:
            self._moves = moves
            self._nat.move()

    def _is_dead(self, way: Way, server: bytes, now: float) -> bool:
        if self._started is None:
            return False
        for event in self._network.event:
            hit = event.what != "moved" and event.way in ("both", way) and event.is_on(now - self._started)
            if hit and (not event.address or self._servers[event.address - 1] == server):
                self._counts.dead += 1
                return True
        return False

    def _is_too_long(self, packet: bytes) -> bool:
        """Where a router drops without a word, it is for a packet that it must not cut."""
        too_long = 0 < self._network.mtu < len(packet) and must_not_be_cut(packet)
        self._counts.too_long += too_long
        return too_long

    def _loses(self, way: Way, now: float) -> bool:
        lost = self._lanes[way].loses(now)
        self._counts.lost += lost
        return lost

    def _send(self, way: Way, packet: bytes | None, now: float) -> Due | None:
        if packet is None:
            self._counts.forgotten += 1
            return None
        arrival = self._lanes[way].arrival(len(packet), now)
        if arrival is None:
            self._counts.full += 1
            return None
        return arrival, packet
