"""May this Redis lose what was answered? Asked of every master and replica when a store is opened.

What an answered write needs is a rule of a table: the setting, what it must be, and what is lost otherwise.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import hiredis

from broker.redis.address import Address, shown
from broker.redis.engine import Engine
from broker.store import StoreUnavailable

log = logging.getLogger(__name__)

OLDEST: Final = (7, 0)  # sharded pub/sub, CONFIG GET of several settings


@dataclass(frozen=True, slots=True)
class Rule:
    setting: str
    needed: str
    else_: str  # what may happen


RULES: Final = (
    Rule("appendonly", "yes", "a restart loses what was written since the last snapshot"),
    Rule("appendfsync", "always", "a power cut loses what was written in the last second, or more"),
    Rule("maxmemory-policy", "noeviction", "when memory runs out, Redis throws away what it likes"),
)
ADVISED: Final = (
    Rule("cluster-require-full-coverage", "no", "one shard without a master stops all the others, too"),
)
SETTINGS: Final = tuple(rule.setting for rule in RULES + ADVISED)
_OF_INFO: Final = {"aof_enabled": "appendonly", "maxmemory_policy": "maxmemory-policy"}
_YES_NO: Final = {"1": "yes", "0": "no"}
QUESTIONS: Final = (
    ("INFO", "server"),
    ("INFO", "persistence"),
    ("INFO", "memory"),
    ("CONFIG", "GET", *SETTINGS),
)


@dataclass(frozen=True, slots=True)
class Server:
    """What one server says of itself."""

    name: str
    version: str
    settings: Mapping[str, str]
    hidden: str = ""  # why its settings could not be read, as Redis says it


async def check(engine: Engine, replicas: int, *, checked: bool = True) -> None:
    """Raises StoreUnavailable that names what is wrong, where, and what it must be. `checked` false: what may lose
    data is a warning only."""
    masters = await asyncio.gather(*[_server(engine, address) for address in engine.masters])
    if wrong := [f"{server.name} is version {server.version}" for server in masters if _too_old(server)]:
        needed = ".".join(map(str, OLDEST))
        raise StoreUnavailable(f"Redis {needed} or later, or Valkey, is needed: {'; '.join(wrong)}")
    found, counts = await _replicas(engine)
    problems = [problem for server in (*masters, *found) for problem in _problems(server)]
    problems += _too_few(counts, replicas)
    for warning in _warnings(masters, counts, replicas, engine.cluster):
        log.warning("%s", warning)
    if problems and checked:
        raise StoreUnavailable(_refusal(problems))
    for problem in problems:
        log.warning("%s; store.unsafe allows it", problem)


async def _server(engine: Engine, address: Address) -> Server:
    server, persistence, memory, config = await engine.ask(address, *QUESTIONS)
    facts = _facts(server) | _facts(persistence) | _facts(memory)
    settings = {
        setting: _YES_NO.get(facts[fact], facts[fact]) for fact, setting in _OF_INFO.items() if fact in facts
    }
    hidden = str(config) if isinstance(config, hiredis.ReplyError) else ""
    if not hidden:
        settings |= _pairs(config)
    return Server(f"Redis at {shown(address)}", facts.get("redis_version", "?"), settings, hidden)


async def _replicas(engine: Engine) -> tuple[list[Server], dict[str, int]]:
    """Those that can be asked, and how many each master has in step."""
    found: list[Server] = []
    counts: dict[str, int] = {}
    for address, role in (await engine.everywhere("ROLE")).items():
        replicas = role[2] if isinstance(role, list) and len(role) > 2 else []
        counts[f"Redis at {shown(address)}"] = len(replicas)
        for host, port, *_ in replicas:
            try:
                found.append(await _server(engine, (host.decode(), int(port))))
            except StoreUnavailable as error:
                log.warning("a replica's settings cannot be checked: %s", error)
    return found, counts


def _facts(info: Any) -> dict[str, str]:
    text = info.decode() if isinstance(info, bytes) else ""
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def _pairs(config: Sequence[bytes]) -> dict[str, str]:
    texts = [text.decode() for text in config]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def _too_old(server: Server) -> bool:
    parts = server.version.split(".")
    return parts[0].isdecimal() and tuple(map(int, parts[:2])) < OLDEST


def _problems(server: Server) -> list[str]:
    problems = [
        f"{server.name}: {rule.setting} is {server.settings[rule.setting]}, it must be {rule.needed}"
        f" (else {rule.else_})"
        for rule in RULES
        if server.settings.get(rule.setting, rule.needed) != rule.needed
    ]
    unknown = [rule.setting for rule in RULES if rule.setting not in server.settings]
    if unknown:
        reason = f", because it answers: {server.hidden}" if server.hidden else ""
        problems.append(f"{server.name}: {', '.join(unknown)} cannot be read{reason}")
    return problems


def _too_few(counts: Mapping[str, int], replicas: int) -> list[str]:
    return [
        f"{name}: has {count} replicas in step, store.replicas asks for {replicas}"
        for name, count in counts.items()
        if count < replicas
    ]


def _warnings(
    masters: Sequence[Server], counts: Mapping[str, int], replicas: int, cluster: bool
) -> list[str]:
    """What loses nothing, or only if a master is given up for a replica."""
    warnings = [
        f"{name}: has {count} replicas, and store.replicas is 0: when one takes over, answered pushes may be lost"
        for name, count in counts.items()
        if count and not replicas
    ]
    if cluster:
        warnings += [
            f"{server.name}: {rule.setting} is {server.settings[rule.setting]}: {rule.else_}"
            for server in masters
            for rule in ADVISED
            if server.settings.get(rule.setting, rule.needed) != rule.needed
        ]
    return warnings


def _refusal(problems: Sequence[str]) -> str:
    return (
        "this Redis may lose what was answered:"
        + "".join(f"\n  {problem}" for problem in problems)
        + "\nSet it in redis.conf or by CONFIG SET. Where a provider hides its settings, or keeps data in another"
        "\nway, or where a loss does not matter: store.unsafe = true starts all the same."
    )
