"""Round trips over all packets, and bytes nobody meant: a packet, None or an MQTTError, nothing else."""

from functools import cache

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.mqtt import (
    NO_PROPERTIES,
    Auth,
    Connack,
    Connect,
    Disconnect,
    MQTTError,
    Pingreq,
    Pingresp,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
    Will,
    decode,
    encode,
    puback_run,
    publish_frame,
    valid_filter,
    valid_topic_name,
)
from gateway.mqtt import codec as rules
from gateway.mqtt.properties import BINARY, BYTE, PAIR, STRING, TABLE, UINT16, UINT32, VARINT
from gateway.mqtt.wire import PacketType

MAX = 1 << 28

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
level = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0+#/"), max_size=4)
topics = st.lists(level, min_size=1, max_size=4).map("/".join).filter(bool)
plain_filters = st.builds(
    lambda levels, rest: "/".join([*levels, *rest]),
    st.lists(st.one_of(level, st.just("+")), min_size=1, max_size=4),
    st.sampled_from([(), ("#",)]),
).filter(bool)
groups = level.filter(bool)
shared = st.builds("$share/{}/{}".format, groups, plain_filters)
filters = st.one_of(plain_filters, shared).filter(valid_filter)
packet_ids = st.integers(1, 65_535)
payloads = st.binary(max_size=300)
versions = st.sampled_from([4, 5])

VALUES = {
    BYTE: st.integers(0, 1),
    UINT16: st.integers(1, 65_535),
    UINT32: st.integers(1, 0xFFFF_FFFF),
    VARINT: st.integers(1, 268_435_455),
    BINARY: st.binary(max_size=12),
    STRING: text,
    PAIR: st.tuples(text, text),
}


def _value(row, packet):
    values = topics if row.name == "response_topic" else VALUES[row.read, row.write]
    if row.name not in ("user_properties", "subscription_identifiers"):
        return values
    most = 4 if row.repeats & 1 << packet else 1
    return st.lists(values, min_size=1, max_size=most).map(tuple)


def properties(packet, version, **required):
    """Every property of the table that `packet` may carry, each there or not."""
    if version != 5:
        return st.just(NO_PROPERTIES)
    optional = {row.name: _value(row, packet) for row in TABLE if row.packets & 1 << packet}
    found = st.fixed_dictionaries(required, optional={k: v for k, v in optional.items() if k not in required})
    return found.map(
        lambda p: (
            p if "authentication_method" in p else {k: v for k, v in p.items() if k != "authentication_data"}
        )
    )


def of(reasons):
    return st.sampled_from(sorted(set(reasons.values())))


def _connects(version):
    wills = st.builds(
        Will,
        topics,
        payloads,
        st.integers(0, 2),
        st.booleans(),
        properties(PacketType.WILL, version),
    )
    connects = st.builds(
        Connect,
        text,
        st.booleans(),
        st.integers(0, 65_535),
        st.none() | text,
        st.none() | payloads,
        st.none() | wills,
        st.just(version),
        properties(PacketType.CONNECT, version),
    )
    return connects.filter(lambda c: version == 5 or c.password is None or c.username is not None)


def _publishes(version):
    return st.integers(0, 2).flatmap(
        lambda qos: st.builds(
            Publish,
            topics,
            payloads,
            st.just(qos),
            st.booleans(),
            st.booleans() if qos else st.just(False),
            packet_ids if qos else st.just(0),
            properties(PacketType.PUBLISH, version),
        )
    )


def _acks(version):
    kinds = (
        (Puback, rules._OF_PUBACK, PacketType.PUBACK),
        (Pubrec, rules._OF_PUBACK, PacketType.PUBREC),
        (Pubrel, rules._OF_PUBREL, PacketType.PUBREL),
        (Pubcomp, rules._OF_PUBREL, PacketType.PUBCOMP),
    )
    if version == 4:
        return [st.builds(ack, packet_ids) for ack, _, _ in kinds]
    return [st.builds(ack, packet_ids, of(reasons), properties(t, 5)) for ack, reasons, t in kinds]


def _subscriptions(version):
    if version == 4:
        return st.builds(Subscription, filters, st.integers(0, 2))
    quiet = st.booleans(), st.integers(0, 2)
    return st.builds(
        Subscription, plain_filters.filter(valid_filter), st.integers(0, 2), st.booleans(), *quiet
    ) | (st.builds(Subscription, shared, st.integers(0, 2), st.just(False), *quiet))


def _some(values):
    return st.lists(values, min_size=1, max_size=5).map(tuple)


def _rest(version):
    suback = rules._OF_SUBACK if version == 5 else rules._OF_SUBACK_311
    connack = rules._OF_CONNACK if version == 5 else rules._OF_CONNACK_311
    found = [
        st.builds(Connack, st.just(False), of(connack), properties(PacketType.CONNACK, version)),
        st.builds(Connack, st.booleans(), properties=properties(PacketType.CONNACK, version)),
        st.builds(
            Subscribe, packet_ids, _some(_subscriptions(version)), properties(PacketType.SUBSCRIBE, version)
        ),
        st.builds(Suback, packet_ids, _some(of(suback)), properties(PacketType.SUBACK, version)),
        st.builds(Unsubscribe, packet_ids, _some(filters), properties(PacketType.UNSUBSCRIBE, version)),
        st.just(Pingreq()),
        st.just(Pingresp()),
    ]
    if version == 4:
        return [*found, st.builds(Unsuback, packet_ids), st.just(Disconnect())]
    unsuback = _some(of(rules._OF_UNSUBACK))
    method = properties(PacketType.AUTH, 5, authentication_method=text)
    return [
        *found,
        st.builds(Unsuback, packet_ids, unsuback, properties(PacketType.UNSUBACK, 5)),
        st.builds(Disconnect, of(rules._OF_DISCONNECT), properties(PacketType.DISCONNECT, 5)),
        st.builds(Auth, of(rules._OF_AUTH), method),
    ]


