"""Where Redis is: what an operator writes into `store.url`."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Final, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

Address: TypeAlias = tuple[str, int]  # host, port
SCHEMES: Final = ("redis", "rediss")
OPTIONS: Final = ("ca", "cert", "key")
FORM: Final = "redis://[user:password@]host[:port][,host[:port]…][/database]; rediss:// with TLS"


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """`seeds`: servers of one installation, of which one at least answers. Files of TLS: "" is the system's."""

    seeds: tuple[Address, ...]
    user: str = ""
    password: str = field(default="", repr=False)
    database: int = 0
    tls: bool = False
    ca: str = ""
    cert: str = ""
    key: str = ""

    def __str__(self) -> str:
        """Without the password."""
        return ", ".join(shown(seed) for seed in self.seeds)

    def context(self) -> ssl.SSLContext | None:
        """Raises OSError where a file cannot be read."""
        if not self.tls:
            return None
        context = ssl.create_default_context(cafile=self.ca or None)
        if self.cert:
            context.load_cert_chain(self.cert, self.key or None)
        return context


def shown(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_url(url: str) -> RedisUrl:
    """Raises ValueError that says what is allowed, and never shows a password."""
    scheme, found, rest = url.partition("://")
    if not found or scheme not in SCHEMES:
        raise ValueError(f"a Redis URL has the form {FORM}")
    for other in SCHEMES:  # also as a list of whole URLs
        rest = rest.replace(f",{other}://", ",")
    parts = urlsplit(f"//{rest}")
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise ValueError(f"a Redis URL knows no {unknown[0]}: it may have {', '.join(OPTIONS)}")
    return RedisUrl(
        tuple(_address(host) for host in hosts.split(",")),
        unquote(user),
        unquote(password),
        _database(parts.path),
        scheme == "rediss",
        **options,
    )


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":") if ":" in text.rpartition("]")[2] else (text, "", "6379")
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ValueError(f"{text.rpartition('@')[2]!r} is no host and port; a Redis URL has the form {FORM}")
    return host, int(port)


def _database(path: str) -> int:
    text = path.strip("/") or "0"
    if not text.isdecimal():
        raise ValueError(f"{text!r} is no number of a database; a Redis URL has the form {FORM}")
    return int(text)
