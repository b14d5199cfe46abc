"""One row per shape of packet: hex, packet, version. Each is read in every way and written back."""

import pytest

from gateway.mqtt import (
    Auth,
    Connack,
    Connect,
    Disconnect,
    Pingreq,
    Pingresp,
    Puback,
    Pubcomp,
    Publish,
    Pubrec,
    Pubrel,
    Reason,
    Suback,
    Subscribe,
    Subscription,
    Unsuback,
    Unsubscribe,
    Will,
    decode,
    encode,
)

USER = {"user_properties": (("k", "v"), ("k", "w"))}
USER_HEX = "2600016b000176 2600016b000177"

ROWS = [
    # CONNECT: "MQTT", level, flags, keep alive
    ("10 0c 00044d515454 04 02 003c 0000", Connect("", True, 60, version=4), 4),
    ("10 0c 00044d515454 04 00 0000 0000", Connect("", False, 0, version=4), 4),  # the caller refuses it
    ("10 0d 00044d515454 84 02 003c 0001 62", Connect("b", True, 60, version=4, bridge=True), 4),
    (
        "10 15 00044d515454 04 c0 012c 000164 000161 0003746f6b",
        Connect("d", False, 300, "a", b"tok", version=4),
        4,
    ),
    ("10 10 00044d515454 04 82 0000 000164 0001 61", Connect("d", True, 0, "a", version=4), 4),
    (
        "10 14 00044d515454 04 36 000a 000164 000177 0002 6279",
        Connect("d", True, 10, will=Will("w", b"by", 2, True), version=4),
        4,
    ),
    (
        "10 1a 00044d515454 04 ee 000a 000164 000177 0000 000161 0003 00ff00",
        Connect("d", True, 10, "a", b"\0\xff\0", Will("w", b"", 1, True), version=4),
        4,
    ),
    ("10 0d 00044d515454 05 02 003c 00 0000", Connect("", True, 60), 5),
    ("10 10 00044d515454 05 42 0000 00 0000 000170", Connect("", password=b"p"), 5),  # no user name
    (
        "10 1b 00044d515454 05 00 ffff 0d 11 0000000a 21 0014 27 00000400 0001 64",
        Connect(
            "d",
            False,
            65535,
            properties={"session_expiry_interval": 10, "receive_maximum": 20, "maximum_packet_size": 1024},
        ),
        5,
    ),
    (
        "10 36 00044d515454 05 2e 0000"
        " 17 15 0001 78 16 0002 797a 17 00 19 01 22 0003 26 0001 6b 0001 76"
        " 0001 64 0b 01 01 18 00000005 08 0001 72 0001 77 0000",
        Connect(
            "d",
            will=Will(
                "w",
                b"",
                1,
                True,
                {"payload_format_indicator": 1, "will_delay_interval": 5, "response_topic": "r"},
            ),
            properties={
                "authentication_method": "x",
                "authentication_data": b"yz",
                "request_problem_information": 0,
                "request_response_information": 1,
                "topic_alias_maximum": 3,
                "user_properties": (("k", "v"),),
            },
        ),
        5,
    ),
    # CONNACK
    ("20 02 00 00", Connack(), 4),
    ("20 02 01 00", Connack(True), 4),
    ("20 02 00 01", Connack(False, Reason.UNSUPPORTED_PROTOCOL_VERSION), 4),
    ("20 02 00 02", Connack(False, Reason.CLIENT_IDENTIFIER_NOT_VALID), 4),
    ("20 02 00 03", Connack(False, Reason.SERVER_UNAVAILABLE), 4),
    ("20 02 00 04", Connack(False, Reason.BAD_USER_NAME_OR_PASSWORD), 4),
    ("20 02 00 05", Connack(False, Reason.NOT_AUTHORIZED), 4),
    ("20 03 00 00 00", Connack(), 5),
    ("20 03 01 00 00", Connack(True), 5),
    ("20 09 00 9d 06 1c 0003 622e63", Connack(False, Reason.SERVER_MOVED, {"server_reference": "b.c"}), 5),
    (
        "20 0e 00 00 0b 13 003c 24 00 25 01 28 00 2a 01",
        Connack(
            properties={
                "server_keep_alive": 60,
                "maximum_qos": 0,
                "retain_available": 1,
                "wildcard_subscription_available": 0,
                "shared_subscription_available": 1,
            }
        ),
        5,
    ),
    # PUBLISH
    ("30 03 0001 74", Publish("t", b""), 4),
    ("30 05 0001 74 6869", Publish("t", b"hi"), 4),
    ("31 05 0001 74 6869", Publish("t", b"hi", retain=True), 4),
    ("32 07 0001 74 000a 6869", Publish("t", b"hi", 1, packet_id=10), 4),
    ("3a 07 0001 74 ffff 6869", Publish("t", b"hi", 1, dup=True, packet_id=65535), 4),
    ("3d 05 0001 74 0001", Publish("t", b"", 2, True, True, 1), 4),
    ("30 05 0003 efbbbf", Publish("\ufeff", b""), 4),  # MQTT5-1.5.4-3: U+FEFF stays
    ("30 04 0002 011f", Publish("\x01\x1f", b""), 4),  # control characters are let through
    ("30 04 0001 74 00", Publish("t", b""), 5),
    ("32 08 0001 74 000a 00 6869", Publish("t", b"hi", 1, packet_id=10), 5),
    ("30 06 0000 03 23 0007", Publish("", b"", properties={"topic_alias": 7}), 5),
    (
        f"30 16 0001 74 10 0b 05 {USER_HEX} 7878",
        Publish("t", b"xx", properties={"subscription_identifiers": (5,), **USER}),
        5,
    ),
    (
        "34 21 0001 74 0001 1b 01 01 02 00000e10 03 0001 6a 08 0001 72 09 0002 00ff 0b 05 0b ffffff7f",
        Publish(
            "t",
            b"",
            2,
            packet_id=1,
            properties={
                "payload_format_indicator": 1,
                "message_expiry_interval": 3600,
                "content_type": "j",
                "response_topic": "r",
                "correlation_data": b"\0\xff",
                "subscription_identifiers": (5, 268_435_455),
            },
        ),
        5,
    ),
    # acknowledgements
    ("40 02 000a", Puback(10), 4),
    ("50 02 000a", Pubrec(10), 4),
    ("62 02 000a", Pubrel(10), 4),
    ("70 02 000a", Pubcomp(10), 4),
    ("40 02 ffff", Puback(65535), 5),
    ("40 03 000a 10", Puback(10, Reason.NO_MATCHING_SUBSCRIBERS), 5),
    ("50 03 000a 97", Pubrec(10, Reason.QUOTA_EXCEEDED), 5),
    ("62 03 000a 92", Pubrel(10, Reason.PACKET_IDENTIFIER_NOT_FOUND), 5),
    ("70 03 000a 92", Pubcomp(10, Reason.PACKET_IDENTIFIER_NOT_FOUND), 5),
    ("40 08 000a 80 04 1f 0001 6e", Puback(10, Reason.UNSPECIFIED_ERROR, {"reason_string": "n"}), 5),
    ("50 08 000a 00 04 1f 0001 6e", Pubrec(10, properties={"reason_string": "n"}), 5),
    (f"62 12 000a 00 0e {USER_HEX}", Pubrel(10, properties=USER), 5),
    (f"70 12 000a 00 0e {USER_HEX}", Pubcomp(10, properties=USER), 5),
    # SUBSCRIBE, SUBACK
    ("82 06 0001 0001 74 01", Subscribe(1, (Subscription("t", 1),)), 4),
    (
        "82 0c 0001 0003 612f2b 02 0001 23 00",
        Subscribe(1, (Subscription("a/+", 2), Subscription("#"))),
        4,
    ),
    (
        "82 09 0001 02 0b05 0001 74 2e",
        Subscribe(1, (Subscription("t", 2, True, True, 2),), {"subscription_identifiers": (5,)}),
        5,
    ),
    (
        "82 11 0001 00 000b 2473686172652f672f742f 11",
        Subscribe(1, (Subscription("$share/g/t/", 1, retain_handling=1),)),
        5,
    ),
    (
        "90 06 0001 00 01 02 80",
        Suback(1, (Reason.SUCCESS, Reason.GRANTED_QOS_1, Reason.GRANTED_QOS_2, Reason.UNSPECIFIED_ERROR)),
        4,
    ),
    ("90 05 0001 00 01 87", Suback(1, (Reason.GRANTED_QOS_1, Reason.NOT_AUTHORIZED)), 5),
    ("90 08 0001 04 1f 0001 6e a2", Suback(1, (Reason(0xA2),), {"reason_string": "n"}), 5),
    # UNSUBSCRIBE, UNSUBACK
    ("a2 08 0001 0001 74 0001 2b", Unsubscribe(1, ("t", "+")), 4),
    ("a2 06 0001 00 0001 74", Unsubscribe(1, ("t",)), 5),
    (f"a2 14 0001 0e {USER_HEX} 0001 74", Unsubscribe(1, ("t",), USER), 5),
    ("b0 02 0001", Unsuback(1), 4),
    ("b0 05 0001 00 00 11", Unsuback(1, (Reason.SUCCESS, Reason.NO_SUBSCRIPTION_EXISTED)), 5),
    # the rest
    ("c0 00", Pingreq(), 4),
    ("c0 00", Pingreq(), 5),
    ("d0 00", Pingresp(), 4),
    ("d0 00", Pingresp(), 5),
    ("e0 00", Disconnect(), 4),
    ("e0 00", Disconnect(), 5),
    ("e0 01 8e", Disconnect(Reason.SESSION_TAKEN_OVER), 5),
    ("e0 01 04", Disconnect(Reason.DISCONNECT_WITH_WILL_MESSAGE), 5),
    ("e0 07 00 05 11 00000000", Disconnect(properties={"session_expiry_interval": 0}), 5),
    ("e0 08 9c 06 1c 0003 622e63", Disconnect(Reason.USE_ANOTHER_SERVER, {"server_reference": "b.c"}), 5),
    ("f0 00", Auth(), 5),
    ("f0 06 18 04 15 0001 78", Auth(Reason.CONTINUE_AUTHENTICATION, {"authentication_method": "x"}), 5),
    (
        "f0 0a 19 08 15 0001 78 16 0001 00",
        Auth(Reason.RE_AUTHENTICATE, {"authentication_method": "x", "authentication_data": b"\0"}),
        5,
    ),
]


