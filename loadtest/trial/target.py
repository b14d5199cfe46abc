"""Who is loaded: a Holdfast with an app, one that is started for the occasion, or another MQTT broker."""

from __future__ import annotations

import ipaddress
import random
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import msgspec

from clients.local_server import LocalServer, ServerFailed
from loadtest.http_pool import HttpError, HttpPool
from loadtest.publishing import PushRefused, keep_in_flight
from loadtest.reactor import Reactor
from loadtest.roster import Listed, Roster, Who, enroll
from loadtest.trial.plan import Plan, TrialError
from loadtest.wires import Endpoint, Tls, check_tls

TAGS: Final = 10  # groups of devices, for pushes to tags
PORTS: Final = {"mqtt": 1883, "mqtts": 8883, "http": 80, "https": 443}
TOKENS_IN_FLIGHT: Final = 16

Kind = Literal["embedded", "holdfast", "mqtt"]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Login:
    """Of an app: who pushes."""

    app_key: str
    secret: str


@dataclass(frozen=True, slots=True)
class Target:
    kind: Kind
    mqtt: Endpoint
    http: Endpoint | None = None
    login: Login | None = None
    everyone: bool = False  # a broadcast is for all devices of the app, and not only for those of the trial
    pid: int | None = None  # of the server, where it is on this machine
    metrics: tuple[Endpoint, str] | None = None  # and the path

    @property
    def is_local(self) -> bool:
        """Connections to it may come from any loopback address."""
        host = self.mqtt.address[0]
        return ipaddress.ip_address(host).is_loopback and ":" not in host

    @property
    def secured(self) -> dict[str, Endpoint]:
        """What is spoken to over TLS, by its address."""
        listeners = [("mqtt", self.mqtt), ("http", self.http), ("http", self.metrics and self.metrics[0])]
        return {one.url(scheme): one for scheme, one in listeners if one is not None and one.tls}

    @property
    def insecure(self) -> bool:
        """Certificates are not looked at."""
        return any(one.tls.insecure for one in self.secured.values() if one.tls)


def read_mqtt(text: str) -> Endpoint:
    """`mqtt://host:port`, `mqtts://host:port`, `host:port` or `host`, resolved. Raises ValueError."""
    scheme, _, rest = text.rpartition("://")
    if scheme not in ("", "mqtt", "mqtts"):
        raise ValueError(
            f"{text}: must be an address such as mqtt://127.0.0.1:1883 or mqtts://push.example.com:8883"
        )
    return resolve(f"{scheme or 'mqtt'}://{rest}")


def read_http(text: str) -> tuple[Endpoint, str]:
    """`http://host:port/path`, or with https: where it is, and the path. Raises ValueError."""
    if not text.startswith(("http://", "https://")):
        raise ValueError(
            f"{text}: must be an address such as http://127.0.0.1:8080 or https://api.example.com"
        )
    return resolve(text), urlsplit(text).path or "/"


