"""IPv4 packets for the tests of the lab, with checksums as RFC 1071 has them."""

from __future__ import annotations

import struct

from loadtest.lab.packets import TCP, End


def checksum(data: bytes) -> int:
    """RFC 1071, as the RFC has it."""
    total = sum(struct.unpack(f"!{len(data) // 2 + len(data) % 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def make_packet(
    source: End,
    target: End,
    payload: bytes = b"",
    *,
    flags: int = 0x10,
    whole: bool = True,
    protocol: int = TCP,
    sequence: int = 7,
) -> bytes:
    """IPv4 with right checksums. `whole`: no router may cut it."""
    ports = struct.pack("!HH", source[1], target[1])
    if protocol == TCP:
        transport = ports + struct.pack("!IIBBHHH", sequence, 0, 5 << 4, flags, 512, 0, 0) + payload
        at = 16
    else:
        transport = ports + struct.pack("!HH", 8 + len(payload), 0) + payload
        at = 6
    pseudo = source[0] + target[0] + struct.pack("!BBH", 0, protocol, len(transport))
    total = checksum(pseudo + transport) or 0xFFFF
    transport = transport[:at] + total.to_bytes(2) + transport[at + 2 :]
    head = (
        struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(transport), 0, whole << 14, 64, protocol, 0)
        + source[0]
        + target[0]
    )
    return head[:10] + checksum(head).to_bytes(2) + head[12:] + transport


def is_sound(packet: bytes) -> bool:
    """What a kernel checks: both sums over everything are 0."""
    pseudo = packet[12:20] + struct.pack("!BBH", 0, packet[9], len(packet) - 20)
    return checksum(packet[:20]) == 0 and checksum(pseudo + packet[20:]) == 0
