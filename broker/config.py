"""Settings: from a TOML file, then `HOLDFAST_…` variables, then flags; the later wins.

The sections below are the only table. A key is one field of a section; its TOML name, environment variable,
flag of `holdfast serve`, help, check and place in configs/holdfast.toml follow from it. Sizes are bytes and
times seconds. The word "off" gives None where a key may have it. `holdfast config sample` prints the table.
"""

from __future__ import annotations

import difflib
import functools
import ipaddress
import math
import os
import re
import socket
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import click
import msgspec
from msgspec import Meta, field

from broker.bridging.bridge_rules import RulesError, read_rules
from broker.limits import Limits
from broker.redis.address import FORM, parse_url
from broker.telling.calendar import Calendar
from broker.telling.callbacks import CallbackSettings
from broker.tenants.networks import read_network

PREFIX: Final = "HOLDFAST_"
OFF: Final = "off"
OFF_ALLOWED: Final = f', or "{OFF}"'
DAY: Final = 86400
ORIGIN_WORDS: Final = ("same", "any")
AUTO: Final = "auto"
MAX_WORKERS: Final = 512  # of one machine
_LOGIN: Final = re.compile(r"//([^:@/]*:)?.*@", re.DOTALL)
ADDRESS: Final = re.compile(r"[^\s/@]+:[0-9]{1,5}")
ORIGIN: Final = re.compile(r"null|[a-z][a-z0-9+.-]*://[^/,\s]*")  # as a browser sends it (RFC 6454 6.2)

Port = Annotated[int, Meta(ge=0, le=65535)]  # 0: any free port
Count = Annotated[int, Meta(ge=0)]
Limit = Annotated[int, Meta(ge=1)]
Body = Annotated[int, Meta(ge=1024)]
AdminKey = Annotated[str, Meta(min_length=16)]
U16 = Annotated[int, Meta(ge=0, le=65535)]
PositiveU16 = Annotated[int, Meta(ge=1, le=65535)]
U32 = Annotated[int, Meta(ge=0, le=4_294_967_295)]
Name = Annotated[str, Meta(min_length=1)]
Seconds = Annotated[float, Meta(gt=0)]
Role = Literal["all", "gateway", "broker"]
Workers = Annotated[int, Meta(ge=0, le=MAX_WORKERS)] | Literal["auto"]


def _about(text: str, *, flag: str | None = None, secret: bool = False) -> Meta:
    """What a key is for; its flag where that is not --section-key; whether its value must not be shown."""
    return Meta(description=text, extra={"flag": flag, "secret": secret})


class Server(msgspec.Struct, frozen=True, kw_only=True):
    data_dir: Annotated[Path, _about("everything the server keeps is in here", flag="--data-dir")] = Path(
        "holdfast-data"
    )
    host: Annotated[str, _about("address the MQTT and HTTP listeners bind to", flag="--host")] = "127.0.0.1"
    role: Annotated[
        Role,
        _about("gateway holds devices, broker has the HTTP API and what happens later", flag="--role"),
    ] = "all"
    node_id: Annotated[
        str, _about("name of this node, unique among nodes; empty: the host name", flag="--node-id")
    ] = ""
    workers: Annotated[
        Workers,
        _about(
            "node processes behind the same ports, under a supervisor; auto: one a core; 0: just this one",
            flag="--workers",
        ),
    ] = 0
    brokers: Annotated[
        int,
        Meta(ge=0, le=MAX_WORKERS),
        _about(
            "broker processes beside the workers, which then only hold devices; 0: the workers do both",
            flag="--brokers",
        ),
    ] = 0
    advertise: Annotated[
        str,
        _about("host:port that devices are sent to when they are to come here; empty: where MQTT listens"),
    ] = ""
    drain_limit: Annotated[Seconds, _about("longest time a stop may take")] = 20.0
    log_format: Annotated[Literal["text", "json"], _about("one line per event, as text or JSON")] = "text"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], _about("debug also shows packets, without payloads")
    ] = "info"
    demo_app: Annotated[bool, _about("create a demo app; only while all listeners are on loopback")] = True

    def __post_init__(self) -> None:
        if not self.node_id:
            msgspec.structs.force_setattr(self, "node_id", socket.gethostname())


