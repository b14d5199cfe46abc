"""The lab's NAT: a rewritten packet is what a kernel would accept, and says the same."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loadtest.lab.packets import TCP, UDP, End, read_segment, with_source, with_target
from tests.loadtest.lab_packets import is_sound, make_packet

ENDS = st.tuples(st.binary(min_size=4, max_size=4), st.integers(1, 65_535))
PAYLOADS = st.binary(max_size=40)


@given(ENDS, ENDS, ENDS, PAYLOADS, st.sampled_from([TCP, UDP]))
def test_a_rewritten_packet_is_sound_and_another_is_at_its_end(
    source: End, target: End, new: End, payload: bytes, protocol: int
) -> None:
    packet = make_packet(source, target, payload, protocol=protocol)
    assert is_sound(packet)
    segment = read_segment(packet)
    assert segment is not None
    assert (segment.source, segment.target, segment.size) == (source, target, len(payload))
    for rewrite, expected in ((with_source, (new, target)), (with_target, (source, new))):
        changed = rewrite(packet, segment, new)
        again = read_segment(changed)
        assert again is not None
        assert (again.source, again.target) == expected
        assert is_sound(changed)


@given(ENDS, ENDS, ENDS)
def test_there_and_back_is_the_same_packet(source: End, target: End, new: End) -> None:
    packet = make_packet(source, target, b"x")
    segment = read_segment(packet)
    assert segment is not None
    changed = with_source(packet, segment, new)
    other = read_segment(changed)
    assert other is not None
    back = with_source(changed, other, source)
    assume(packet[10:12] not in (b"\0\0", b"\xff\xff"))  # two ways to write zero
    assert is_sound(back)
    assert back[:10] == packet[:10]
    assert back[12:36] == packet[12:36]


@pytest.mark.parametrize(
    ("flags", "opens"), [(0x02, True), (0x12, False), (0x10, False), (0x18, False), (0x04, False)]
)
def test_only_a_syn_opens(flags: int, opens: bool) -> None:
    segment = read_segment(make_packet((b"\x0a\0\0\1", 1000), (b"\x0a\0\0\2", 1883), flags=flags))
    assert segment is not None
    assert segment.opens is opens


def test_a_datagram_without_checksum_keeps_none() -> None:
    packet = make_packet((b"\x0a\0\0\1", 1000), (b"\x0a\0\0\2", 53), b"x", protocol=UDP)
    bare = packet[:26] + b"\0\0" + packet[28:]
    segment = read_segment(bare)
    assert segment is not None
    assert segment.opens
    assert with_source(bare, segment, (b"\x0a\0\0\3", 7))[26:28] == b"\0\0"


PACKET = make_packet((b"\x0a\0\0\1", 1000), (b"\x0a\0\0\2", 1883), b"abc")


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x60" + bytes(50),  # IPv6
        PACKET[:19],
        PACKET[:39],
        PACKET[:9] + b"\x01" + PACKET[10:],  # ICMP
        PACKET[:6] + b"\x20\x00" + PACKET[8:],  # a fragment, more to come
        PACKET[:6] + b"\x00\x10" + PACKET[8:],  # a later one
    ],
)
def test_what_is_no_tcp_or_udp_is_nobodys(packet: bytes) -> None:
    assert read_segment(packet) is None


def test_a_packet_that_must_not_be_split_is_no_fragment() -> None:
    assert read_segment(PACKET[:6] + b"\x40\x00" + PACKET[8:]) is not None


def test_the_first_bytes_are_read_and_no_more() -> None:
    segment = read_segment(make_packet((b"\x0a\0\0\1", 1), (b"\x0a\0\0\2", 2), b"0123456789", sequence=99))
    assert segment is not None
    assert (segment.payload, segment.size, segment.sequence) == (b"01234567", 10, 99)