def resolve(url: str) -> Endpoint:
    """IPv4 if there is a choice. Raises ValueError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or PORTS[parts.scheme]
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from None
    if not host or parts.username or parts.query or parts.fragment:
        raise ValueError(f"{url}: must name a host, and perhaps a port")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"{host}: {error.strerror}") from None
    address = min(found, key=lambda one: one[0] != socket.AF_INET)[4][:2]
    return Endpoint(address, Tls(host) if parts.scheme.endswith("s") else None)  # type: ignore[arg-type]


def trusting(endpoint: Endpoint, cafile: Path | None, *, insecure: bool) -> Endpoint:
    """The same, where certificates are of the authority in `cafile`, None: of one that the system trusts; or whatever
    they are."""
    if endpoint.tls is None:
        return endpoint
    tls = msgspec.structs.replace(endpoint.tls, cafile=cafile and str(cafile), insecure=insecure)
    return replace(endpoint, tls=tls)


def check_handshakes(target: Target) -> None:
    """One with each listener, so that what can never succeed ends before anything begins. Raises TrialError."""
    for url, endpoint in target.secured.items():
        if why := check_tls(endpoint):
            raise TrialError(f"no TLS with {url}: {why}")


@contextmanager
def started(target: Target | None, say: Say) -> Iterator[Target]:
    """The target, or a server of our own if there is none. Raises TrialError."""
    if target is not None:
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="holdfast-loadtest-") as home:
        server = LocalServer(Path(home), own_group=True)
        try:
            server.start()
        except ServerFailed as error:
            raise TrialError(str(error)) from error
        say(f"started a server: MQTT on port {server.addresses.mqtt[1]}, HTTP on {server.addresses.http}")
        login = Login(server.app.app_key, server.app.master_secret)
        http, _ = read_http(server.addresses.http)
        try:
            mqtt = Endpoint(server.addresses.mqtt)
            yield Target("embedded", mqtt, http, login, everyone=True, pid=server.pid)
        finally:
            server.kill()


# Devices


@dataclass(frozen=True, slots=True)
class Enrolled:
    """The devices of a trial, and what those of Holdfast are called together."""

    who: Who
    tag: str = ""

    def group(self, number: int) -> str:
        """The tag of every TAGSth device, from `number` on."""
        return f"{self.tag}_{number}"


def enroll_devices(reactor: Reactor, target: Target, plan: Plan, directory: Path) -> Enrolled:
    """Register the devices with tags of this trial alone; those that exist are taken over. Raises TrialError."""
    enrolled = Enrolled(Roster("", 0, directory), f"loadtest_{random.getrandbits(32):08x}")

    def describe(device: int) -> dict[str, Any]:
        return {"platform": "other", "tags": [enrolled.tag, enrolled.group(device % TAGS)]}

    pool = app_pool(reactor, target, 4)
    assert target.login is not None
    key, tokens = target.login.app_key, directory / "tokens"
    try:
        who = enroll(pool, key, plan.devices, tokens, describe, first=plan.first_device)
    except (PushRefused, TimeoutError, HttpError) as error:
        raise TrialError(f"the devices could not be registered: {error}") from error
    finally:
        pool.close()
    return replace(enrolled, who=who)


def app_pool(reactor: Reactor, target: Target, connections: int) -> HttpPool:
    """That speaks for the app."""
    assert target.http is not None
    assert target.login is not None
    login = target.login
    return HttpPool(
        reactor,
        target.http.address,
        connections,
        tls=target.http.tls,
        user=login.app_key,
        password=login.secret,
        bears_loss=True,
    )


def clean_up(reactor: Reactor, target: Target, enrolled: Enrolled) -> None:
    """Revoke the tokens and delete the tags that `enroll_devices` made: no API deletes a device. Raises
    TrialError."""
    who = enrolled.who
    if not isinstance(who, Roster):
        return
    pool = app_pool(reactor, target, TOKENS_IN_FLIGHT)
    tags = [enrolled.tag, *(enrolled.group(number) for number in range(TAGS))]
    paths = [f"/v3/tags/{tag}" for tag in tags]
    paths += [f"/v1/devices/{who.name(device)}/token" for device in range(who.count)]

    def check(status: int, body: bytes) -> None:
        if status != 200:
            raise TrialError(f"could not clean up: {status} {body[:200].decode(errors='replace')}")

    try:
        requests = (pool.build("DELETE", path) for path in paths)
        keep_in_flight(pool, requests, check, TOKENS_IN_FLIGHT)
    except TimeoutError as error:
        raise TrialError(f"could not clean up: {error}") from error
    finally:
        pool.close()


def read_tokens(file: Path, app_key: str, devices: int) -> Listed:
    """A registration id and a token on each line, with a blank or a comma between them. Raises ValueError."""
    found: list[tuple[str, str]] = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        words: Sequence[str] = line.replace(",", " ").split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2:
            raise ValueError(f"{file}, line {number}: must be a registration id and a token")
        found.append((words[0], words[1]))
    if len(found) < devices:
        raise ValueError(f"{file} has {len(found):,} devices, fewer than the {devices:,} of --devices")
    return Listed(app_key, tuple(found[:devices]))