class Mqtt(msgspec.Struct, frozen=True, kw_only=True):
    port: Annotated[Port | None, _about("MQTT over TCP; 0: any free port")] = 1883
    tls_port: Annotated[
        Port | None, _about("MQTT over TLS; needs certificate and private_key", flag="--mqtts-port")
    ] = None
    ws_port: Annotated[Port | None, _about("MQTT over WebSocket, path /mqtt", flag="--ws-port")] = 8083
    ws_origins: Annotated[
        str,
        _about(
            'pages that may connect over WebSocket: "same" host as the server, "any", or origins with commas'
        ),
    ] = "same"
    certificate: Annotated[Path | None, _about("PEM file; read again on SIGHUP")] = None
    private_key: Annotated[Path | None, _about("PEM file of the certificate's key")] = None
    proxy_protocol: Annotated[
        Name | None,
        _about("networks with commas of proxies whose connections begin with a PROXY header (v1 or v2)"),
    ] = None
    connect_timeout: Annotated[Seconds, _about("a connection without CONNECT is closed after this")] = 10.0
    max_packet_size: Annotated[
        int, Meta(ge=1024, le=268_435_460), _about("larger packets of a device are refused")
    ] = 262_144
    max_connections: Annotated[Limit, _about("connections of this node; more are refused")] = 1_000_000
    max_connecting: Annotated[
        Limit, _about("connections that have not sent CONNECT yet; more are refused")
    ] = 10_000
    max_connections_per_address: Annotated[
        Limit | None, _about("connections of one source address at once; IPv6 counts by /64")
    ] = None
    connect_rate: Annotated[Limit | None, _about("new connections a second, from anybody")] = None
    connect_rate_per_address: Annotated[
        Limit | None, _about("new connections a second from one source address; IPv6 counts by /64")
    ] = None
    admit_rate: Annotated[
        Limit | None, _about("CONNECTs decided in a second; MQTT 5 peers over it are told when to come")
    ] = None
    drain_rate: Annotated[Limit, _about("connections asked in a second to go to other nodes")] = 1000
    keep_alive_max: Annotated[
        PositiveU16, _about("a longer keep-alive is lowered to this (Server Keep Alive)")
    ] = 3600
    keep_alive_min: Annotated[
        U16, _about("an MQTT 5 keep-alive below is raised to this (Server Keep Alive); 0: as asked for")
    ] = 0
    session_expiry_max: Annotated[Count, _about("longest time a session outlives its connection")] = 7 * DAY
    max_subscriptions: Annotated[Limit, _about("ordinary subscriptions of one session")] = 100
    max_sessions: Annotated[Count, _about("sessions of one app kept for absent clients")] = 100_000
    max_queued: Annotated[Count, _about("ordinary messages kept for one absent session")] = 1000
    max_queued_bytes: Annotated[Count, _about("their bytes")] = 1_048_576
    max_retained: Annotated[Count, _about("retained messages of one app")] = 10_000
    max_retained_bytes: Annotated[Count, _about("their bytes, topics included")] = 16 << 20
    max_topic_length: Annotated[
        PositiveU16, _about("bytes of an ordinary topic or filter; a longer one is refused")
    ] = 4096
    max_topic_levels: Annotated[
        PositiveU16, _about("levels of an ordinary topic or filter; a deeper one is refused")
    ] = 128
    topic_alias_maximum: Annotated[U16, _about("topic aliases that one peer may set; 0: none")] = 16
    receive_maximum: Annotated[
        PositiveU16,
        _about("unanswered messages of one peer, and QoS 2 ids it has not released"),
    ] = 256
    max_inflight: Annotated[PositiveU16, _about("unacknowledged packets to one device, at most")] = 32
    sys_interval: Annotated[Seconds, _about("time between two publications of $SYS/#")] = 10.0
    anonymous_app: Annotated[
        Name | None,
        _about("open app that takes in connections without user name and password; for test beds"),
    ] = None
    anonymous_anywhere: Annotated[
        bool, _about("let anonymous_app work where others than this machine can reach the server")
    ] = False


