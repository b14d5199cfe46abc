"""Names of an app, kept packed: registration ids, and the terms of the index. A name costs its length and some ten
bytes.

64 hash tags for each app, by the digest of the name; so a large app reaches all shards, and whoever knows the name
knows where to look. Behind each tag there are as many buckets as its names need (lua/buckets.lua): growing is the
business of the script that adds a name, and nobody else has to know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha1
from typing import Any, Final

from broker.redis.engine import Engine
from broker.redis.scripts import Script, load
from broker.redis.wire import Argument

TAGS: Final = 64
DEVICES: Final = "r"
"""The family of the registration ids. Those of the terms are their kinds."""

_find: Final = load("names_find")
_reserve: Final = load("names_reserve")
_confirm: Final = load("names_confirm")
_list: Final = load("names_list")
_drop: Final = load("names_drop")
_up: Final = load("terms_up")
_down: Final = load("terms_down")

TermCount = tuple[str, str, int, int]  # kind, value, place, change


def tag_of(name: str) -> int:
    return sha1(name.encode(), usedforsecurity=False).digest()[0] % TAGS


def base_key(app_id: int, tag: int, family: str) -> str:
    return f"{{{app_id}:{tag}}}:{family}"


class Names:
    """What is kept for each name. Calls go to all tags at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def find(self, app_id: int, family: str, names: Iterable[str]) -> dict[str, bytes]:
        """The values of those that are there."""
        groups = _grouped(names)
        answers = await self._call(_find, app_id, family, groups)
        return {
            name: value
            for group, values in zip(groups.values(), answers, strict=True)
            for name, value in zip(group, values, strict=True)
            if value is not None
        }

    async def reserve(self, app_id: int, devnos: Mapping[str, int]) -> dict[str, int]:
        """Who has each registration id now. A reserved one counts for nothing until it is confirmed, or its device is
        seen to be there: whoever registers it next completes it."""
        groups = _grouped(devnos)
        words = {
            tag: [w for rid in group for w in (rid, str(-1 - devnos[rid]))] for tag, group in groups.items()
        }
        answers = await self._call(_reserve, app_id, DEVICES, words)
        return {
            rid: devno_of(value)[0]
            for group, values in zip(groups.values(), answers, strict=True)
            for rid, value in zip(group, values, strict=True)
        }

    async def confirm(self, app_id: int, devnos: Mapping[str, int]) -> None:
        groups = _grouped(devnos)
        words = {tag: [w for rid in group for w in (rid, str(devnos[rid]))] for tag, group in groups.items()}
        await self._call(_confirm, app_id, DEVICES, words)

    async def count(self, app_id: int, changes: Sequence[TermCount]) -> list[bool]:
        """All up, or all down. For each change, whether the term counts as there for ever, so that nobody needs to
        count it any more."""
        script = _down if any(change < 0 for *_, change in changes) else _up
        groups: dict[tuple[str, int], list[int]] = {}
        for i, (kind, value, _, _) in enumerate(changes):
            groups.setdefault((kind, tag_of(value)), []).append(i)
        calls = []
        for (kind, tag), places in groups.items():
            words = [word for i in places for word in changes[i][1:]]
            calls.append(self._engine.call(script, [base_key(app_id, tag, kind)], words))
        for_ever = [False] * len(changes)
        for places, answer in zip(groups.values(), await asyncio.gather(*calls), strict=True):
            for i, one in zip(places, answer, strict=True):
                for_ever[i] = bool(one)
        return for_ever

    async def everything(self, app_id: int, family: str) -> dict[str, bytes]:
        everywhere: dict[int, Sequence[Argument]] = dict.fromkeys(range(TAGS), ())
        answers = await self._call(_list, app_id, family, everywhere)
        return {
            name.decode(): value
            for words in answers
            for name, value in zip(words[::2], words[1::2], strict=True)
        }

    async def purge(self, app_id: int, families: Iterable[str], budget: int) -> int:
        """Of a deleted app. Returns how many buckets went."""
        gone = 0
        for family in families:
            each = max(1, budget // TAGS)
            gone += sum(await self._call(_drop, app_id, family, dict.fromkeys(range(TAGS), (each,))))
            if gone >= budget:
                break
        return gone

    async def _call(
        self, script: Script, app_id: int, family: str, groups: Mapping[int, Sequence[Argument]]
    ) -> list[Any]:
        return await asyncio.gather(
            *[
                self._engine.call(script, [base_key(app_id, tag, family)], words)
                for tag, words in groups.items()
            ]
        )


def devno_of(value: bytes) -> tuple[int, bool]:
    """A registration id's value: devno, whether it is in use."""
    number = int(value)
    return (number, True) if number >= 0 else (-1 - number, False)


def _grouped(names: Iterable[str]) -> dict[int, list[str]]:
    groups: dict[int, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(tag_of(name), []).append(name)
    return groups