@pytest.mark.parametrize(("raw", "packet", "version"), ROWS)
def test_row_reads_and_writes(read_every_way, raw, packet, version):
    wire = bytes.fromhex(raw)
    assert read_every_way(wire, 0 if isinstance(packet, Connect) else version) == packet
    assert encode(packet, version) == wire


# Read, but written shorter.
LENIENT = [
    ("10 8c00 00044d515454 04 02 003c 0000", Connect("", True, 60, version=4), 0),  # padded length, 3.1.1
    ("c0 80 00", Pingreq(), 4),
    ("30 83 80 80 00 0001 74", Publish("t", b""), 4),
    ("40 03 000a 00", Puback(10), 5),
    ("40 04 000a 00 00", Puback(10), 5),
    ("62 04 000a 92 00", Pubrel(10, Reason.PACKET_IDENTIFIER_NOT_FOUND), 5),
    ("e0 01 00", Disconnect(), 5),
    ("e0 02 8e 00", Disconnect(Reason.SESSION_TAKEN_OVER), 5),
    ("a2 06 0001 00 0001 74", Unsubscribe(1, ("t",)), 5),
]


@pytest.mark.parametrize(("raw", "packet", "version"), LENIENT)
def test_longer_spelling_reads_the_same(read_every_way, raw, packet, version):
    wire = bytes.fromhex(raw)
    assert read_every_way(wire, version) == packet
    assert decode(encode(packet, version or 4), 0, version, 1 << 20)[0] == packet


