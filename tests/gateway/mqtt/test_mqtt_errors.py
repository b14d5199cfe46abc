"""One row per rule a peer can break: hex, version, error. Each fails the same whole and byte by byte."""

import pytest

from gateway.mqtt import (
    CONNACK_RETURN_CODES,
    FilterInvalid,
    MalformedPacket,
    MQTTError,
    PacketTooLarge,
    ProtocolError,
    Reason,
    TopicAliasInvalid,
    TopicInvalid,
    UnsupportedVersion,
    decode,
)

M, P = MalformedPacket, ProtocolError

HEADER = [
    ("00 00", 4, M),  # packet type 0
    ("f0 00", 4, M),  # type 15 is reserved in 3.1.1
    ("c0 00", 0, P),  # MQTT5-3.1.0-1: the first packet is CONNECT
    ("47 45 54", 0, P),  # GET / HTTP/1.1
    ("16 03 01", 0, P),  # TLS on the plain port
    ("c0 80 80 80 80 01", 4, M),  # five bytes of remaining length
    ("c0 ff ff ff ff", 5, M),
    ("c0 80 00", 5, M),  # MQTT5-1.5.5-1: not the shortest form
    ("30 84 00 0001 74 00", 5, M),
    # MQTT5-2.1.3-1: flags
    *((f"{first:02x} 00", 5, M) for first in (0x11, 0x21, 0x41, 0x52, 0x60, 0x63, 0x6A, 0x71)),
    *((f"{first:02x} 00", 4, M) for first in (0x80, 0x83, 0x91, 0xA0, 0xB8, 0xC1, 0xD1, 0xE2, 0xF1)),
    ("36 05 0001 74 0001", 4, M),  # MQTT5-3.3.1-4: QoS 3
    ("3f 05 0001 74 0001", 5, M),
    ("38 03 0001 74", 4, M),  # MQTT5-3.3.1-2: DUP with QoS 0
    ("39 03 0001 74", 5, M),
]
CONNECT = [
    ("10 0e 00064d5149736470 03 02 003c 0000", 0, UnsupportedVersion),  # MQTT 3.1
    ("10 0c 00044d515454 03 02 003c 0000", 0, UnsupportedVersion),
    ("10 0c 00044d515454 06 02 003c 0000", 0, UnsupportedVersion),
    ("10 0c 00044d515455 04 02 003c 0000", 0, UnsupportedVersion),  # MQTT5-3.1.2-1: "MQTU"
    ("10 0c 00046d717474 05 02 003c 0000", 0, UnsupportedVersion),  # "mqtt"
    ("10 00", 0, M),
    ("10 06 00044d515454", 0, M),
    ("10 07 00044d515454 04", 0, M),
    ("10 09 00044d515454 04 02 00", 0, M),
    ("10 0a 00044d515454 04 02 003c", 0, M),  # MQTT5-3.1.3-3: no client id
    ("10 0a 00044d515454 05 02 003c", 0, M),  # no property length
    ("10 8d00 00044d515454 05 02 003c 00 0000", 0, M),  # MQTT5-1.5.5-1
    ("10 0c 00044d515454 04 03 003c 0000", 0, M),  # MQTT5-3.1.2-3: reserved flag
    ("10 0c 00044d515454 04 0a 003c 0000", 0, M),  # MQTT5-3.1.2-11: will QoS without will
    ("10 0c 00044d515454 04 22 003c 0000", 0, M),  # MQTT5-3.1.2-13: will retain without will
    ("10 12 00044d515454 04 1e 003c 0000 000177 000178", 0, M),  # MQTT5-3.1.2-12: will QoS 3
    ("10 0f 00044d515454 04 42 003c 0000 000170", 0, M),  # MQTT311-3.1.2-22: password alone
    ("10 0c 00044d515454 04 82 003c 0000", 0, M),  # user name flag, no user name
    ("10 0f 00044d515454 04 c2 003c 0000 000161", 0, M),  # password flag, no password
    ("10 0c 00044d515454 04 06 003c 0000", 0, M),  # will flag, no will
    ("10 0d 00044d515454 04 02 003c 0000 00", 0, M),  # one byte too many
    ("10 0d 00044d515454 04 02 003c 0002 61", 0, M),  # client id runs over
    ("10 0d 00044d515454 04 02 003c 0001 ff", 0, M),  # client id is not UTF-8
    ("10 0d 00044d515454 04 02 003c 0001 00", 0, M),  # MQTT5-1.5.4-2
    ("10 0f 00044d515454 04 82 003c 0000 0001 80", 0, M),  # user name is not UTF-8
    ("10 11 00044d515454 04 06 003c 0000 000123 0000", 0, TopicInvalid),  # will topic "#"
    ("10 10 00044d515454 04 06 003c 0000 0000 0000", 0, TopicInvalid),  # will topic ""
]
CONNACK = [
    ("20 02 02 00", 4, M),  # MQTT5-3.2.2-1: reserved flags
    ("20 03 80 00 00", 5, M),
    ("20 02 00 06", 4, P),  # MQTT311 table 3.1 ends at 5
    ("20 03 00 01 00", 5, P),
    ("20 03 00 8d 00", 5, P),  # keep alive timeout is DISCONNECT's
    ("20 02 01 05", 4, P),  # MQTT311-3.2.2-4
    ("20 03 01 87 00", 5, P),  # MQTT5-3.2.2-6
    ("20 00", 4, M),
    ("20 01 00", 4, M),
    ("20 02 00 00", 5, M),  # no property length
    ("20 03 00 00 00", 4, M),
    ("20 04 00 00 00 00", 5, M),
]
PUBLISH = [
    ("30 00", 4, M),
    ("30 01 00", 4, M),
    ("30 03 0002 74", 4, M),  # topic runs over
    ("30 02 0000", 4, TopicInvalid),  # MQTT311-4.7.3-1
    ("30 03 0000 00", 5, P),  # MQTT5-3.3.2.1: no topic, no alias
    ("30 03 0001 2b", 4, TopicInvalid),  # MQTT5-3.3.2-2
    ("30 04 0001 23 00", 5, TopicInvalid),
    ("30 03 0001 00", 4, M),  # MQTT5-1.5.4-2: U+0000
    ("30 03 0001 c0", 4, M),
    ("30 04 0002 c080", 4, M),  # an overlong U+0000
    ("30 05 0003 eda080", 4, M),  # MQTT5-1.5.4-1: a surrogate
    ("30 06 0004 f4908080", 4, M),  # above U+10FFFF
    ("32 03 0001 74", 4, M),  # no packet id
    ("32 04 0001 74 00", 4, M),
    ("32 05 0001 74 0000", 4, P),  # MQTT5-2.2.1-3
    ("34 06 0001 74 0000 00", 5, P),
    ("30 03 0001 74", 5, M),  # no property length
    ("32 05 0001 74 0001", 5, M),
    ("30 05 0001 74 02 01", 5, M),  # properties run over
    ("30 06 0001 74 80 80 80", 5, M),  # property length ends early
    ("30 08 0001 74 80 80 80 80 01", 5, M),
    ("30 05 0001 74 80 00", 5, M),  # property length not in its shortest form
]
ACKS = [
    *((f"{first} 02 0000", version, P) for first in ("40", "50", "62", "70") for version in (4, 5)),
    *((f"{first} 01 00", version, M) for first in ("40", "50", "62", "70") for version in (4, 5)),
    *((f"{first} 00", version, M) for first in ("40", "50", "62", "70") for version in (4, 5)),
    *((f"{first} 03 000a 00", 4, M) for first in ("40", "50", "62", "70")),
    *((f"{first} 03 000a 01", 5, P) for first in ("40", "50", "62", "70")),
    *((f"{first} 03 0000 00", 5, P) for first in ("40", "50", "62", "70")),
    ("40 03 000a 92", 5, P),  # packet identifier not found is PUBREL's
    ("62 03 000a 10", 5, P),
    ("40 04 000a 00 01", 5, M),
    ("40 05 000a 00 00 00", 5, M),
]
SUBSCRIBE = [
    ("82 00", 4, M),
    ("82 02 0001", 4, P),  # MQTT311-3.8.3-3
    ("82 03 0001 00", 5, P),  # MQTT5-3.8.3-2
    ("82 06 0000 0001 74 00", 4, P),
    ("82 07 0000 00 0001 74 00", 5, P),
    ("82 05 0001 0001 74", 4, M),  # no options
    ("82 06 0001 0001 74 03", 4, P),  # MQTT311-3.8.3-4
    ("82 06 0001 0001 74 04", 4, M),
    ("82 06 0001 0001 74 80", 4, M),
    ("82 07 0001 00 0001 74 03", 5, P),  # MQTT5-3.8.3.1: QoS 3
    ("82 07 0001 00 0001 74 30", 5, P),  # retain handling 3
    ("82 07 0001 00 0001 74 40", 5, M),  # MQTT5-3.8.3-5
    ("82 07 0001 00 0001 74 80", 5, M),
    ("82 10 0001 00 000a 2473686172652f672f74 05", 5, P),  # MQTT5-3.8.3-4: $share and No Local
    ("82 05 0001 0000 00", 4, FilterInvalid),  # MQTT5-4.7.3-1
    ("82 07 0001 0002 6123 00", 4, FilterInvalid),  # a#
    ("82 08 0001 00 0002 2b61 00", 5, FilterInvalid),  # +a
    ("82 0e 0001 00 0008 2473686172652f67 00", 5, FilterInvalid),  # $share/g
    ("82 06 0001 0001 ff 00", 4, M),
    ("82 07 0001 0001 74 00 00", 4, M),  # a second filter cut short
    ("90 02 0001", 4, P),
    ("90 03 0001 00", 5, P),
    ("90 03 0001 03", 4, P),
    ("90 03 0001 87", 4, P),  # 3.1.1 has one failure, 0x80
    ("90 04 0001 00 11", 5, P),
    ("90 03 0000 00", 4, P),
]
UNSUBSCRIBE = [
    ("a2 02 0001", 4, P),  # MQTT311-3.10.3-2
    ("a2 03 0001 00", 5, P),  # MQTT5-3.10.3-2
    ("a2 05 0000 0001 74", 4, P),
    ("a2 04 0001 0000", 4, FilterInvalid),
    ("a2 06 0001 0002 2b2b", 4, FilterInvalid),
    ("a2 04 0001 0001", 4, M),
    ("b0 03 0001 00", 4, M),
    ("b0 03 0001 00", 5, P),  # MQTT5-3.11.3-1: no reasons
    ("b0 02 0001", 5, M),
    ("b0 04 0001 00 01", 5, P),
    ("b0 02 0000", 4, P),
]
REST = [
    ("c0 01 00", 4, M),
    ("d0 01 00", 5, M),
    ("e0 01 00", 4, M),
    ("e0 01 01", 5, P),
    ("e0 01 86", 5, P),  # bad user name or password is CONNACK's
    ("e0 02 00 01", 5, M),
    ("e0 03 00 00 00", 5, M),
    ("f0 01 01", 5, P),
    ("f0 01 18", 5, P),  # MQTT5-3.15.2.2.2: no authentication method
    ("f0 02 18 00", 5, P),
    ("f0 06 18 04 16 0001 78", 5, P),  # data without method
]
PROPERTIES = [
    ("30 0a 0001 74 06 21 0001 21 0001", 5, M),  # MQTT5-2.2.2.2: receive maximum in PUBLISH
    ("30 06 0001 74 02 04 00", 5, M),  # no property 4
    ("30 06 0001 74 02 ff 01", 5, M),
    ("30 06 0001 74 02 01 02", 5, P),  # payload format 2
    ("30 08 0001 74 04 01 01 01 01", 5, P),  # MQTT5-3.3.2.3.2: twice
    ("30 07 0001 74 03 23 0000", 5, TopicAliasInvalid),  # MQTT5-3.3.2-8
    ("30 0a 0001 74 06 23 0001 23 0001", 5, P),
    ("30 06 0001 74 02 0b 00", 5, P),  # subscription identifier 0
    ("30 07 0001 74 03 0b 80 00", 5, M),  # MQTT5-1.5.5-1
    ("30 0a 0001 74 06 0b 80 80 80 80 01", 5, M),
    ("30 08 0001 74 04 08 0001 23", 5, TopicInvalid),  # MQTT5-3.3.2-14: response topic "#"
    ("30 07 0001 74 03 08 0000", 5, TopicInvalid),
    ("30 06 0001 74 02 02 00", 5, M),  # four byte integer cut short
    ("30 05 0001 74 01 01", 5, M),
    ("30 08 0001 74 04 03 0002 61", 5, M),  # a string over the end of its section
    ("30 06 0001 74 02 09 00", 5, M),
    ("30 08 0001 74 04 03 0001 00", 5, M),  # U+0000 in a property
    ("30 08 0001 74 04 26 0001 6b", 5, M),  # a name without value
    ("30 0a 0001 74 06 18 00000005 00", 5, M),  # will delay outside a will
    ("20 06 00 00 03 21 0000", 5, P),  # MQTT5-3.2.2.3.3: receive maximum 0
    ("20 08 00 00 05 27 00000000", 5, P),  # maximum packet size 0
    ("20 05 00 00 02 24 02", 5, P),  # maximum QoS 2 is said by silence
    *((f"20 05 00 00 02 {prop} 02", 5, P) for prop in ("25", "28", "29", "2a")),
    ("20 07 00 00 04 16 0001 78", 5, P),  # authentication data without method
    ("20 0d 00 00 0a 11 00000001 11 00000002", 5, P),
    ("20 0b 00 00 08 1f 0001 61 1f 0001 62", 5, P),
    ("82 0b 0001 04 0b 01 0b 02 0001 74 00", 5, P),  # MQTT5-3.8.2.1.2: one identifier
    ("a2 08 0001 02 0b 01 0001 74", 5, M),
    ("40 06 000a 00 02 01 00", 5, M),
    ("e0 04 00 02 13 00", 5, M),
    ("10 10 00044d515454 05 02 0000 03 21 0000 0000", 0, P),
    ("10 12 00044d515454 05 02 0000 05 27 00000000 0000", 0, P),
    ("10 0f 00044d515454 05 02 0000 02 17 02 0000", 0, P),
    ("10 0f 00044d515454 05 02 0000 02 19 ff 0000", 0, P),
    ("10 11 00044d515454 05 02 0000 04 16 0001 78 0000", 0, P),  # MQTT5-3.1.2.11.10
    ("10 10 00044d515454 05 02 0000 03 13 0001 0000", 0, M),  # server keep alive from a client
    ("10 15 00044d515454 05 06 0000 00 0000 02 11 00 0001 77 0001 78", 0, M),  # session expiry in a will
]
ROWS = [*HEADER, *CONNECT, *CONNACK, *PUBLISH, *ACKS, *SUBSCRIBE, *UNSUBSCRIBE, *REST, *PROPERTIES]