class Http(msgspec.Struct, frozen=True, kw_only=True):
    port: Annotated[Port, _about("public HTTP API; 0: any free port")] = 8080
    max_body: Annotated[Body, _about("largest body of one call")] = 1_048_576
    max_batch_body: Annotated[Body, _about("largest body of one batch call")] = 8_388_608
    max_connections: Annotated[Limit, _about("connections to the HTTP API; more are refused")] = 4096
    max_connections_per_address: Annotated[
        Limit | None,
        _about("connections of one source address at once; IPv6 counts by /64, trusted_proxies are exempt"),
    ] = None
    request_timeout: Annotated[
        Seconds,
        _about("longest wait for a request, for its body, and for a peer that does not read"),
    ] = 30.0
    https_only: Annotated[
        bool, _about("refuse calls that did not come over TLS; trusted_proxies say which did")
    ] = False
    trusted_proxies: Annotated[
        str, _about("networks with commas whose X-Forwarded-For and -Proto are believed; empty: none")
    ] = ""
    push_rate: Annotated[Limit | None, _about("push calls of one app in a minute")] = None
    report_rate: Annotated[Limit | None, _about("report calls of one app in a minute")] = None
    device_rate: Annotated[Limit | None, _about("device, tag and alias calls of one app in a minute")] = None


class Admin(msgspec.Struct, frozen=True, kw_only=True):
    host: Annotated[str, _about("address of metrics, health and the admin API")] = "127.0.0.1"
    port: Annotated[Port, _about("metrics, health and the admin API; 0: any free port")] = 8081
    key: Annotated[
        AdminKey | None, _about("off: made at first start and kept in the data directory", secret=True)
    ] = None


class Push(msgspec.Struct, frozen=True, kw_only=True):
    fanout_limit: Annotated[
        Limit, _about("audiences up to this size get an inbox row each, larger ones one bitmap")
    ] = 1000
    default_ttl: Annotated[Count, _about("how long a push waits where the publisher does not say")] = DAY
    max_ttl: Annotated[Count, _about("longest time a push may wait; a longer one is refused")] = 10 * DAY
    offline_limit: Annotated[Limit, _about("newest pushes kept for an absent device, in new apps")] = 100
    token_lifetime: Annotated[Limit, _about("a device token is valid for this long")] = 180 * DAY
    schedule_zone: Annotated[
        Name, _about("time zone (IANA name) of schedules that name none; JPush's is Asia/Shanghai")
    ] = "Asia/Shanghai"
    schedule_grace: Annotated[Count, _about("a schedule missed by more than this does not fire late")] = 3600
    max_schedules: Annotated[Limit | None, _about("live schedules of one app")] = None
    max_slow_pushes: Annotated[Limit | None, _about("slow pushes of one app at once")] = 20
    daily_pushes: Annotated[Limit | None, _about("pushes of one app in a UTC day")] = None
    monthly_pushes: Annotated[Limit | None, _about("pushes of one app in a UTC month")] = None
    daily_broadcasts: Annotated[
        Limit | None, _about("pushes of one app for more than fanout_limit devices in a UTC day")
    ] = None
    max_targets: Annotated[Limit | None, _about("devices that one push may be for")] = None
    alias_devices: Annotated[Limit | None, _about("devices that may have the same alias")] = None


class Store(msgspec.Struct, frozen=True, kw_only=True):
    url: Annotated[
        str, _about(f"where pushes are kept: {FORM}; empty: SQLite in server.data_dir", flag="--store")
    ] = ""
    replicas: Annotated[
        Count, _about("replicas of Redis that must have a write before it counts as stored")
    ] = 0
    unsafe: Annotated[bool, _about("start on a Redis whose settings may lose answered writes")] = False
    report_lifetime: Annotated[Limit, _about("what became of a push can be asked for this long")] = 30 * DAY
    cid_lifetime: Annotated[Limit, _about("a push with the same cid is not pushed again for this long")] = DAY
    event_lifetime: Annotated[Limit, _about("events of devices are kept for this long")] = 7 * DAY
    audit_lifetime: Annotated[Limit, _about("the audit log is kept for this long")] = 365 * DAY
    activity_lifetime: Annotated[Limit, _about("which devices were there is kept for this long")] = 61 * DAY
    time_zone: Annotated[Name, _about("days of the users report begin at midnight here (IANA name)")] = "UTC"

    @property
    def kind(self) -> Literal["sqlite", "redis"]:
        return "redis" if self.url else "sqlite"


