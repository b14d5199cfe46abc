"""The OpenAPI document is valid, is about all there is, and tells the truth."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from broker.api.described import DESCRIBED
from broker.api.http import api_endpoints, build_api
from broker.errors import STATUS
from broker.tenants.keys import SCOPES
from tests.patience import PATIENCE

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "8"))  # for each endpoint, beside systematic ones
SEED = int(os.environ.get("SCHEMATHESIS_SEED", "4"))
TIME_LIMIT = 1200.0  # seconds, of a slow machine
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "ignored_auth",
    "unsupported_method",
    "allow_header_conformance",
)


async def _document(service: Any) -> dict[str, Any]:
    answer = await service.call("GET", "/v1/openapi.json", auth=None)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    document: dict[str, Any] = answer.json
    return document


async def test_the_document_is_valid(service: Any) -> None:
    openapi = pytest.importorskip("openapi_spec_validator", reason="openapi-spec-validator is not installed")
    assert list(openapi.OpenAPIV31SpecValidator(await _document(service)).iter_errors()) == []


async def test_it_has_every_route_and_no_other(service: Any) -> None:
    """Those that end with a slash are the same without it."""
    document = await _document(service)
    told = {(method.upper(), path) for path, row in document["paths"].items() for method in row}
    routes = {
        (route.method, route.resource.canonical.rstrip("/"))
        for route in build_api(service.broker).router.routes()
        if route.resource is not None and route.method != "*"
    }
    assert told == routes
    assert len(told) > 60


async def test_every_description_is_of_an_endpoint(service: Any) -> None:
    endpoints = {f"{row.method} {row.paths[0]}" for row in api_endpoints(service.broker)}
    assert endpoints | {"GET /v1/openapi.json"} == DESCRIBED.keys()


async def test_names_are_used_once_and_codes_are_those_of_the_table(service: Any) -> None:
    document = await _document(service)
    operations = [operation for row in document["paths"].values() for operation in row.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(names) == len(set(names))
    for name, response in document["components"]["responses"].items():
        codes = {int(code) for code in re.findall(r"(\d{4}): ", response["description"])}
        assert codes, name
        assert codes <= STATUS.keys()
    for operation in operations:
        assert operation["summary"].endswith("."), operation["summary"]
        if operation.get("security") is None:
            assert operation["x-scope"] in SCOPES


async def test_generators_of_clients_find_names_and_types(service: Any) -> None:
    document = await _document(service)
    assert document["servers"] == [{"url": "/"}]
    operations = {
        f"{method} {path}": row[method] for path, row in document["paths"].items() for method in row
    }
    names = {key: operation["operationId"] for key, operation in operations.items()}
    assert all(re.fullmatch("[a-z][A-Za-z]+", name) for name in names.values())
    assert names["post /v3/push"] == "push"
    assert names["delete /v3/push/{msg_id}"] == "withdrawPush"
    assert names["post /v3/push/batch/regid/single"] == "pushBatchByRegistrationId"
    assert names["get /v3/push/schedules"] == names["get /v3/schedules"] + "OtherAddress"
    schemas = document["components"]["schemas"]
    assert all(name.isalnum() for name in schemas)
    titles = [schema["title"] for schema in schemas.values() if "title" in schema]
    assert len(titles) == len(set(titles))
    parts = list(_parts(document))
    assert all("items" in part for part in parts if part.get("type") == "array")
    references = {part["$ref"] for part in parts if isinstance(part.get("$ref"), str)}
    assert {name.removeprefix("#/components/schemas/") for name in references if "/schemas/" in name} <= set(
        schemas
    )


def _parts(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for part in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _parts(part)


async def test_it_needs_no_credentials_and_is_the_same_for_all(service: Any) -> None:
    first = await service.call("GET", "/v1/openapi.json", auth=None)
    again = await service.call("GET", "/v1/openapi.json", auth=("x", "y"))
    assert first.body == again.body
    assert service.app.key not in first.body.decode()


# What it says is what happens

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")


async def _fill(service: Any) -> None:
    """Something for reads to find."""
    await service.register("a", platform="android", alias="ann", tags=["red"])
    hello = {"platform": "all", "audience": "all", "notification": {"alert": "hi"}}
    assert (await service.call("POST", "/v3/push", hello)).status == 200
    await service.call("POST", "/v1/segments", {"name": "s", "rule": {"tag": "red"}})
    await service.call("POST", "/v1/keys", {"name": "k", "scopes": ["push"]})


@pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="schemathesis is not installed")
async def test_schemathesis_finds_no_disagreement(service: Any, tmp_path: Path) -> None:
    await _fill(service)
    made = await service.broker.groups.create(orjson.dumps({"name": "g", "apps": [service.app.key]}))
    app, group = (service.app.key, service.app.master_secret), (f"group-{made.key}", made.secret)
    (tmp_path / "schemathesis.toml").write_text(_CONFIG.format(app=app, group=group))
    run = await asyncio.create_subprocess_exec(
        str(SCHEMATHESIS),
        "--config-file",
        str(tmp_path / "schemathesis.toml"),
        "run",
        f"{service.base}/v1/openapi.json",
        f"--checks={','.join(CHECKS)}",
        "--phases=examples,coverage,fuzzing",
        f"--max-examples={EXAMPLES}",
        f"--seed={SEED}",
        "--exclude-tag=other addresses",
        "--suppress-health-check=all",
        "--warnings=off",
        f"--request-timeout={PATIENCE}",
        "--no-color",
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "COLUMNS": "120"},
    )
    try:
        output, _ = await asyncio.wait_for(run.communicate(), TIME_LIMIT)
    finally:
        if run.returncode is None:
            run.kill()
            await run.wait()
    assert run.returncode == 0, output.decode()[-20_000:]


_CONFIG = """
[generation]
database = "none"

[auth.openapi.app]
username = "{app[0]}"
password = "{app[1]}"

[auth.openapi.group]
username = "{group[0]}"
password = "{group[1]}"
"""
