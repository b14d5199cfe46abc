"""Against an encoder that is not ours: what paho-mqtt emits, we read; its property codec and ours agree."""

import re

import paho.mqtt.client as paho
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from gateway.mqtt import (
    Connect,
    Disconnect,
    Pingreq,
    Puback,
    Publish,
    Pubrel,
    Reason,
    Subscribe,
    Subscription,
    Unsubscribe,
    Will,
    decode,
    encode,
)
from gateway.mqtt import codec as rules
from gateway.mqtt.properties import decode_properties, encode_properties
from gateway.mqtt.wire import PacketType

LEVELS = {4: paho.MQTTv311, 5: paho.MQTTv5}


class Paho(paho.Client):
    """A client whose packets end in a list instead of a socket."""

    def __init__(self, version, **options):
        super().__init__(paho.CallbackAPIVersion.VERSION2, "d", protocol=LEVELS[version], **options)
        self.sent = []
        self._sock = self  # "connected"

    def _packet_queue(self, command, packet, mid, qos, info=None):
        self.sent.append(bytes(packet))
        return paho.MQTT_ERR_SUCCESS

    def fileno(self):
        return -1

    def close(self):
        pass

    def read_last(self, version):
        packet, end = decode(self.sent[-1], 0, version, 10_000)
        assert end == len(self.sent[-1])
        assert encode(packet, version) == self.sent[-1]
        return packet


@pytest.fixture(params=[4, 5])
def version(request):
    return request.param


@pytest.fixture
def client(version):
    found = Paho(version)
    yield found
    found._sock = None


def test_connect(client, version):
    client.username_pw_set("app", "token")
    client.will_set("gone", b"d", 1, True)
    client._send_connect(300)
    will = Will("gone", b"d", 1, True)
    clean = version == 5 or client._clean_session
    assert client.read_last(version) == Connect("d", clean, 300, "app", b"token", will, version)


@pytest.mark.parametrize("qos", [0, 1, 2])
@pytest.mark.parametrize("size", [0, 100, 200])
def test_publish(client, version, qos, size):
    client._send_publish(7, b"a/b", bytes(size), qos, retain=True, dup=qos > 0)
    assert client.read_last(version) == Publish("a/b", bytes(size), qos, True, qos > 0, 7 if qos else 0)


def test_subscribe_and_unsubscribe(client, version):
    if version == 5:
        client.subscribe("a/+", options=SubscribeOptions(1, True, True, 2))
        expected = Subscription("a/+", 1, True, True, 2)
    else:
        client.subscribe("a/+", 1)
        expected = Subscription("a/+", 1)
    assert client.read_last(version) == Subscribe(1, (expected,))
    client.unsubscribe(["a/+", "#"])
    assert client.read_last(version) == Unsubscribe(2, ("a/+", "#"))


def test_acks_ping_and_disconnect(client, version):
    client._send_puback(9)
    assert client.read_last(version) == Puback(9)
    client._send_pubrel(9)
    assert client.read_last(version) == Pubrel(9)
    client._send_pingreq()
    assert client.read_last(version) == Pingreq()
    client._send_disconnect()
    assert client.read_last(version) == Disconnect()


SECTIONS = [
    (
        PacketType.CONNACK,
        PacketTypes.CONNACK,
        {
            "session_expiry_interval": 4_294_967_295,
            "assigned_client_identifier": "é🙂",
            "server_keep_alive": 65_535,
            "receive_maximum": 1,
            "topic_alias_maximum": 10,
            "maximum_qos": 1,
            "retain_available": 0,
            "maximum_packet_size": 65_536,
            "wildcard_subscription_available": 1,
            "subscription_identifier_available": 0,
            "shared_subscription_available": 1,
            "response_information": "r",
            "server_reference": "a:1 b:2",
            "reason_string": "",
            "authentication_method": "m",
            "authentication_data": b"\0\xff",
        },
    ),
    (
        PacketType.CONNECT,
        PacketTypes.CONNECT,
        {"request_problem_information": 0, "request_response_information": 1, "session_expiry_interval": 0},
    ),
    (PacketType.WILL, PacketTypes.WILLMESSAGE, {"will_delay_interval": 30, "content_type": "json"}),
    (
        PacketType.PUBLISH,
        PacketTypes.PUBLISH,
        {
            "payload_format_indicator": 1,
            "message_expiry_interval": 3600,
            "response_topic": "a/b",
            "correlation_data": b"\0\1",
            "topic_alias": 5,
            "user_properties": (("k", "v"), ("k", "w")),
            "subscription_identifiers": (1, 268_435_455),
        },
    ),
    (PacketType.SUBSCRIBE, PacketTypes.SUBSCRIBE, {"subscription_identifiers": (16_384,)}),
    (PacketType.DISCONNECT, PacketTypes.DISCONNECT, {"reason_string": "x" * 200}),
]

OTHER_NAMES = {"user_properties": "UserProperty", "subscription_identifiers": "SubscriptionIdentifier"}


def _paho_name(name):
    camel = "".join(part.capitalize() for part in name.split("_"))
    return OTHER_NAMES.get(name, camel.replace("Qos", "QoS"))


@pytest.mark.parametrize(("packet", "paho_packet", "properties"), SECTIONS)
def test_property_sections_agree(packet, paho_packet, properties):
    theirs = PahoProperties(paho_packet)
    for name, value in properties.items():
        for item in value if isinstance(value, tuple) else (value,):
            setattr(theirs, _paho_name(name), item)
    raw = theirs.pack()
    start = 1 if raw[0] < 0x80 else 2
    assert decode_properties(raw[start:], packet) == properties
    ours = PahoProperties(paho_packet)
    ours.unpack(encode_properties(properties, packet))
    assert ours.json() == theirs.json()


REASONS = [
    (PacketTypes.CONNACK, rules._OF_CONNACK),
    (PacketTypes.PUBACK, rules._OF_PUBACK),
    (PacketTypes.PUBREC, rules._OF_PUBACK),
    (PacketTypes.PUBREL, rules._OF_PUBREL),
    (PacketTypes.PUBCOMP, rules._OF_PUBREL),
    (PacketTypes.SUBACK, rules._OF_SUBACK),
    (PacketTypes.UNSUBACK, rules._OF_UNSUBACK),
    (PacketTypes.DISCONNECT, rules._OF_DISCONNECT),
    (PacketTypes.AUTH, rules._OF_AUTH),
]


@pytest.mark.parametrize(("paho_packet", "reasons"), REASONS)
def test_reason_codes_of_each_packet_agree(paho_packet, reasons):
    names = ReasonCode(PacketTypes.CONNACK, "Success").names
    theirs = {code for code, kinds in names.items() for packets in kinds.values() if paho_packet in packets}
    if paho_packet == PacketTypes.CONNACK:
        theirs.add(Reason.PAYLOAD_FORMAT_INVALID)  # MQTT5-3.2.2.2 has it, for the will; paho does not
    assert theirs == set(reasons)


def test_reason_names_agree():
    names = ReasonCode(PacketTypes.CONNACK, "Success").names
    own = {0x11, 0x9E, 0xA2}  # named by paho in words that are not the specification's
    for code in set(names) - own:
        ours = {name for name, reason in Reason.__members__.items() if reason == code}
        assert {re.sub(r"\W", "_", name).upper() for name in names[code]} == ours
