"""IPv4 packets as a NAT sees them: whose flow they are of, and the same packet with another address and port."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

TCP: Final = 6
UDP: Final = 17
PINGREQ: Final = b"\xc0\x00"  # MQTT5-3.12
_CHECKSUM_AT: Final = {TCP: 16, UDP: 6}  # in the transport's header
_LEAST: Final = {TCP: 20, UDP: 8}  # bytes of that header
_SYN: Final = 0x02
_ACK: Final = 0x10

End = tuple[bytes, int]  # address (4 bytes), port


@dataclass(frozen=True, slots=True)
class Segment:
    """What is read of a packet."""

    protocol: int
    header: int  # bytes before the transport's header
    source: End
    target: End
    opens: bool  # a SYN without ACK, or any datagram: a NAT makes room for it
    sequence: int
    payload: bytes  # the first bytes of it, MAX_LOOK at most
    size: int  # of the payload


MAX_LOOK: Final = 8


def read_segment(packet: bytes) -> Segment | None:
    """None: not TCP or UDP over IPv4, or a fragment."""
    if len(packet) < 20 or packet[0] >> 4 != 4 or packet[9] not in _LEAST:
        return None
    header = (packet[0] & 0x0F) * 4
    protocol = packet[9]
    fragment = int.from_bytes(packet[6:8]) & 0x3FFF
    if fragment or len(packet) < header + _LEAST[protocol]:
        return None
    flags = packet[header + 13] if protocol == TCP else _SYN
    begin = header + ((packet[header + 12] >> 4) * 4 if protocol == TCP else 8)
    return Segment(
        protocol,
        header,
        (packet[12:16], int.from_bytes(packet[header : header + 2])),
        (packet[16:20], int.from_bytes(packet[header + 2 : header + 4])),
        flags & (_SYN | _ACK) == _SYN,
        int.from_bytes(packet[header + 4 : header + 8]) if protocol == TCP else 0,
        packet[begin : begin + MAX_LOOK],
        max(0, len(packet) - begin),
    )


def must_not_be_cut(packet: bytes) -> bool:
    """The flag DF, which Linux sets unless IP_MTU_DISCOVER says otherwise."""
    return bool(packet[6] & 0x40)


def with_source(packet: bytes, segment: Segment, end: End) -> bytes:
    return _replace(packet, segment, 12, segment.source, end)


def with_target(packet: bytes, segment: Segment, end: End) -> bytes:
    return _replace(packet, segment, 16, segment.target, end)


def _replace(packet: bytes, segment: Segment, at: int, old: End, new: End) -> bytes:
    """`at`: of the address; the port stands in the transport's header at the same side."""
    changed = bytearray(packet)
    port_at = segment.header + (at - 12) // 2
    checksum_at = segment.header + _CHECKSUM_AT[segment.protocol]
    changed[at : at + 4] = new[0]
    changed[port_at : port_at + 2] = new[1].to_bytes(2)
    _adjust(changed, 10, old[0], new[0])
    if segment.protocol == TCP or changed[checksum_at : checksum_at + 2] != b"\0\0":  # UDP may have none
        _adjust(changed, checksum_at, old[0] + old[1].to_bytes(2), new[0] + new[1].to_bytes(2))
    return bytes(changed)


def _adjust(packet: bytearray, at: int, old: bytes, new: bytes) -> None:
    """RFC 1624, equation 3: the checksum of a packet in which `new` takes the place of `old`."""
    total = ~int.from_bytes(packet[at : at + 2]) & 0xFFFF
    for i in range(0, len(old), 2):
        total += (~int.from_bytes(old[i : i + 2]) & 0xFFFF) + int.from_bytes(new[i : i + 2])
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    packet[at : at + 2] = (~total & 0xFFFF).to_bytes(2)
