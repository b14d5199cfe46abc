"""Who is master of what, as a server tells; and what its refusals mean to the operator."""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import hiredis

from broker.redis.address import Address, shown
from broker.redis.wire import Argument, Connection, Refused

SLOTS: Final = 16_384
# First words of errors -> what to do about it.
ADVICE: Final = {
    "MISCONF": "it could not write to its disk; see its log and make room",
    "NOAUTH": "it wants a password: set store.url to redis://user:password@…",
    "WRONGPASS": "user or password are wrong: see store.url",
    "NOPERM": "the user of store.url lacks a right that is needed: it needs all commands on all keys and channels",
    "NOREPLICAS": "too few replicas are connected to it (min-replicas-to-write)",
    "MASTERDOWN": "its master is away and it may not answer for it",
    "READONLY": "it is a replica: store.url must name the master, or all servers",
    "LOADING": "it is reading its data from disk; it will answer when it has finished",
    "CLUSTERDOWN": "the cluster has slots without a master",
    "BUSY": "a script runs for too long",
    "DENIED": "it runs in protected mode: give it a password, and store.url, too",
}


@dataclass(frozen=True, slots=True)
class View:
    """What one server says."""

    cluster: bool
    masters: list[tuple[int, int, Address]]  # slots from, to
    others: list[Address]  # all servers
    epoch: tuple[bool, int]  # all slots are served, and the cluster's epoch: the greatest is the newest view


def slot_of(key: Argument) -> int:
    """The key's slot in a cluster: that of its hash tag, if it has one."""
    name = key if isinstance(key, bytes) else str(key).encode()
    start = name.find(b"{") + 1
    end = name.find(b"}", start) if start else -1
    return binascii.crc_hqx(name[start:end] if end > start else name, 0) % SLOTS


async def look(connection: Connection) -> View:
    """Ask a server. Raises Refused if it is no master and knows none, or ConnectionResetError."""
    slots, state, role = await asyncio.gather(
        connection.ask("CLUSTER", "SLOTS"), connection.ask("CLUSTER", "INFO"), connection.ask("ROLE")
    )
    if isinstance(slots, hiredis.ReplyError):
        _check_alone(role, slots)
        return View(False, [(0, 0, connection.address)], [], (True, 0))
    facts = dict(line.split(":", 1) for line in _text(state).splitlines() if ":" in line)
    if not slots:
        raise Refused("CLUSTERDOWN no slot is served")
    masters, others = [], []
    for first, last, *servers in slots:
        addresses = [_address(server, connection.address) for server in servers]
        masters.append((first, last, addresses[0]))
        others += addresses
    whole = facts.get("cluster_state", "ok") == "ok"
    return View(True, masters, others, (whole, int(facts.get("cluster_current_epoch", 0))))


def _check_alone(role: Any, error: hiredis.ReplyError) -> None:
    """It is in no cluster, or does not say. Who must not ask for its role takes it for the master."""
    if isinstance(role, list) and role[0] != b"master":
        raise Refused("READONLY it has another master")
    for refusal in (role, error):
        word = str(refusal).split(" ", 1)[0]
        if isinstance(refusal, hiredis.ReplyError) and word in ADVICE and word != "NOPERM":
            raise Refused(str(refusal))
    if str(error).startswith("NOPERM"):
        raise Refused(str(error))


def _address(server: Sequence[Any], ours: Address) -> Address:
    """As CLUSTER SLOTS gives it; without a name it is the host that we asked."""
    host, port = server[0], server[1]
    return (host.decode() if host and host != b"?" else ours[0]), int(port)


def _text(answer: Any) -> str:
    return answer.decode() if isinstance(answer, bytes) else ""


def trouble(address: Address, error: Exception) -> str:
    """Never shows the password: neither the address nor Redis's answers have it."""
    where = f"Redis at {shown(address)}"
    if isinstance(error, Refused):
        return f"{where}: {ADVICE.get(str(error).split(' ', 1)[0], 'it refused us')} ({error})"
    if isinstance(error, TimeoutError):
        return f"{where} does not answer: is it there, and does the firewall let us through?"
    return f"{where} cannot be reached ({error}): does it run, and is store.url right?"
