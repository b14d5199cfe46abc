"""The table against its type, values that cannot change, frames for many devices, and what a read costs."""

import ast
import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest

import gateway.mqtt
from gateway.mqtt import (
    NO_PROPERTIES,
    Connect,
    MalformedPacket,
    Packet,
    Pingreq,
    Properties,
    Puback,
    Publish,
    decode,
    encode,
    puback_run,
    publish_frame,
)
from gateway.mqtt import wire as types
from gateway.mqtt.properties import TABLE, decode_properties
from gateway.mqtt.wire import PacketType

VARINTS = [
    (0, "00"),
    (127, "7f"),
    (128, "8001"),
    (16_383, "ff7f"),
    (16_384, "808001"),
    (2_097_151, "ffff7f"),
    (2_097_152, "80808001"),
    (268_435_455, "ffffff7f"),
]


def test_table_and_type_name_the_same_properties():
    assert [row.name for row in TABLE] == list(Properties.__annotations__)


def test_property_ids_ascend():
    assert all(a.id < b.id for a, b in pairwise(TABLE))


def test_every_packet_is_in_the_union_and_frozen():
    kinds = get_args(Packet)
    assert len(kinds) == 15
    for kind in kinds:
        assert kind.__dataclass_params__.frozen
        assert not hasattr(kind, "__dict__") or "__slots__" in vars(kind)


def test_a_packet_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Puback(1).packet_id = 2


def test_packets_are_hashable_whatever_their_properties():
    assert len({Publish("t", b"", properties={"topic_alias": 1}), Publish("t", b"")}) == 2


def test_packets_without_properties_share_one_section():
    raw = encode(Publish("t", b"x"), 5)
    assert decode(raw, 0, 5, 100)[0].properties is NO_PROPERTIES
    assert Puback(1).properties is NO_PROPERTIES
    with pytest.raises(TypeError):
        NO_PROPERTIES["topic_alias"] = 1


def test_no_secret_or_payload_in_a_log_line():
    assert "hunter2" not in repr(Connect("d", username="a", password=b"hunter2"))
    assert "hunter2" not in repr(Publish("t", b"hunter2"))


@pytest.mark.parametrize(("value", "raw"), VARINTS)
def test_variable_byte_integer(value, raw):
    assert types.varint(value) == bytes.fromhex(raw)
    assert types.read_varint(bytes.fromhex(raw), 0) == (value, len(raw) // 2)


@pytest.mark.parametrize("value", [-1, 268_435_456])
def test_variable_byte_integer_has_its_range(value):
    with pytest.raises(AssertionError):
        types.varint(value)


@pytest.mark.parametrize("size", [0, 1, 122, 123, 16_378, 16_379, 2_097_146, 2_097_147])
@pytest.mark.parametrize("version", [4, 5])
def test_publish_around_each_length_of_the_length(size, version):
    packet = Publish("t", bytes(size), 1, packet_id=9)
    raw = encode(packet, version)
    assert decode(raw, 0, version, 1 << 22) == (packet, len(raw))
    assert decode(raw[:-1], 0, version, 1 << 22) is None


def test_thousands_of_user_properties_are_read_in_order():
    pairs = tuple((str(n), "") for n in range(5000))
    packet = Publish("t", b"", properties={"user_properties": pairs})
    assert decode(encode(packet, 5), 0, 5, 1 << 20)[0] == packet


def test_one_frame_serves_many_packet_ids():
    head, tail = publish_frame("push", b'{"msg_id":1}', 1, 5, {"message_expiry_interval": 60})
    for packet_id in (1, 256, 65_535):
        packet, _ = decode(head + packet_id.to_bytes(2, "big") + tail, 0, 5, 1000)
        assert packet.packet_id == packet_id
        assert packet.payload == b'{"msg_id":1}'


def test_dup_frame_differs_in_one_bit():
    head, _ = publish_frame(b"push", b"x", 1, 4)
    dup_head, _ = publish_frame(b"push", b"x", 1, 4, dup=True)
    assert dup_head == bytes((head[0] | 8,)) + head[1:]


RUNS = [
    ("", (), 0),
    ("40", (), 0),
    ("4002 00", (), 0),
    ("4002 0001", (1,), 4),
    ("4002 0001 4002 ffff 40", (1, 65_535), 8),
    ("4002 0001 c000 4002 0002", (1,), 4),
    ("4002 0001 4003 0002 10 4002 0003", (1,), 4),  # a reason: for decode
    ("4002 0001 4002 0000", (1,), 4),  # packet id 0: for decode to refuse
    ("c000 4002 0001", (), 0),
]


@pytest.mark.parametrize(("raw", "packet_ids", "end"), RUNS)
def test_puback_run(raw, packet_ids, end):
    assert puback_run(bytes.fromhex(raw), 0) == (packet_ids, end)
    assert puback_run(bytes.fromhex("c000" + raw), 2) == (packet_ids, end + 2)


def test_decoded_values_do_not_follow_the_buffer():
    buffer = bytearray(encode(Publish("t", b"abc", properties={"correlation_data": b"xyz"}), 5))
    packet, _ = decode(buffer, 0, 5, 100)
    buffer[:] = b"\0" * len(buffer)
    buffer.clear()  # raises BufferError if a view of it were kept
    assert type(packet.payload) is bytes
    assert (packet.payload, packet.properties["correlation_data"]) == (b"abc", b"xyz")


class CountingBuffer(bytearray):
    """Counts the bytes that are looked at."""

    touched = 0

    def __getitem__(self, key):
        found = super().__getitem__(key)
        self.touched += 1 if isinstance(key, int) else len(found)
        return found


def test_a_half_received_packet_costs_a_few_looks_however_long():
    buffer = CountingBuffer(encode(Publish("t", bytes(1_000_000)), 4)[:-1])
    assert decode(buffer, 0, 4, 1 << 20) is None
    assert buffer.touched <= 8


@pytest.mark.parametrize("packet", PacketType)
def test_each_property_only_where_the_table_allows_it(packet):
    values = {types.read_byte: b"\1", types.read_uint16: b"\0\1", types.read_uint32: b"\0\0\0\1"}
    values |= {types.read_varint: b"\1", types.read_string: b"\0\1x", types.read_binary: b"\0\1x"}
    values |= {types.read_pair: b"\0\1x\0\1y"}
    method = b"\x15\0\1x"
    for row in TABLE:
        section = bytes((row.id,)) + values[row.read]
        if row.name == "authentication_data":
            section += method
        if row.packets & 1 << packet:
            assert row.name in decode_properties(section, packet)
        else:
            with pytest.raises(MalformedPacket):
                decode_properties(section, packet)


def test_the_codec_does_no_io():
    folder = Path(gateway.mqtt.__file__).parent
    forbidden = {"asyncio", "socket", "time", "random", "gateway", "broker", "clients", "loadtest"}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module)
            assert not forbidden & {name.split(".")[0] for name in names}, path.name


def test_ping_is_one_shared_value():
    assert decode(b"\xc0\0", 0, 4, 2)[0] is decode(b"\xc0\0", 0, 5, 2)[0]
    assert decode(b"\xc0\0", 0, 4, 2)[0] == Pingreq()