@cache  # building the strategies costs more than drawing from them
def packets(version):
    return st.one_of(_connects(version), _publishes(version), *_acks(version), *_rest(version))


spoken = st.one_of(*(st.tuples(packets(version), st.just(version)) for version in (4, 5)))


def survives(raw, start, version, max_size=MAX):
    """Decodes what there is; anything but a packet, None or MQTTError fails the test."""
    try:
        return decode(raw, start, version, max_size)
    except MQTTError:
        return None


@given(spoken)
@settings(max_examples=500)
def test_round_trip(packet_and_version):
    packet, version = packet_and_version
    raw = encode(packet, version)
    known = 0 if isinstance(packet, Connect) else version
    assert decode(raw, 0, known, MAX) == (packet, len(raw))
    assert decode(bytearray(raw), 0, known, len(raw)) == (packet, len(raw))
    assert encode(packet, version) == raw


@given(spoken, st.data())
def test_any_part_of_a_packet_is_incomplete(packet_and_version, data):
    packet, version = packet_and_version
    raw = encode(packet, version)
    size = data.draw(st.integers(0, len(raw) - 1))
    assert decode(raw[:size], 0, version, MAX) is None


@given(versions.flatmap(lambda v: st.tuples(st.lists(packets(v), max_size=5), st.just(v))))
def test_a_stream_reads_back_in_order(stream):
    sent, version = stream
    raw = bytearray(b"".join([encode(packet, version) for packet in sent]))
    pos, received = 0, []
    while found := decode(raw, pos, version, MAX):
        packet, pos = found
        received.append(packet)
    assert (received, pos) == (sent, len(raw))


@given(st.binary(max_size=80), st.sampled_from([0, 4, 5]), st.integers(0, 80))
@example(b"", 0, 0)
@example(b"\x10", 0, 0)
@settings(max_examples=1000)
def test_random_bytes_are_survived(raw, version, start):
    survives(raw, start, version)


@given(st.integers(0x10, 0xFF), st.binary(max_size=60), st.sampled_from([0, 4, 5]))
@settings(max_examples=1000)
def test_random_bodies_are_survived(first, body, version):
    survives(bytes((first, len(body))) + body, 0, version)


@given(st.binary(max_size=60), versions)
@settings(max_examples=500)
def test_random_connects_are_survived(body, level):
    body = b"\0\4MQTT" + bytes((level,)) + body
    survives(bytes((0x10, len(body))) + body, 0, 0)


@given(spoken, st.data())
@settings(max_examples=1000)
def test_mutated_packets_are_survived(packet_and_version, data):
    packet, version = packet_and_version
    raw = bytearray(encode(packet, version))
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(raw) - 1))
        raw[index] = data.draw(st.integers(0, 255))
    survives(raw, 0, data.draw(st.sampled_from([0, 4, 5])))


@given(st.binary(max_size=80), st.sampled_from([4, 5]))
@settings(max_examples=1000)
def test_what_decodes_encodes_to_what_decodes_the_same(raw, version):
    found = survives(raw, 0, version)
    if found:
        packet, _ = found
        again = decode(encode(packet, version), 0, version, MAX)
        assert again
        assert again[0] == packet


@given(versions.flatmap(lambda v: st.tuples(_publishes(v), st.just(v))))
def test_publish_frame_is_encode_around_the_packet_id(publish_and_version):
    packet, version = publish_and_version
    for topic in (packet.topic, packet.topic.encode()):
        head, tail = publish_frame(
            topic,
            packet.payload,
            packet.qos,
            version,
            packet.properties,
            retain=packet.retain,
            dup=packet.dup,
        )
        packet_id = packet.packet_id.to_bytes(2, "big") if packet.qos else b""
        assert head + packet_id + tail == encode(packet, version)


@given(st.lists(packet_ids, max_size=20), versions.flatmap(packets), st.integers(0, 3))
def test_puback_run_reads_what_decode_reads(acked, other, cut):
    raw = b"\xff" * 3 + b"".join([encode(Puback(packet_id), 4) for packet_id in acked])
    raw += b"" if isinstance(other, Puback) else encode(other, 5 if isinstance(other, Auth) else 4)
    raw = raw[: max(3, len(raw) - cut)]
    pos, expected = 3, []
    while (found := survives(raw, pos, 4)) and isinstance(found[0], Puback):
        expected.append(found[0].packet_id)
        pos = found[1]
    assert puback_run(raw, 3) == (tuple(expected), pos)
    assert puback_run(bytearray(raw), 3) == (tuple(expected), pos)


@given(st.text(max_size=12))
def test_topic_checks_agree_with_the_decoder(topic):
    assert not (valid_topic_name(topic) and not valid_filter(topic)) or topic.startswith("$share/")
    if valid_topic_name(topic):
        packet = Publish(topic, b"")
        assert decode(encode(packet, 4), 0, 4, MAX)[0] == packet
    if valid_filter(topic):
        packet = Unsubscribe(1, (topic,))
        assert decode(encode(packet, 5), 0, 5, MAX)[0] == packet
