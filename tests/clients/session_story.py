"""The device's session as a story: its clock, and the server's side of the wire."""

from __future__ import annotations

from clients.session import Action, DeviceSession, LinkSettings, Send
from gateway.mqtt import Packet, decode, encode


def packets_of(actions: list[Action]) -> list[Packet]:
    """What is sent, which must be whole packets."""
    data = b"".join(action.data for action in actions if isinstance(action, Send))
    packets, start = [], 0
    while (found := decode(data, start, 5, 1 << 20)) is not None:
        packet, start = found
        packets.append(packet)
    assert start == len(data)
    return packets


class Story:
    def __init__(self, settings: LinkSettings, jitter: float = 0.5) -> None:
        self.session = DeviceSession("phone", "app", b"secret", lambda: jitter, settings=settings)
        self.now = 1000.0

    def hear(self, *packets: Packet) -> list[Action]:
        return self.session.receive(b"".join(encode(packet, 5) for packet in packets), self.now)

    def wait(self) -> list[Action]:
        """Until the session has something to do."""
        deadline = self.session.deadline
        assert deadline is not None
        self.now = max(self.now, deadline)
        return self.session.tick(self.now)