# What 3.1.1 has no place for is left out; b"" where all it can do is close.
NARROWED = [
    (Puback(10, Reason.QUOTA_EXCEEDED, {"reason_string": "n"}), "40 02 000a"),
    (Publish("t", b"x", properties={"content_type": "j"}), "30 04 0001 74 78"),
    (Subscribe(1, (Subscription("t", 1, True, True, 2),), USER), "82 06 0001 0001 74 01"),
    (Suback(1, (Reason.NOT_AUTHORIZED, Reason.GRANTED_QOS_1)), "90 04 0001 80 01"),
    (Unsuback(1, (Reason.SUCCESS,)), "b0 02 0001"),
    (Connack(False, Reason.BANNED), "20 02 00 05"),
    (Connack(False, Reason.SERVER_BUSY, {"reason_string": "n"}), "20 02 00 03"),
    (Connack(False, Reason.MALFORMED_PACKET), ""),
    (Disconnect(Reason.SESSION_TAKEN_OVER), ""),
    (Disconnect(Reason.DISCONNECT_WITH_WILL_MESSAGE), ""),
]


@pytest.mark.parametrize(("packet", "raw"), NARROWED)
def test_what_3_1_1_cannot_say_is_left_out(packet, raw):
    assert encode(packet, 4) == bytes.fromhex(raw)


