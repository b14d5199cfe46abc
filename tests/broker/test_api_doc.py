"""Every example in docs/api.md is run, and every endpoint has one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from broker.api.http import api_endpoints
from broker.errors import STATUS
from broker.model import NodeInfo
from tests.broker.openapi_answers import Conformance

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
EXAMPLE = re.compile(
    r"```http\n(?P<method>[A-Z]+) (?P<path>\S+)\n(?P<headers>(?:[A-Za-z-]+: [^\n]*\n)*)(?:\n(?P<body>.*?))?```\n"
    r"```(?P<kind>json|text) (?P<status>\d+)\n(?P<answer>.*?)```",
    re.DOTALL,
)
DEVICE = "0a1b2c3d4e5f60718293"


@dataclass
class Example:
    method: str
    path: str
    headers: dict[str, str]  # "auth" is ours: device key | group | none; the app's master secret without it
    body: str
    status: int
    answer: str


def _examples() -> list[Example]:
    page = PAGE.read_text()
    examples = [
        Example(
            m["method"],
            m["path"],
            dict(line.split(": ", 1) for line in m["headers"].splitlines()),
            m["body"] or "",
            int(m["status"]),
            m["answer"],
        )
        for m in EXAMPLE.finditer(page)
    ]
    assert len(examples) == page.count("```http"), "an example is not written as the others are"
    return examples


def _matches(wanted: Any, got: Any) -> bool:
    """`…` stands for any value."""
    if wanted == "…":
        return True
    if isinstance(wanted, dict) and isinstance(got, dict):
        return wanted.keys() == got.keys() and all(_matches(wanted[key], got[key]) for key in wanted)
    if isinstance(wanted, list) and isinstance(got, list):
        return len(wanted) == len(got) and all(map(_matches, wanted, got))
    return bool(wanted == got)


async def test_every_example_answers_as_the_page_says(service: Any) -> None:
    device = await service.register(DEVICE, platform="android", alias="ann", tags=["red"])
    event = service.reports.event(service.app.app_id, device.devno, "opened", b'{"page":3}', service.now)
    await service.store.record_events([event])
    await service.store.nodes.join(NodeInfo("push-1", address="push-1.example.com:8883", tls=True))
    group = await service.broker.groups.create(orjson.dumps({"name": "ours", "apps": [service.app.key]}))
    logins = {
        "device key": (service.app.key, service.app.device_key),
        "group": (f"group-{group.key}", group.secret),
        "none": None,
    }
    seen: dict[str, str] = {"APP_KEY": service.app.key}

    conformance = Conformance((await service.call("GET", "/v1/openapi.json", auth=None)).json)

    def fill(text: str) -> str:
        for name in sorted(seen, key=len, reverse=True):  # ID is a part of MSG_ID
            text = text.replace(name, seen[name])
        return text

    for example in _examples():
        headers = dict(example.headers)
        auth = logins[headers.pop("auth")] if "auth" in headers else ("", "")
        body = fill(example.body)
        if headers.get("Content-Type", "").startswith("multipart/"):
            body = body.replace("\n", "\r\n")
        answer = await service.call(
            example.method, fill(example.path), body.encode() or None, auth=auth, headers=headers
        )
        where = (example.method, example.path, answer.body)
        assert answer.status == example.status, where
        conformance.check(example.method, fill(example.path), answer.status, answer.body)
        if not example.answer:
            assert answer.body == b"", where
            continue
        assert _matches(orjson.loads(fill(example.answer)), answer.json), where
        if isinstance(answer.json, dict):
            seen |= {
                name.upper(): str(value)
                for name, value in answer.json.items()
                if name.endswith("id") or name == "token"
            }


def test_every_endpoint_has_a_heading_and_an_example(service: Any) -> None:
    headings = set(re.findall(r"^### (\S+ \S+)$", PAGE.read_text(), re.MULTILINE))
    endpoints = api_endpoints(service.broker)
    assert headings == {f"{endpoint.method} {endpoint.paths[0]}" for endpoint in endpoints}
    examples = _examples()
    for endpoint in endpoints:
        path = re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(endpoint.paths[0])) + r"(\?.*)?")
        assert any(e.method == endpoint.method and path.fullmatch(e.path) for e in examples), endpoint.paths


def test_the_page_has_the_codes_of_the_table() -> None:
    rows = re.findall(r"^\| (\d{4}) \| (\d{3}) \|", PAGE.read_text(), re.MULTILINE)
    assert len(rows) > 15
    own = {403, 404, 408, 413}  # the same code in an unusual place
    assert {(int(code), int(status)) for code, status in rows if int(status) not in own} <= {
        (code, status) for code, (status, _) in STATUS.items()
    }
