"""Where the fuzzer begins: good packets of all kinds, and lives of clients."""

from __future__ import annotations

from typing import Final

from gateway.mqtt import (
    Auth,
    Connack,
    Connect,
    Disconnect,
    Packet,
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
    encode,
)
from tests.fuzz.targets import step

PACKETS: Final[tuple[Packet, ...]] = (
    Publish("a", b"x"),
    Publish("a/b", b"x", 1, packet_id=1),
    Publish("a/b", b"x", 2, True, True, packet_id=2),
    Puback(1),
    Pubrec(1),
    Pubrel(1),
    Pubcomp(1),
    Subscribe(3, (Subscription("a/+", 1), Subscription("#", 2))),
    Suback(3, (Reason.GRANTED_QOS_1, Reason.UNSPECIFIED_ERROR)),
    Unsubscribe(4, ("a/+", "b")),
    Pingreq(),
    Pingresp(),
    Disconnect(),
    Connack(),
)
ONLY_5: Final[tuple[Packet, ...]] = (
    Publish("", b"x", 1, packet_id=1, properties={"topic_alias": 1}),
    Publish(
        "a",
        b"x",
        2,
        packet_id=1,
        properties={
            "payload_format_indicator": 1,
            "message_expiry_interval": 9,
            "content_type": "t",
            "response_topic": "r",
            "correlation_data": b"c",
            "user_properties": (("k", "v"), ("k", "w")),
            "topic_alias": 1,
        },
    ),
    Puback(1, Reason.QUOTA_EXCEEDED, {"reason_string": "no", "user_properties": (("k", "v"),)}),
    Pubrec(1, Reason.QUOTA_EXCEEDED),
    Pubrel(1, Reason.PACKET_IDENTIFIER_NOT_FOUND),
    Subscribe(
        5, (Subscription("$share/g/a/#", 1, False, True, 2),), {"subscription_identifiers": (268_435_455,)}
    ),
    Subscribe(6, (Subscription("a", 2, True, True, 1),), {"user_properties": (("k", "v"),)}),
    Unsuback(4, (Reason.SUCCESS, Reason.NO_SUBSCRIPTION_EXISTED)),
    Disconnect(Reason.DISCONNECT_WITH_WILL_MESSAGE, {"session_expiry_interval": 9, "reason_string": "bye"}),
    Auth(Reason.CONTINUE_AUTHENTICATION, {"authentication_method": "X", "authentication_data": b"y"}),
    Connack(
        True,
        Reason.SUCCESS,
        {
            "session_expiry_interval": 1,
            "receive_maximum": 2,
            "maximum_qos": 1,
            "retain_available": 0,
            "maximum_packet_size": 3,
            "assigned_client_identifier": "x",
            "topic_alias_maximum": 4,
            "wildcard_subscription_available": 1,
            "shared_subscription_available": 0,
            "server_keep_alive": 5,
            "response_information": "r",
            "server_reference": "s",
        },
    ),
)
CONNECTS: Final = (
    Connect("x", version=4),
    Connect("x", False, 9, "app", b"secret", Will("a", b"x", 2, True), 4),
    Connect("x", version=5),
    Connect(
        "x",
        False,
        9,
        "app",
        b"secret",
        Will("a", b"x", 1, properties={"will_delay_interval": 3, "payload_format_indicator": 1}),
        5,
        {
            "session_expiry_interval": 9,
            "receive_maximum": 1,
            "maximum_packet_size": 99,
            "topic_alias_maximum": 3,
            "request_problem_information": 0,
            "request_response_information": 1,
            "user_properties": (("k", "v"),),
            "authentication_method": "SCRAM-SHA-256",
            "authentication_data": b"n,,n=app,r=nonce",
        },
    ),
)


def of(target: str) -> list[bytes]:
    match target:
        case "codec":
            return _codec()
        case "websocket":
            return _websocket()
        case _:
            return _node()


def _of_version(version: int) -> list[bytes]:
    return [encode(packet, version) for packet in (*PACKETS, *(ONLY_5 if version == 5 else ()))]


def _codec() -> list[bytes]:
    seeds = [b"\0" + encode(connect, connect.version) for connect in CONNECTS]
    for choice, version in ((1, 4), (2, 5)):
        seeds += [bytes((choice,)) + raw for raw in _of_version(version)]
        seeds.append(bytes((choice,)) + b"".join(_of_version(version)))
    return [*seeds, b"\x01" + encode(Puback(7), 4) * 5]


def _websocket() -> list[bytes]:
    frames = (
        b"\x82\x81\0\0\0\0a",
        b"\x02\x81\x01\x02\x03\x04a\x80\x80\0\0\0\0",
        b"\x89\x80\0\0\0\0",
        b"\x8a\x81\0\0\0\0a",
        b"\x82\xfe\x00\x7e\0\0\0\0" + bytes(126),
        b"\x88\x82\0\0\0\0\x03\xe8",
    )
    seeds = [bytes((mode, cut)) + frame for mode in (2, 3) for cut in (0, 7) for frame in frames]
    seeds += [bytes((3, 1)) + b"".join(frames)]
    head = b"GET /mqtt?q HTTP/1.1\r\nHost: x:1\r\nOrigin: http://x\r\n\r\n"
    return [*seeds, b"\x00\x05" + head]


def _node() -> list[bytes]:
    """Connect, then one packet; or a conversation between two."""
    seeds = [step(0, who, encode(connect, connect.version)) for who in (0, 2) for connect in CONNECTS]
    for number, version in ((0, 5), (1, 4), (4, 5), (60, 5)):
        ready = step(2, 0, bytes((number,))) + step(5, 0)
        seeds += [ready + step(0, 0, raw) + step(5, 0) for raw in _of_version(version)]
        other = step(2, 2, bytes((number,))) + step(5, 0)
        talk = [step(0, 2 if n % 3 else 0, raw) + step(5, 0) for n, raw in enumerate(_of_version(version))]
        seeds += [
            ready + other + step(0, 0, encode(Subscribe(1, (Subscription("#", 2),)), version)) + one
            for one in talk
        ]
        seeds.append(
            ready
            + step(0, 0, encode(Subscribe(1, (Subscription("a/#", 2),)), version))
            + step(5, 0)
            + step(3, 0)
            + other
            + step(0, 2, encode(Publish("a", b"x", 2, packet_id=1), version))
            + step(7, 0, b"\x02\x07")
            + step(5, 0)
            + step(2, 0, bytes((number & ~2,)))
            + step(5, 0)
        )
    return seeds
