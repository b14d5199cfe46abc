"""The Lua scripts: each is one file of `lua/`, and each call of one is atomic in its slot."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Script:
    """`name` is that of the file, without its ending."""

    name: str
    source: str
    sha: str


@cache
def load(name: str) -> Script:
    source = (files("broker.redis") / "lua" / f"{name}.lua").read_text()
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())
