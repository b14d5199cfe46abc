"""The example receiver of docs/api.md, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from broker.telling.callbacks import sign

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_example_of_the_signature_is_right() -> None:
    (code,) = re.findall(r"```python\n(import hashlib\n.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/api.md", "exec"), names)  # our own page
    check = names["is_from_holdfast"]
    body = b'{"events": []}'
    header = sign("secret", 1_800_000_000, body)
    assert check("secret", header, body, 1_800_000_100)
    assert not check("other", header, body, 1_800_000_100)
    assert not check("secret", header, body + b"x", 1_800_000_100)
    assert not check("secret", header, body, 1_800_000_301)
    assert not check("secret", header, body, 1_799_999_000)
    for broken in ("", "t=1", "v1=2", "t=x,v1=y", "nonsense", header.replace("v1", "v2")):
        assert not check("secret", broken, body, 1_800_000_000)
