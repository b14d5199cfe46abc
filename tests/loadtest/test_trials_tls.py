"""Trials over TLS, against real servers: ours behind its own listener and a proxy, and mosquitto; and what ends them
before they begin."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest

from clients.local_server import LocalServer
from loadtest.http_pool import HttpPool
from loadtest.reactor import Reactor
from loadtest.roster import Strangers
from loadtest.trial.plan import TrialError
from loadtest.trial.summary import summarize
from loadtest.trial.target import Target
from loadtest.wires import Endpoint, Tls
from tests.conftest import StartServer
from tests.loadtest.test_trial_command import call
from tests.loadtest.trial_world import (
    DEVICES,
    Certified,
    certify,
    check_complete,
    play,
    running_mosquitto,
    small_plan,
    target_of,
    tls_before,
)

HOST = "localhost"  # what the certificate is for; its address is not
REFUSED = "certificate refused: "

needs_mosquitto = pytest.mark.skipif(
    not shutil.which("mosquitto"), reason="mosquitto: apt-get install mosquitto"
)


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Certified:
    return certify(tmp_path_factory.mktemp("certified"), HOST)


@pytest.fixture(scope="module")
def tls(certified: Certified) -> Tls:
    return Tls(HOST, str(certified.cafile))


@pytest.fixture(scope="module")
def server(start_server: StartServer, certified: Certified) -> LocalServer:
    return start_server(*certified.of_holdfast)


@pytest.fixture(scope="module")
def target(server: LocalServer, certified: Certified, tls: Tls) -> Iterator[Target]:
    """Nothing of it is spoken to without TLS."""
    plain = target_of(server)
    assert server.addresses.mqtts is not None
    assert plain.http is not None
    with tls_before(plain.http.address, certified.context()) as https:
        yield replace(plain, mqtt=Endpoint(server.addresses.mqtts, tls), http=Endpoint(https, tls))


@pytest.fixture(scope="module")
def mosquitto(tmp_path_factory: pytest.TempPathFactory, certified: Certified, tls: Tls) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("mosquitto")
    with running_mosquitto(folder, *certified.of_mosquitto) as target:
        yield replace(target, mqtt=Endpoint(target.mqtt.address, tls))


# Trials


@pytest.mark.parametrize(
    "scenario", ["connect-storm", "broadcast", "targeted", "mixed-day", "offline-backlog"]
)
def test_ours_is_loaded_over_tls(target: Target, scenario: str) -> None:
    rates = {"connect-storm": 100.0, "broadcast": 10.0, "targeted": 50.0}
    changes = {"churn": 60.0, "away": 0.2, "receipts": 1.0, "waiting": 2}
    plan = small_plan(scenario, rate=rates.get(scenario, 100.0), **changes)
    result = play(plan, target)
    check_complete(result)
    assert result.deliveries.arrived >= result.pushes.sent
    assert result.target["mqtt"] == f"mqtts://{HOST}:{target.mqtt.address[1]}"
    assert result.target["http"].startswith(f"https://{HOST}:")
    assert result.target["insecure"] is False


@needs_mosquitto
@pytest.mark.parametrize("scenario", ["idle", "connect-storm", "broadcast", "targeted", "soak"])
def test_another_broker_is_loaded_over_tls(mosquitto: Target, scenario: str) -> None:
    plan = small_plan(scenario, rate=100.0 if scenario == "connect-storm" else 20.0)
    result = play(plan, mosquitto, who=Strangers())
    check_complete(result)
    assert result.deliveries.arrived == result.pushes.sent * (DEVICES if scenario == "broadcast" else 1)


def test_the_command_line_says_what_is_trusted(
    target: Target, server: LocalServer, certified: Certified, tmp_path: Path
) -> None:
    assert target.login is not None
    assert target.http is not None
    host, _, port = server.addresses.admin.removeprefix("http://").rpartition(":")
    with tls_before((host, int(port)), certified.context()) as admin:
        answer = call(
            *("run", "targeted", "--devices", "5", "--rate", "20", "--duration", "0.3", "--clean-up"),
            *("--target", target.mqtt.url("mqtt"), "--http", target.http.url("http")),
            *("--metrics", f"https://{HOST}:{admin[1]}/metrics", "--cafile", str(certified.cafile)),
            *("--app", target.login.app_key, "--secret", target.login.secret),
            *("--json", str(tmp_path / "result.json")),
        )
    assert answer.exit_code == 0, answer.output
    told = orjson.loads((tmp_path / "result.json").read_bytes())
    assert (told["ended"], told["deliveries"]["lost"], told["server"]["trouble"]) == ("complete", 0, "")
    assert told["server"]["memory_first"]


def test_who_checks_no_certificate_is_told_so(target: Target) -> None:
    blind = Tls("127.0.0.1", insecure=True)
    assert target.http is not None
    loaded = replace(target, mqtt=replace(target.mqtt, tls=blind), http=replace(target.http, tls=blind))
    result = play(small_plan("targeted", rate=50.0), loaded)
    assert (result.ended, result.deliveries.lost, result.connects.online) == ("complete", 0, DEVICES)
    assert result.target["insecure"] is True
    assert "Notes\n  no certificate was checked (--insecure)" in summarize(result)


# What ends before it begins


def refuse(target: Target, why: str, **changes: Any) -> None:
    """Though its devices would try for ten minutes."""
    who = Strangers() if target.kind == "mqtt" else None
    with pytest.raises(TrialError, match=why):
        play(small_plan("idle", patience=600.0, **changes), target, who=who)


@pytest.mark.parametrize("listener", ["mqtt", "http"])
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"cafile": None}, "unable to get local issuer certificate"),
        ({"server_name": "127.0.0.1"}, "IP address mismatch, certificate is not valid for '127.0.0.1'"),
    ],
)
def test_a_certificate_that_is_refused_ends_the_trial(
    target: Target, tls: Tls, listener: str, changes: dict[str, Any], why: str
) -> None:
    endpoint = replace(getattr(target, listener), tls=msgspec.structs.replace(tls, **changes))
    url = endpoint.url(listener)
    refuse(replace(target, **{listener: endpoint}), f"no TLS with {url}: {REFUSED}{why}")


def test_a_plain_port_of_ours_is_no_port_of_tls(server: LocalServer, target: Target, tls: Tls) -> None:
    plain = target_of(server)
    assert plain.http is not None
    refuse(
        replace(target, mqtt=Endpoint(plain.mqtt.address, tls)),
        r"no TLS with mqtts://\S+: closed in the TLS handshake",
    )
    refuse(
        replace(target, http=Endpoint(plain.http.address, tls)),
        r"no TLS with https://\S+: an answer that is not",
    )


def test_a_port_of_tls_is_no_plain_one(target: Target) -> None:
    refuse(replace(target, mqtt=Endpoint(target.mqtt.address)), "no device came online: .*: mqtts://")


@needs_mosquitto
def test_the_ports_of_another_broker_may_be_mixed_up(mosquitto: Target, tls: Tls, tmp_path: Path) -> None:
    plain = replace(mosquitto, mqtt=Endpoint(mosquitto.mqtt.address))
    refuse(plain, "no device came online: .*; it speaks TLS there: mqtts://")
    with pytest.raises(TrialError, match=r"the publisher was not let in: .*; it speaks TLS there: mqtts://"):
        play(small_plan("targeted"), plain, who=Strangers())
    with running_mosquitto(tmp_path) as other:
        refuse(replace(other, mqtt=Endpoint(other.mqtt.address, tls)), "closed in the TLS handshake")


@needs_mosquitto
def test_a_broker_may_want_certificates_of_its_clients(
    certified: Certified, tls: Tls, tmp_path: Path
) -> None:
    """No check before the trial shows that: with TLS 1.3 the server says so when the client has done its part."""
    lines = (*certified.of_mosquitto, f"cafile {certified.cafile}", "require_certificate true")
    with running_mosquitto(tmp_path, *lines) as target:
        wanted = replace(target, mqtt=Endpoint(target.mqtt.address, tls))
        refuse(wanted, "no device came online: .*refused: 30 TLS: TLSV13_ALERT_CERTIFICATE_REQUIRED")


# The publisher's connections


@pytest.mark.parametrize("server_name", [HOST, "127.0.0.1"])
def test_a_call_that_comes_to_nothing_is_answered(target: Target, tls: Tls, server_name: str) -> None:
    """Nobody listens; or the certificate is not the one that was asked for."""
    assert target.http is not None
    address = ("127.0.0.1", 1) if server_name == HOST else target.http.address
    reactor = Reactor()
    pool = HttpPool(
        reactor, address, 2, tls=msgspec.structs.replace(tls, server_name=server_name), bears_loss=True
    )
    answers: list[tuple[int, bytes]] = []
    for _ in range(5):
        pool.send(pool.build("GET", "/"), lambda status, body: answers.append((status, body)))
    reactor.run_until(lambda: len(answers) == 5, "five answers")
    assert {status for status, _ in answers} == {0}
    told = {body.decode() for _, body in answers}
    if server_name == HOST:
        assert told == {"Connection refused"}
    else:
        assert told == {f"{REFUSED}IP address mismatch, certificate is not valid for '127.0.0.1'."}
    pool.close()
    reactor.close()