REASONS = {
    MalformedPacket: 0x81,
    ProtocolError: 0x82,
    UnsupportedVersion: 0x84,
    FilterInvalid: 0x8F,
    TopicInvalid: 0x90,
    TopicAliasInvalid: 0x94,
    PacketTooLarge: 0x95,
}


@pytest.mark.parametrize(("raw", "version", "error"), ROWS)
def test_broken_rule_is_answered(fail_every_way, raw, version, error):
    raised = fail_every_way(bytes.fromhex(raw), version)
    assert type(raised) is error
    assert raised.reason == REASONS[error]


@pytest.mark.parametrize(("raw", "version", "error"), [row for row in ROWS if len(row[0]) > 5])
def test_a_row_is_one_whole_packet(raw, version, error):
    """The row breaks the rule it is there for, not just its own length."""
    wire = bytes.fromhex(raw)
    if wire[1] < 0x80 and version and error is not UnsupportedVersion:
        assert len(wire) == wire[1] + 2


@pytest.mark.parametrize(
    ("raw", "version"), [(r, 4 if "4d515454 04" in r else 5) for r, _, _ in CONNECT[12:]]
)
def test_error_in_connect_tells_the_version_to_answer_in(fail_every_way, raw, version):
    assert fail_every_way(bytes.fromhex(raw), 0).version == version


