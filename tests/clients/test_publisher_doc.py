"""docs/publisher.md: what stands there works, in its order."""

from __future__ import annotations

import ast
import hashlib
import hmac
import json
import re
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, cast

import pytest

from clients.local_server import AppKeys, LocalServer
from clients.publisher import NewDevice, Publisher, SignatureError

PAGE = (Path(__file__).parents[2] / "docs" / "publisher.md").read_text()
PROGRAM, *FRAGMENTS = re.findall(r"(?s)```python\n(.*?)```", PAGE)
NOW = 1_800_000_000


@pytest.fixture
async def registered(publisher: Publisher) -> None:
    await publisher.import_devices(
        [
            NewDevice("phone-1", "android", "ann", ["red"], attributes={"level": 7}),
            NewDevice("phone-2", "ios"),
        ]
    )


def test_the_program_runs(server: LocalServer, app: AppKeys, registered: None) -> None:
    text = PROGRAM
    values = {"APP_KEY": app.app_key, "MASTER_SECRET": app.master_secret}
    for name, value in (values | {"http://127.0.0.1:8080": server.addresses.http}).items():
        assert text.count(name) == 1
        text = text.replace(name, value)
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip().isdigit()) == (0, True), done.stderr


async def test_the_fragments_run_in_order(publisher: Publisher, registered: None) -> None:
    assert len(FRAGMENTS) > 7
    exec(PROGRAM.split("\n\n\n")[0], names := {"publisher": publisher})
    for number, fragment in enumerate(FRAGMENTS):
        await _run(fragment, f"fragment {number}", names)
    await _check_the_receiver(names["take"], names["secret"])


async def _run(text: str, where: str, names: dict[str, Any]) -> None:
    code = compile(text, where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    ended = eval(code, names)  # a coroutine where the text awaits something
    if ended is not None:
        await cast("Coroutine[Any, Any, None]", ended)


async def _check_the_receiver(take: Any, secret: str) -> None:
    event = {
        "event_id": "1",
        "msg_id": "7",
        "event": "shown",
        "at": NOW,
        "registration_ids": [],
        "params": None,
    }
    body = json.dumps({"app_key": "a", "sent_at": NOW, "events": [event]}).encode()
    signature = hmac.new(secret.encode(), b"%d.%b" % (NOW, body), hashlib.sha256).hexdigest()
    assert take(f"t={NOW},v1={signature}", body, NOW) == ["7 shown"]
    with pytest.raises(SignatureError):
        take(f"t={NOW},v1={signature}", body + b" ", NOW)