class Callbacks(msgspec.Struct, frozen=True, kw_only=True):
    timeout: Annotated[Seconds, _about("longest time one POST to a receiver may take")] = 10.0
    first_pause: Annotated[
        Seconds, _about("a receiver that failed is left alone for this long; doubled each time")
    ] = 5.0
    max_pause: Annotated[Seconds, _about("and at most for this long")] = 900.0
    max_attempts: Annotated[Limit, _about("attempts for one event; then it is parked")] = 100
    max_age: Annotated[Seconds, _about("an event so old that still fails is parked")] = DAY
    connections: Annotated[Limit, _about("POSTs at once")] = 64
    connections_per_host: Annotated[Limit, _about("of these, to one host")] = 4
    private_addresses: Annotated[
        bool, _about("let callbacks go to loopback, private and link-local addresses")
    ] = False


class Bridge(msgspec.Struct, frozen=True, kw_only=True):
    host: Annotated[
        Name | None, _about("MQTT broker whose messages become pushes, by bridge.rules; off: no bridge")
    ] = None
    port: Annotated[Port, _about("its port")] = 1883
    tls: Annotated[bool, _about("connect with TLS")] = False
    ca_file: Annotated[Path | None, _about("PEM file with its authority; off: the system's")] = None
    username: Annotated[Name | None, _about("user name there")] = None
    password: Annotated[Name | None, _about("password there", secret=True)] = None
    client_id: Annotated[
        str,
        _about(
            "its name there; empty: holdfast-bridge with a Redis and no group, else holdfast- and server.node_id"
        ),
    ] = ""
    keep_alive: Annotated[
        PositiveU16, _about("seconds of silence before it asks whether the broker is there")
    ] = 30
    protocol: Annotated[Literal["5", "3.1.1"], _about("MQTT version that the broker speaks")] = "5"
    session_expiry: Annotated[
        U32, _about("the broker keeps messages for the bridge this long while it is away (MQTT 5)")
    ] = 7 * DAY
    window: Annotated[PositiveU16, _about("messages pushed at once; 1 keeps them in order")] = 32
    group: Annotated[Name | None, _about("several servers with one group share the messages")] = None
    rules: Annotated[Path | None, _about("TOML file: which topics become which pushes")] = None
    dead_topic: Annotated[Name | None, _about("publish there what cannot be pushed")] = None


class Carriers(msgspec.Struct, frozen=True, kw_only=True):
    directory: Annotated[
        Path | None, _about("carrier profiles (*.toml), read again on SIGHUP; off: the ones that come along")
    ] = None


class Dispatch(msgspec.Struct, frozen=True, kw_only=True):
    ttl: Annotated[int, Meta(ge=60, le=30 * DAY), _about("a device need not ask again for this long")] = 3600
    udp_port: Annotated[
        Port | None, _about("answer devices that ask with one UDP datagram, too; 0: any free port")
    ] = None