def test_error_elsewhere_has_no_version(fail_every_way):
    assert fail_every_way(b"\xc1\0", 5).version == 0
    assert fail_every_way(bytes.fromhex("100c00044d51545406 02003c0000"), 0).version == 0


@pytest.mark.parametrize("raw", ["30 80 80 04", "30 ff ff ff 7f", "10 81 80 04 00"])
@pytest.mark.parametrize("version", [4, 5])
def test_too_large_is_refused_before_the_body_arrives(raw, version):
    with pytest.raises(PacketTooLarge) as raised:
        decode(bytes.fromhex(raw), 0, version, 65_536)
    assert raised.value.reason == Reason.PACKET_TOO_LARGE


def test_max_size_counts_the_fixed_header():
    wire = bytes.fromhex("300500017468 69")
    assert decode(wire, 0, 4, 7) is not None
    with pytest.raises(PacketTooLarge):
        decode(wire, 0, 4, 6)


def test_error_takes_any_reason():
    error = MQTTError("the account is closed", Reason.BANNED)
    assert (error.reason, error.version, str(error)) == (Reason.BANNED, 0, "the account is closed")


def test_every_3_1_1_return_code_has_a_reason():
    assert set(CONNACK_RETURN_CODES.values()) == set(range(6))


def test_reason_names_are_those_of_the_specification():
    assert len(Reason) == 43  # table 2-6 has 43 values, three of them shared by 0x00
    assert Reason.NORMAL_DISCONNECTION is Reason.GRANTED_QOS_0 is Reason.SUCCESS