MISUSE = [
    (Publish("t", b"", 1), 4),  # no packet id
    (Publish("t", b"", 0, packet_id=1), 4),
    (Publish("t", b"", 3, packet_id=1), 4),
    (Publish("t", b"", 0, dup=True), 4),
    (Publish("t/+", b""), 4),
    (Publish("", b""), 5),
    (Publish("x" * 65_536, b""), 5),
    (Publish("t", b"", properties={"receive_maximum": 1}), 5),
    (Publish("t", b"", 1, packet_id=65_536), 4),
    (Puback(0), 4),
    (Puback(65_536), 5),
    (Puback(1, Reason.SESSION_TAKEN_OVER), 5),
    (Subscribe(1, ()), 4),
    (Subscribe(1, (Subscription("a#"),)), 5),
    (Subscribe(1, (Subscription("t", 3),)), 5),
    (Subscribe(1, (Subscription("t", retain_handling=3),)), 5),
    (Subscribe(1, (Subscription("$share/g/t", no_local=True),)), 5),
    (Subscribe(1, (Subscription("t"),), {"subscription_identifiers": (1, 2)}), 5),
    (Suback(1, ()), 5),
    (Suback(1, (Reason.BANNED,)), 4),
    (Unsubscribe(1, ()), 4),
    (Unsuback(1, ()), 5),
    (Connect("d", password=b"p", version=4), 4),
    (Connect("d", version=3), 4),
    (Connect("d", keep_alive=65_536), 5),
    (Connect("d\0"), 5),
    (Connect("d", will=Will("#", b"")), 5),
    (Connect("d", will=Will("w", b"", 3)), 5),
    (Connack(True, Reason.BANNED), 5),
    (Connack(False, Reason.KEEP_ALIVE_TIMEOUT), 5),
    (Disconnect(Reason.GRANTED_QOS_1), 5),
    (Auth(), 4),
    (Auth(Reason.BANNED), 5),
]


@pytest.mark.parametrize(("packet", "version"), MISUSE)
def test_our_own_misuse_is_an_assertion(packet, version):
    with pytest.raises((AssertionError, OverflowError)):
        encode(packet, version)
