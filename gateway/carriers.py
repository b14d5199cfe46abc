"""Carrier profiles: how this edge treats the devices of one network (configs/carriers/*.toml)."""

from __future__ import annotations

import asyncio
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

Seconds = Annotated[float, Meta(gt=0)]


class CarrierProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shared by all connections of a carrier. Times are seconds, sizes bytes."""

    name: str
    ack_timeout: Seconds = 30.0  # a push unacknowledged for longer: the connection is dead or hopeless
    window: Annotated[int, Meta(ge=1, le=65_535)] = 32  # unacknowledged packets to one device
    keep_alive_max: Annotated[int, Meta(ge=10, le=65_535)] = 1200  # a longer wish is overridden (MQTT 5)
    write_buffer: Annotated[int, Meta(ge=1024)] = (
        65_536  # bytes waiting for a slow socket before it is skipped
    )


class CarrierError(Exception):
    """A profile that cannot be used; the message names file, key, value and what is allowed."""


def load_profile(file: Path) -> CarrierProfile:
    try:
        return msgspec.convert(tomllib.loads(file.read_text()), CarrierProfile)
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise CarrierError(f"{file}: {error}") from error


class Carriers:
    """Finds the profile for a connection."""

    def __init__(self, directory: Path | None = None) -> None:
        """Reads `default.toml` from the directory (None: the profiles that come with Holdfast)."""
        self.default = load_profile((directory or Path(str(files("configs") / "carriers"))) / "default.toml")

    def profile_for(self, transport: asyncio.BaseTransport) -> CarrierProfile:
        """Called once for each connection, when it is accepted. A transport knows the peer's address; no profile
        names networks yet, so nobody asks it."""
        del transport
        return self.default