class Config(msgspec.Struct, frozen=True, kw_only=True):
    server: Server = field(default_factory=Server)
    mqtt: Mqtt = field(default_factory=Mqtt)
    http: Http = field(default_factory=Http)
    admin: Admin = field(default_factory=Admin)
    push: Push = field(default_factory=Push)
    store: Store = field(default_factory=Store)
    callbacks: Callbacks = field(default_factory=Callbacks)
    bridge: Bridge = field(default_factory=Bridge)
    carriers: Carriers = field(default_factory=Carriers)
    dispatch: Dispatch = field(default_factory=Dispatch)

    def limits(self) -> Limits:
        """The public API's limits; those that are no setting keep their defaults."""
        return Limits(
            fanout_limit=self.push.fanout_limit,
            default_ttl=self.push.default_ttl,
            max_ttl=self.push.max_ttl,
            token_lifetime=self.push.token_lifetime,
            max_body=self.http.max_body,
            max_batch_body=self.http.max_batch_body,
            request_timeout=self.http.request_timeout,
            push_rate=self.http.push_rate,
            report_rate=self.http.report_rate,
            device_rate=self.http.device_rate,
            schedule_zone=self.push.schedule_zone,
            schedule_grace=self.push.schedule_grace,
            max_schedules=self.push.max_schedules,
            max_slow_pushes=self.push.max_slow_pushes,
            cid_lifetime=self.store.cid_lifetime,
            report_lifetime=self.store.report_lifetime,
            daily_pushes=self.push.daily_pushes,
            monthly_pushes=self.push.monthly_pushes,
            daily_broadcasts=self.push.daily_broadcasts,
            max_targets=self.push.max_targets,
            alias_devices=self.push.alias_devices,
        )

    def callback_settings(self) -> CallbackSettings:
        return CallbackSettings(**msgspec.structs.asdict(self.callbacks))

    @property
    def trusted_proxies(self) -> tuple[str, ...]:
        """As CIDR. Raises ValueError."""
        return _networks(self.http.trusted_proxies)

    @property
    def device_proxies(self) -> tuple[str, ...]:
        """Whose connections to the device listeners begin with a PROXY header, as CIDR. Raises ValueError."""
        return _networks(self.mqtt.proxy_protocol or "")

    @property
    def on_loopback(self) -> bool:
        """Nobody outside this machine can reach the server: the condition for the demo app."""
        return is_loopback(self.server.host) and is_loopback(self.admin.host)

    @property
    def workers(self) -> int:
        """Processes under a supervisor; 0: there is none."""
        workers = self.server.workers
        return len(os.sched_getaffinity(0)) if workers == AUTO else workers

    @property
    def serves_devices(self) -> bool:
        return self.server.role != "broker"

    @property
    def serves_api(self) -> bool:
        return self.server.role != "gateway"


def _networks(text: str) -> tuple[str, ...]:
    return tuple(read_network(part) for part in text.split(",") if part.strip())


