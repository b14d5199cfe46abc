"""docs/protocol.md names every refusal, every end of a connection and every limit there is, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from broker.carriers.catalog import LINKS, Carriers
from broker.config import KEYS, Config
from broker.limits import Limits
from broker.model import StoredMessage
from gateway import admission, arrivals, connection, gate, handover, intake, node, proxy_listener, session
from gateway.connection import NOT_IN_ORDER
from gateway.doorkeeper import TurnedAway
from gateway.hub import BACKLOG
from gateway.live import encoding, render
from gateway.mqtt import (
    CONNACK_RETURN_CODES,
    MQTTError,
    PacketTooLarge,
    Reason,
    UnsupportedVersion,
)
from gateway.node import NodeSettings
from gateway.server import _node_settings
from gateway.tls import Refusal as TlsRefusal
from gateway.websocket import MAX_FIRST_FRAME_SIZE, MAX_HANDSHAKE_SIZE
from gateway.websocket import Refusal as WebSocketRefusal

PAGE = (Path(__file__).parents[2] / "docs/protocol.md").read_text()
MODULES = (admission, arrivals, connection, handover, intake, node, proxy_listener)
SOURCES = [Path(str(module.__file__)) for module in MODULES]
NOT_A_LIMIT = {
    "mqtt.port",
    "mqtt.tls_port",
    "mqtt.ws_port",
    "mqtt.ws_origins",
    "mqtt.proxy_protocol",
    "mqtt.certificate",
    "mqtt.private_key",
    "mqtt.anonymous_app",
    "mqtt.anonymous_anywhere",
}


def section(heading: str) -> str:
    found: str = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return found


def rows(heading: str) -> dict[str, list[str]]:
    """The first cell, without backticks, to the others."""
    lines = [line.split("|")[1:-1] for line in section(heading).splitlines() if line.startswith("| `")]
    return {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in lines}


def calls(*names: str) -> Iterator[ast.Call]:
    """Of functions and methods with these names."""
    for source in SOURCES:
        for found in ast.walk(ast.parse(source.read_text())):
            if isinstance(found, ast.Call):
                called = found.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                if name in names:
                    yield found


def texts(expression: ast.expr) -> list[str]:
    """The strings it may be: one, or one of two."""
    if isinstance(expression, ast.IfExp):
        return texts(expression.body) + texts(expression.orelse)
    constant = isinstance(expression, ast.Constant) and isinstance(expression.value, str)
    return [expression.value] if constant else []  # type: ignore[attr-defined]


def labels(*names: str) -> set[str]:
    """What is passed first to these."""
    return {text for call in calls(*names) if call.args for text in texts(call.args[0])}


def refusals() -> dict[str, set[Reason]]:
    """Label to reasons, of every `Refusal(reason, text, label)`."""
    found: dict[str, set[Reason]] = {}
    for call in calls("Refusal"):
        reason, _, label = call.args
        assert isinstance(reason, ast.Attribute)
        found.setdefault(texts(label)[0], set()).add(Reason[reason.attr])
    return found


def ends() -> dict[str, Reason | None]:
    """Label to the reason of DISCONNECT, of every `close(label, reason)`."""
    found: dict[str, Reason | None] = {}
    for call in calls("close"):
        for label in texts(call.args[0]) if call.args else ():
            reason = call.args[1] if len(call.args) > 1 else None
            found[label] = Reason[reason.attr] if isinstance(reason, ast.Attribute) else None
    return found


def errors() -> set[Reason]:
    """What a packet that breaks a rule may end a connection with."""
    kinds, found = [MQTTError], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        found.add(kind.reason)
    named = re.findall(r"ProtocolError\([^)]*Reason\.(\w+)", Path(str(session.__file__)).read_text())
    return found - {MQTTError.reason, UnsupportedVersion.reason} | {Reason[name] for name in named}


def test_every_refusal_is_told() -> None:
    in_code = set(refusals()) | labels("count_refusal", "_turn_away")
    in_code |= {reason.value for reason in TurnedAway}
    in_code |= {"bad CONNECT", PacketTooLarge.reason.name.lower().replace("_", " ")}  # Connection.fail
    in_code |= {refusal.value for kind in (TlsRefusal, WebSocketRefusal) for refusal in kind}
    assert in_code == set(rows("Refused connections"))


def test_refusals_have_the_codes_of_the_table() -> None:
    table = rows("Refused connections")
    for label, reasons in refusals().items():
        for reason in reasons:
            assert table[label][0] == f"0x{reason:02X}"
            assert table[label][1] in ("", str(CONNACK_RETURN_CODES.get(reason)))


def test_every_end_of_a_connection_is_told() -> None:
    broken_rules = {reason.name.lower().replace("_", " ") for reason in errors()}
    by_refusal = labels("count_refusal", "_turn_away")  # these close before CONNACK
    in_code = set(ends()) - by_refusal | labels("_end") | broken_rules
    assert in_code == set(rows("Ended connections"))


def test_ends_have_the_codes_of_the_table() -> None:
    table = rows("Ended connections")
    codes = {label: reason for label, reason in ends().items() if label in table}
    codes |= {reason.name.lower().replace("_", " "): reason for reason in errors()}
    for label, reason in codes.items():
        assert table[label][0] == ("" if reason is None else f"0x{reason:02X}"), label


def test_every_limit_is_told_with_its_default() -> None:
    table = rows("Limits")
    assert {f"mqtt.{key.name}" for key in KEYS.values() if key.section == "mqtt"} - NOT_A_LIMIT <= set(table)
    for path, (default, _) in table.items():
        told = default.split()[0].rstrip(";").replace(",", "")
        assert (None if told == "off" else int(told)) == KEYS[path].default, path


def test_limits_that_are_no_setting_have_the_values_of_the_code() -> None:
    settings: NodeSettings = _node_settings(Config())
    profile = Carriers().catalog.default
    told = {
        connection.MAX_CONNECT_SIZE: "Limits",
        settings.receive_maximum: "Limits",
        profile.delivery.write_buffer: "Limits",
        connection.MAX_UNREAD: "Limits",
        connection.TURN: "Limits",
        settings.mailbox.queued_bytes: "Limits",
        settings.max_retained: "Limits",
        settings.max_retained_bytes: "Limits",
        settings.max_sessions: "Limits",
        MAX_FIRST_FRAME_SIZE: "Refused connections",
    }
    for number, heading in told.items():
        assert f"{number:,}" in section(heading), number
    assert f"over {MAX_HANDSHAKE_SIZE} bytes" in section("Refused connections")
    assert f"at most {session.ALIASES_SENT} of them" in section("CONNECT")
    assert f"`heartbeat.most` ({profile.heartbeat.most})" in section("CONNECT")
    assert f"`delivery.window` ({profile.delivery.window})" in section("CONNECT")
    for name in (arrivals.CARRIER_PROPERTY, arrivals.LINK_PROPERTY, admission.HEARTBEAT_PROPERTY, *LINKS):
        assert f"`{name}`" in section("CONNECT"), name
    [(_, advised)] = admission.advice(profile.heartbeat, 0, settings.keep_alive_max)
    assert f"`{advised}`" in section("CONNECT")
    for name in ("first", "least", "most"):
        assert f"`acks.{name}` ({getattr(profile.acks, name):g} s)" in section("Acknowledgement")
    assert f"`delivery.largest` ({profile.delivery.largest:,} bytes" in section("Acknowledgement")
    assert profile.delivery.largest == admission.NO_PUSH_IS_LARGER
    assert f"up to {BACKLOG} sorted" in section("Acknowledgement")
    for label in NOT_IN_ORDER:
        assert f"`{label}`" in section("Acknowledgement")
    later = section("Come later")
    assert f"at most {gate.LONGEST:g} each" in later
    for name, _ in gate.Appointment(1.0, 1.0).properties:
        assert f"| `{name}` |" in later
    limits = Limits()
    assert f"at most {limits.max_event} bytes" in section("What a device publishes")
    assert f"1 to {limits.max_event_name} bytes" in section("What a device publishes")
    assert f"1 to {limits.registration_id_size} bytes" in section("CONNECT")


def test_what_counts_bad_input_is_in_the_catalogue_of_metrics() -> None:
    known = set(rows("Refused connections")) | set(rows("Ended connections")) | {"not allowed"}
    catalogue = (Path(__file__).parents[2] / "docs/operating.md").read_text()
    told = [line.split("|")[-2] for line in section("Bad input").splitlines() if line.startswith("| ")][1:]
    for cell in told:
        for metric, reason in re.findall(r'`([a-z_]+)(?:\{reason="([^"]+)"\})?`', cell):
            assert f"| {metric} |" in catalogue
            assert not reason or reason in known


@pytest.mark.parametrize("platform", ["android", "ios", "hmos"])
def test_the_example_of_merging_is_what_happens(platform: str) -> None:
    [sent] = re.findall(r"(?m)^    sent +(\{.*\})$", PAGE)
    [told] = re.findall(rf"(?m)^    {platform} +(\{{.*\}})$", PAGE)
    body = b'{"notification": %b}' % sent.encode()
    rendered = render(StoredMessage(7, 1, body, 0.0, 1.0), encoding(5, platform))
    assert orjson.loads(rendered) == {"msg_id": "7", "notification": orjson.loads(told)}
