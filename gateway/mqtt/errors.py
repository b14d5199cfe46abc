"""What goes wrong on the wire, and what the peer is told about it.

An incomplete packet is no error. A wrong one raises an `MQTTError`; its `reason` is what CONNACK or
DISCONNECT carries. Misuse by our own code (a packet id of 0, a property in the wrong packet) is an
`AssertionError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Final


class Reason(IntEnum):
    """The MQTT 5 reason codes under their names in the specification (section 2.4)."""

    SUCCESS = 0x00
    NORMAL_DISCONNECTION = 0x00
    GRANTED_QOS_0 = 0x00
    GRANTED_QOS_1 = 0x01
    GRANTED_QOS_2 = 0x02
    DISCONNECT_WITH_WILL_MESSAGE = 0x04
    NO_MATCHING_SUBSCRIBERS = 0x10
    NO_SUBSCRIPTION_EXISTED = 0x11
    CONTINUE_AUTHENTICATION = 0x18
    RE_AUTHENTICATE = 0x19
    UNSPECIFIED_ERROR = 0x80
    MALFORMED_PACKET = 0x81
    PROTOCOL_ERROR = 0x82
    IMPLEMENTATION_SPECIFIC_ERROR = 0x83
    UNSUPPORTED_PROTOCOL_VERSION = 0x84
    CLIENT_IDENTIFIER_NOT_VALID = 0x85
    BAD_USER_NAME_OR_PASSWORD = 0x86
    NOT_AUTHORIZED = 0x87
    SERVER_UNAVAILABLE = 0x88
    SERVER_BUSY = 0x89
    BANNED = 0x8A
    SERVER_SHUTTING_DOWN = 0x8B
    BAD_AUTHENTICATION_METHOD = 0x8C
    KEEP_ALIVE_TIMEOUT = 0x8D
    SESSION_TAKEN_OVER = 0x8E
    TOPIC_FILTER_INVALID = 0x8F
    TOPIC_NAME_INVALID = 0x90
    PACKET_IDENTIFIER_IN_USE = 0x91
    PACKET_IDENTIFIER_NOT_FOUND = 0x92
    RECEIVE_MAXIMUM_EXCEEDED = 0x93
    TOPIC_ALIAS_INVALID = 0x94
    PACKET_TOO_LARGE = 0x95
    MESSAGE_RATE_TOO_HIGH = 0x96
    QUOTA_EXCEEDED = 0x97
    ADMINISTRATIVE_ACTION = 0x98
    PAYLOAD_FORMAT_INVALID = 0x99
    RETAIN_NOT_SUPPORTED = 0x9A
    QOS_NOT_SUPPORTED = 0x9B
    USE_ANOTHER_SERVER = 0x9C
    SERVER_MOVED = 0x9D
    SHARED_SUBSCRIPTIONS_NOT_SUPPORTED = 0x9E
    CONNECTION_RATE_EXCEEDED = 0x9F
    MAXIMUM_CONNECT_TIME = 0xA0
    SUBSCRIPTION_IDENTIFIERS_NOT_SUPPORTED = 0xA1
    WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED = 0xA2


class MQTTError(Exception):
    """The peer broke a rule. `reason` is what it is told; `version` is what the faulty CONNECT asked for (0
    when it was no CONNECT, or did not get that far), so that the CONNACK can be written in it."""

    reason: Reason = Reason.UNSPECIFIED_ERROR
    version: int = 0

    def __init__(self, message: str, reason: Reason | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class MalformedPacket(MQTTError):
    """The bytes cannot be read as the packet they claim to be."""

    reason = Reason.MALFORMED_PACKET


class ProtocolError(MQTTError):
    """Readable, but not allowed here or with this value."""

    reason = Reason.PROTOCOL_ERROR


class UnsupportedVersion(MQTTError):
    """Neither 3.1.1 nor 5. Answer in 3.1.1's shape, which every version's client reads (MQTT311-3.1.2-2)."""

    reason = Reason.UNSUPPORTED_PROTOCOL_VERSION


class PacketTooLarge(MQTTError):
    """The fixed header announces more than we accept; raised before the body arrives."""

    reason = Reason.PACKET_TOO_LARGE


class TopicInvalid(MQTTError):
    """A topic name that is empty or holds a wildcard."""

    reason = Reason.TOPIC_NAME_INVALID


class FilterInvalid(TopicInvalid):
    """A topic filter with a wildcard out of place, or a `$share` without group or filter."""

    reason = Reason.TOPIC_FILTER_INVALID


class TopicAliasInvalid(MQTTError):
    """Topic alias 0 (MQTT5-3.3.2-8); an alias over the maximum is the session's to see."""

    reason = Reason.TOPIC_ALIAS_INVALID


# What a 3.1.1 client is told for a v5 CONNACK reason (MQTT311 table 3.1). The first reason of a code is its
# name when a 3.1.1 CONNACK is read. A reason not here has no code: close without CONNACK (MQTT311-3.2.2-6).
CONNACK_RETURN_CODES: Final[Mapping[Reason, int]] = MappingProxyType(
    {
        Reason.SUCCESS: 0,
        Reason.UNSUPPORTED_PROTOCOL_VERSION: 1,
        Reason.CLIENT_IDENTIFIER_NOT_VALID: 2,
        Reason.SERVER_UNAVAILABLE: 3,
        Reason.UNSPECIFIED_ERROR: 3,
        Reason.IMPLEMENTATION_SPECIFIC_ERROR: 3,
        Reason.SERVER_BUSY: 3,
        Reason.SERVER_SHUTTING_DOWN: 3,
        Reason.QUOTA_EXCEEDED: 3,
        Reason.USE_ANOTHER_SERVER: 3,
        Reason.SERVER_MOVED: 3,
        Reason.CONNECTION_RATE_EXCEEDED: 3,
        Reason.BAD_USER_NAME_OR_PASSWORD: 4,
        Reason.NOT_AUTHORIZED: 5,
        Reason.BANNED: 5,
        Reason.BAD_AUTHENTICATION_METHOD: 5,
    }
)
