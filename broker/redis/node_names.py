"""Names of nodes as numbers, as they stand in what is recorded. They are given for ever: a report tells of nodes that
left long ago. 0 is no node. Not the numbers of lives that `nodes.py` gives."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from broker.redis.engine import Engine
from broker.redis.scripts import load

KEY: Final = "{node names}:numbers"

_number: Final = load("node_names")


class NodeNames:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._numbers = {"": 0}
        self._names = {0: ""}

    async def numbers(self, names: Iterable[str]) -> dict[str, int]:
        """All that are known, with these. New ones are given a number."""
        if unknown := {name for name in names if name not in self._numbers}:
            ordered = sorted(unknown)
            for name, number in zip(ordered, await self._engine.call(_number, (KEY,), ordered), strict=True):
                self._numbers[name] = number
        return self._numbers

    async def names(self, numbers: Collection[int]) -> dict[int, str]:
        """All that are known, with these; "" for what never was one."""
        if any(number not in self._names for number in numbers):
            pairs: list[bytes] = await self._engine.run("HGETALL", KEY)
            self._names |= {
                int(number): name.decode() for name, number in zip(pairs[::2], pairs[1::2], strict=True)
            }
            self._names |= {number: "" for number in numbers if number not in self._names}
        return self._names
