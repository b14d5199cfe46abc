"""The ports that the workers of a supervisor share.

Each is held by a socket that is bound and does not listen: so it stays ours while no worker has it, its number is
known before there is one, and the kernel gives connections only to those who listen.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from broker.config import Config

PLACES: Final = {"mqtt": "port", "mqtts": "tls_port", "ws": "ws_port"}  # listeners of devices, their keys


class Port(msgspec.Struct, frozen=True, array_like=True):
    """One of them, as a supervisor leaves it to the next."""

    host: str
    number: int
    files: tuple[int, ...]  # descriptors of the sockets that hold it


def hold_ports(config: Config, former: Mapping[str, Port]) -> dict[str, Port]:
    """By listener, each that the settings want; those that `former` has are kept. Raises OSError."""
    ports: dict[str, Port] = {}
    try:
        for name, (host, number) in _wanted(config).items():
            known = former.get(name)
            kept = known is not None and known.host == host and number in (0, known.number)
            ports[name] = known if known is not None and kept else _hold(host, number)
    except OSError:
        release_ports({name: port for name, port in ports.items() if port is not former.get(name)})
        raise
    release_ports({name: port for name, port in former.items() if port is not ports.get(name)})
    return ports


def release_ports(ports: Mapping[str, Port]) -> None:
    for port in ports.values():
        for file in port.files:
            socket.close(file)


def settle_ports(config: Config, ports: Mapping[str, Port]) -> Config:
    """The settings with the numbers that were found."""
    numbers = {key: ports[name].number for name, key in PLACES.items() if name in ports}
    http = {"port": ports["http"].number} if "http" in ports else {}
    replace = msgspec.structs.replace
    return replace(
        config,
        mqtt=replace(config.mqtt, **numbers),
        http=replace(config.http, **http),
        admin=replace(config.admin, port=ports["admin"].number),
    )


def _wanted(config: Config) -> dict[str, tuple[str, int]]:
    host = config.server.host
    wanted = {"admin": (config.admin.host, config.admin.port)}
    if config.serves_api:
        wanted["http"] = host, config.http.port
    if config.serves_devices:
        found = {name: getattr(config.mqtt, key) for name, key in PLACES.items()}
        wanted |= {name: (host, number) for name, number in found.items() if number is not None}
    return wanted


def _hold(host: str, number: int) -> Port:
    """On each of the host's addresses; the first finds the number if it is 0."""
    files: list[int] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host or None, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            place = (address[0], number, *address[2:])
            with _socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                _bind(trial, place)  # with SO_REUSEPORT we would share it with a server that is none of us
            with _socket(family, kind, protocol) as held:
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                try:
                    _bind(held, place)
                except OSError:  # connections that ended lately, of a server that did not share the port
                    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    _bind(held, place)
                number = held.getsockname()[1]
                files.append(held.detach())
    except OSError:
        for file in files:
            socket.close(file)
        raise
    return Port(host, number, tuple(files))


def _socket(family: int, kind: int, protocol: int) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return made


def _bind(bound: socket.socket, place: tuple[Any, ...]) -> None:
    try:
        bound.bind(place)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise OSError(error.errno, f"{place[0]}:{place[1]}: another process listens there") from error