def hide_password(url: str) -> str:
    """A store's address as it may be shown: all between // and the last @ is taken for name and password."""
    return _LOGIN.sub(r"//\1***@", url)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ConfigError(Exception):
    """The settings are wrong; `errors` has one line for each mistake."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


@dataclass(frozen=True, slots=True)
class Key:
    """One setting, as its line in a section says."""

    section: str
    name: str
    type: Any
    default: Any
    about: str
    flag: str
    secret: bool
    allowed: str

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def optional(self) -> bool:
        return self.allowed.endswith(OFF_ALLOWED)

    @property
    def variables(self) -> tuple[str, ...]:
        """Environment variables: by section and key, and by flag where that is shorter."""
        by_path = f"{PREFIX}{self.section}_{self.name}".upper()
        by_flag = PREFIX + self.flag[2:].replace("-", "_").upper()
        return (by_path,) if by_path == by_flag else (by_path, by_flag)


def allowed(kind: msgspec.inspect.Type) -> str:
    """What a value of this type may be, in words for an error message."""
    match kind:
        case msgspec.inspect.Metadata(type=inner):
            return allowed(inner)
        case msgspec.inspect.UnionType(types=types):
            kinds = [t for t in types if not isinstance(t, msgspec.inspect.NoneType)]
            words = ", or ".join(map(allowed, kinds))
            return words if len(kinds) == len(types) else words + OFF_ALLOWED
        case msgspec.inspect.LiteralType(values=(value,)):
            return f'"{value}"'
        case msgspec.inspect.LiteralType(values=values):
            return "one of " + ", ".join(str(v) for v in values)
        case msgspec.inspect.BoolType():
            return "true or false"
        case msgspec.inspect.IntType(ge=low, le=high):
            return (
                f"a whole number from {low} to {high}"
                if high is not None
                else f"a whole number, {low} or more"
            )
        case msgspec.inspect.FloatType():
            return "a number above 0"
        case msgspec.inspect.StrType(min_length=length):
            return f"text of at least {length} character{'s' * (length > 1)}" if length else "text"
        case msgspec.inspect.VarTupleType(item_type=item):
            return f"a list, and in it {allowed(item)}"
        case _:
            return "a path"


def _key(section: str, item: msgspec.structs.FieldInfo) -> Key:
    metas = [m for m in typing.get_args(item.type)[1:] if isinstance(m, Meta)]
    about = next(m for m in metas if m.extra)
    extra = about.extra or {}
    return Key(
        section=section,
        name=item.name,
        type=item.type,
        default=item.default,
        about=about.description or "",
        flag=extra["flag"] or f"--{section}-{item.name}".replace("_", "-"),
        secret=extra["secret"],
        allowed=allowed(msgspec.inspect.type_info(item.type)),
    )


SECTIONS: Final[Mapping[str, type[msgspec.Struct]]] = {f.name: f.type for f in msgspec.structs.fields(Config)}
KEYS: Final[Mapping[str, Key]] = {
    key.path: key
    for section, struct in SECTIONS.items()
    for key in (_key(section, item) for item in msgspec.structs.fields(struct))
}
_BY_VARIABLE: Final = {variable: key for key in KEYS.values() for variable in key.variables}


def _path_hook(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    raise ValueError("not a path")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean x?`, or all there is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; there is {', '.join(known)}"


def _show(key: Key, value: object) -> str:
    return "(hidden)" if key.secret else repr(_without_password(key, value))


def _without_password(key: Key, value: object) -> object:
    return hide_password(value) if key.path == "store.url" and isinstance(value, str) else value


class _Reader:
    """Gathers values from the three places, and every mistake in them."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        self.errors: list[str] = []

    def take(self, key: Key, value: object, source: str, *, strict: bool) -> None:
        """Accept one value; `strict` is false where all values are text."""
        if value == OFF and key.optional:
            self.values[key.section][key.name] = None
            return
        try:
            taken = msgspec.convert(value, key.type, strict=strict, dec_hook=_path_hook)
        except msgspec.ValidationError:
            taken = math.nan
        if isinstance(taken, float) and not math.isfinite(taken):
            self.errors.append(f"{source} = {_show(key, value)}: must be {key.allowed}")
            return
        self.values[key.section][key.name] = taken

    def read_file(self, file: Path) -> None:
        try:
            text = file.read_text(encoding="utf-8")
            document = tomllib.loads(text)
        except (OSError, UnicodeDecodeError) as error:
            self.errors.append(f"{file}: cannot be read: {error}")
        except tomllib.TOMLDecodeError as error:
            self.errors.append(f"{file}: not valid TOML: {error}")
        else:
            for section, keys in document.items():
                self._read_section(file, text, section, keys)

    def _read_section(self, file: Path, text: str, section: str, keys: object) -> None:
        place = f"{file}{_line_of(text, section, None)}"
        if section not in SECTIONS:
            self.errors.append(f"{place}: unknown section [{section}]{nearest(section, SECTIONS)}")
        elif not isinstance(keys, dict):
            self.errors.append(f"{place}: {section} = {keys!r}: must be a section, [{section}]")
        else:
            for name, value in keys.items():
                place = f"{file}{_line_of(text, section, name)}: {section}.{name}"
                if key := KEYS.get(f"{section}.{name}"):
                    self.take(key, value, place, strict=True)
                else:
                    self.errors.append(f"{place}: unknown key{nearest(f'{section}.{name}', _paths(section))}")

    def read_environment(self, environ: Mapping[str, str]) -> None:
        """An empty variable counts as not set. One that starts with a section and is no key is a mistake.
        Other HOLDFAST_ variables belong to other commands."""
        sections = tuple(f"{PREFIX}{section.upper()}_" for section in SECTIONS)
        for variable, value in environ.items():
            if key := _BY_VARIABLE.get(variable):
                if value:
                    self.take(key, value, f"environment: {variable} ({key.path})", strict=False)
            elif variable.startswith(sections):
                self.errors.append(f"environment: {variable}: unknown{nearest(variable, _BY_VARIABLE)}")

    def read_flags(self, flags: Mapping[str, str]) -> None:
        for path, value in flags.items():
            self.take(KEYS[path], value, f"{KEYS[path].flag} ({path})", strict=False)


def _paths(section: str) -> list[str]:
    return [path for path, key in KEYS.items() if key.section == section]


