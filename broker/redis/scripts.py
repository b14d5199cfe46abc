"""The Lua scripts: each is one file of `lua/`, and each call of one is atomic in its slot. A line `-- include x`
stands for the text of `lua/x.lua`."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

_INCLUDE: Final = re.compile(r"^-- include (\w+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Script:
    """`name` is that of the file, without its ending."""

    name: str
    source: str
    sha: str


@cache
def load(name: str) -> Script:
    source = _INCLUDE.sub(lambda found: _text(found[1]), _text(name))
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def _text(name: str) -> str:
    return (files("broker.redis") / "lua" / f"{name}.lua").read_text()