def _line_of(text: str, section: str, name: str | None) -> str:
    """`:12`, where a section begins or its key is set; empty if written in a way we do not look for."""
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([^\]]+?)\s*\]", line):
            current = header[1]
            if name is None and current == section:
                return f":{number}"
        elif assigned := re.match(r"\s*([\w.\"-]+)\s*=", line):
            whole = ".".join(filter(None, (current, assigned[1].replace('"', ""))))
            if whole == f"{section}.{name}" or (name is None and whole.split(".")[0] == section):
                return f":{number}"
    return ""


def _conflicts(config: Config) -> Iterator[str]:
    """Mistakes that only show in several keys together."""
    mqtt, push = config.mqtt, config.push
    if (mqtt.certificate is None) != (mqtt.private_key is None):
        yield "mqtt.certificate and mqtt.private_key: must be set together"
    elif mqtt.tls_port is not None and mqtt.certificate is None:
        yield f"mqtt.tls_port = {mqtt.tls_port}: needs mqtt.certificate and mqtt.private_key"
    if mqtt.keep_alive_min > mqtt.keep_alive_max:
        yield (
            f"mqtt.keep_alive_min = {mqtt.keep_alive_min}: "
            f"must be at most mqtt.keep_alive_max = {mqtt.keep_alive_max}"
        )
    if mqtt.ws_origins not in ORIGIN_WORDS and not all(
        ORIGIN.fullmatch(origin.strip()) for origin in mqtt.ws_origins.split(",")
    ):
        yield (
            f"mqtt.ws_origins = {mqtt.ws_origins!r}: must be same, any, or origins such as "
            "https://app.example.com with commas between"
        )
    try:
        if mqtt.proxy_protocol is not None and not config.device_proxies:
            yield f"mqtt.proxy_protocol = {mqtt.proxy_protocol!r}: names no network"
    except ValueError as error:
        yield f"mqtt.proxy_protocol = {mqtt.proxy_protocol!r}: must be networks with commas between; {error}"
    try:
        Calendar(config.store.time_zone)
    except ValueError as error:
        yield f"store.time_zone: {error}"
    try:
        Calendar(push.schedule_zone)
    except ValueError as error:
        yield f"push.schedule_zone: {error}"
    try:
        if not config.trusted_proxies and config.http.https_only:
            yield "http.https_only = true: nobody could call; name the proxies that end TLS in trusted_proxies"
    except ValueError as error:
        yield f"http.trusted_proxies = {config.http.trusted_proxies!r}: must be networks with commas between; {error}"
    yield from _fleet_conflicts(config)
    yield from _bridge_conflicts(config)
    if push.default_ttl > push.max_ttl:
        yield f"push.default_ttl = {push.default_ttl}: must be at most push.max_ttl = {push.max_ttl}"


def _fleet_conflicts(config: Config) -> Iterator[str]:
    """Of what only works with a store that processes share, and of the roles."""
    server, store, mqtt = config.server, config.store, config.mqtt
    try:
        if store.url:
            parse_url(store.url)
    except ValueError as error:
        yield f"store.url = {hide_password(store.url)!r}: {error}"
    for path, given in (
        (f"server.role = {server.role!r}", server.role != "all"),
        (f"server.workers = {server.workers!r}", config.workers),
        (f"store.replicas = {store.replicas}", store.replicas),
        ("store.unsafe = true", store.unsafe),
    ):
        if given and not store.url:
            yield f'{path}: needs a Redis, store.url = "redis://…"; SQLite is for one process that does all'
    if server.brokers and (not config.workers or server.role != "all"):
        yield f'server.brokers = {server.brokers}: needs server.workers, and server.role = "all"'
    if server.advertise and not ADDRESS.fullmatch(server.advertise):
        yield f"server.advertise = {server.advertise!r}: must be host:port"
    if server.role == "gateway" and mqtt.port is mqtt.tls_port is mqtt.ws_port is None:
        yield "server.role = 'gateway': needs mqtt.port, mqtt.tls_port or mqtt.ws_port"
    if config.bridge.host is not None and (config.workers or not config.serves_api):
        yield (
            f"bridge.host = {config.bridge.host!r}: one process has the bridge; set it for a "
            "`holdfast serve --role broker` without workers"
        )


def _bridge_conflicts(config: Config) -> Iterator[str]:
    """Of the bridge, the mistakes in its rules included."""
    bridge = config.bridge
    if bridge.host is None:
        return
    if bridge.rules is None:
        yield f"bridge.host = {bridge.host!r}: needs bridge.rules"
        return
    try:
        rules = read_rules(bridge.rules, config.limits())
    except RulesError as error:
        yield from error.errors
        return
    topic = bridge.dead_topic
    if topic is not None and ("+" in topic or "#" in topic):
        yield f"bridge.dead_topic = {topic!r}: must be a topic without + and #"
    elif topic is not None and any(rule.pattern.match(topic) is not None for rule in rules):
        yield f"bridge.dead_topic = {topic!r}: must fit no rule of bridge.rules, or it would come back"


def load_config(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> Config:
    """Read the settings; `flags` maps paths ("mqtt.port") to text. Raises ConfigError with every mistake."""
    reader = _Reader()
    if file is not None:
        reader.read_file(file)
    reader.read_environment(environ or {})
    reader.read_flags(flags or {})
    if reader.errors:
        raise ConfigError(reader.errors)
    sections: Any = {section: SECTIONS[section](**keys) for section, keys in reader.values.items()}
    config = Config(**sections)
    if errors := list(_conflicts(config)):
        raise ConfigError(errors)
    return config


# Command line

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class BadConfig(click.ClickException):
    """Ends a command; systemd does not restart on this status (configs/systemd)."""

    exit_code = 2


def config_options(*paths: str) -> Decorator:
    """Give a click command `--config` and a flag for each of these keys (none named: every key), and call it
    with the loaded `config=`. Errors end the command. A secret has no flag: `ps` shows those to everyone."""
    keys = [key for path in paths or KEYS if not (key := KEYS[path]).secret]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def load_and_call(config_file: Path | None, **given: Any) -> Any:
            flags = {key.path: given.pop(_parameter(key)) for key in keys}
            flags = {path: value for path, value in flags.items() if value is not None}
            try:
                config = load_config(config_file, os.environ, flags)
            except ConfigError as error:
                raise BadConfig(str(error)) from error
            return command(config=config, **given)

        wrapped: Callable[..., Any] = load_and_call
        for option in reversed([_FILE_OPTION, *map(_option, keys)]):
            wrapped = option(wrapped)
        return wrapped

    return decorate


_FILE_OPTION: Final[Decorator] = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    envvar=f"{PREFIX}CONFIG",
    help="TOML file with settings (configs/holdfast.toml lists them all).",
)


def _parameter(key: Key) -> str:
    return f"{key.section}__{key.name}"


def _option(key: Key) -> Decorator:
    return click.option(
        key.flag, _parameter(key), metavar="VALUE", help=f"{key.about}  [{format_value(key.default)}]"
    )


# Writing settings


def format_value(value: object) -> str:
    """As TOML; None is "off"."""
    match value:
        case None:
            return f'"{OFF}"'
        case bool():
            return str(value).lower()
        case int() | float():
            return str(value)
        case _:
            return msgspec.json.encode(str(value)).decode()


def format_config(config: Config) -> str:
    """The effective settings as TOML, secrets hidden."""
    lines: list[str] = []
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        values = getattr(config, section)
        for key in (KEYS[path] for path in _paths(section)):
            value = getattr(values, key.name)
            hidden = key.secret and value is not None
            shown = "(hidden)" if hidden else _without_password(key, value)
            lines.append(f"{key.name} = {format_value(shown)}")
    return "\n".join(lines[1:]) + "\n"


def sample_config() -> str:
    """Every key with its default, commented out: configs/holdfast.toml."""
    lines = [_SAMPLE_HEAD]
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        for key in (KEYS[path] for path in _paths(section)):
            lines.append(f"# {key.about}. {key.allowed.capitalize()}.")
            lines.append(f"#{key.name} = {format_value(key.default)}")
    return "\n".join(lines) + "\n"


_SAMPLE_HEAD: Final = """\
# Holdfast settings: every key with its default. `holdfast config sample` prints this file.
# Sizes are bytes, times are seconds. HOLDFAST_SECTION_KEY in the environment wins over this file, the flag
# --section-key over both. Shorter flags: --data-dir, --host, --mqtts-port, --ws-port."""
