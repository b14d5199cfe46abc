"""GET /v1/openapi.json: the API as an OpenAPI 3.1 document, made from the endpoints and described.py.

Schemas are JSON Schema 2020-12, as msgspec derives them from the types that bodies are read with and from the shapes
of the answers. A path of the second address plan is a row of its own with the tag `other addresses`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec
import orjson

from broker.api.call import Call, Endpoint
from broker.api.described import DESCRIBED, PARAMETERS, SCHEMA_NAMES, Described
from broker.api.shapes import Refusal
from broker.errors import PUSH, STATUS
from broker.tenants.rates import JSON

REF: Final = "#/components/schemas/{name}"
PATH_NAME: Final = re.compile(r"{(\w+)}")
OTHER_PLAN: Final = "other addresses"
MULTIPART: Final = "multipart/form-data"
_HEADERS: Final = {
    "X-Rate-Limit-Quota": "Calls in a minute.",
    "X-Rate-Limit-Remaining": "Calls left in this one.",
    "X-Rate-Limit-Reset": "Seconds until it ends.",
}
_UPLOAD: Final = {
    "type": "object",
    "properties": {
        "filename": {"type": "string", "contentMediaType": "text/plain", "description": "The list."},
        "ttl": {"type": "string", "description": "Hours that the file is kept, 1 to 720."},
    },
    "required": ["filename"],
}

# Where two types have the same name msgspec uses the whole path of each.
_RENAMED: Final = {f"{kind.__module__}.{kind.__qualname__}": name for kind, name in SCHEMA_NAMES.items()}
_REFERENCES: Final = {REF.format(name=old): REF.format(name=new) for old, new in _RENAMED.items()}

Document = dict[str, Any]


def openapi_endpoint(endpoints: Sequence[Endpoint]) -> Endpoint:
    @functools.cache
    def render() -> bytes:
        return orjson.dumps(document([*endpoints, endpoint]))

    async def show(_: Call) -> bytes:
        return render()

    endpoint = Endpoint("GET", ("/v1/openapi.json",), PUSH, show, who="anybody")
    return endpoint


def document(endpoints: Sequence[Endpoint]) -> Document:
    """Every endpoint has its row in DESCRIBED."""
    rows = [(endpoint, _described(endpoint)) for endpoint in endpoints]
    types = [kind for _, row in rows for kind in (row.body, row.answer) if kind is not None]
    schemas, components = msgspec.json.schema_components([*types, Refusal], ref_template=REF)
    found = iter(schemas)
    paths: dict[str, Document] = {}
    refusals = _Refusals()
    for endpoint, row in rows:
        body = next(found) if row.body is not None else None
        answer = next(found) if row.answer is not None else None
        for number, path in enumerate(_distinct(endpoint.paths)):
            operation = _operation(endpoint, row, path, body, answer, refusals)
            if number:
                operation |= {"tags": [OTHER_PLAN], "operationId": f"{row.name}OtherAddress"}
            paths.setdefault(path, {})[endpoint.method.lower()] = operation
    whole: Document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Holdfast",
            "version": version("holdfast"),
            "description": "The public HTTP API: JPush v3 in both its address plans, and paths of its own under /v1.",
        },
        "servers": [{"url": "/"}],
        "security": [{"app": []}],
        "paths": paths,
        "components": {
            "schemas": {_RENAMED.get(name, name): schema for name, schema in components.items()},
            "responses": refusals.found,
            "securitySchemes": _security(),
            "headers": {name: _header(about) for name, about in _HEADERS.items()},
        },
    }
    for name in _RENAMED.values():
        whole["components"]["schemas"][name]["title"] = name
    tidied: Document = _tidied(whole)
    return tidied


def _tidied(node: Any) -> Any:
    """For generators of clients: no dots in names of schemas, and every array says of what it is."""
    if isinstance(node, list):
        return [_tidied(part) for part in node]
    if not isinstance(node, dict):
        return node
    tidied = {key: _tidied(part) for key, part in node.items()}
    if node.get("type") == "array":
        tidied.setdefault("items", {})
    if isinstance(target := node.get("$ref"), str):
        tidied["$ref"] = _REFERENCES.get(target, target)
    return tidied


def _described(endpoint: Endpoint) -> Described:
    return DESCRIBED[f"{endpoint.method} {endpoint.paths[0]}"]


def _distinct(paths: Iterable[str]) -> list[str]:
    """A slash at the end changes nothing."""
    return list(dict.fromkeys(path.rstrip("/") for path in paths))


def _operation(
    endpoint: Endpoint,
    row: Described,
    path: str,
    body: Document | None,
    answer: Document | None,
    refusals: _Refusals,
) -> Document:
    operation: Document = {
        "operationId": row.name,
        "summary": row.summary,
        "tags": [endpoint.needs],
        "parameters": [*_path_parameters(path), *_query_parameters(row)],
        "responses": _responses(endpoint, row, answer, refusals),
    }
    if endpoint.who == "anybody":
        operation["security"] = []
    elif endpoint.who == "group":
        operation["security"] = [{"group": []}]
    else:
        operation["x-scope"] = endpoint.needs
    if body is not None or row.upload:
        operation["requestBody"] = _request_body(row, body)
    return operation


def _path_parameters(path: str) -> list[Document]:
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "description": PARAMETERS[name][0],
            "schema": PARAMETERS[name][1],
        }
        for name in PATH_NAME.findall(path)
    ]


def _query_parameters(row: Described) -> list[Document]:
    return [
        {
            "name": query.name,
            "in": "query",
            "required": query.required,
            "description": query.about,
            "schema": query.schema,
        }
        for query in row.query
    ]


def _request_body(row: Described, body: Document | None) -> Document:
    if row.upload:
        return {"required": True, "content": {MULTIPART: {"schema": _UPLOAD}}}
    schema = {"allOf": [body, {"type": "object", "required": list(row.needed)}]} if row.needed else body
    return {"required": not row.optional_body, "content": {JSON: {"schema": schema}}}


def _responses(endpoint: Endpoint, row: Described, answer: Document | None, refusals: _Refusals) -> Document:
    done: Document = {"description": "Done.", "headers": _RATE_HEADERS}
    if answer is not None:
        done["content"] = {JSON: {"schema": answer}}
    responses: Document = {"200": done}
    if row.cached:
        responses["304"] = {"description": "The caller has it (If-None-Match).", "headers": _RATE_HEADERS}
    for status, reasons in sorted(_failures(endpoint, row).items()):
        about = "; ".join(f"{code}: {reason}" for code, reason in sorted(reasons.items()))
        responses[str(status)] = refusals.take(f"{endpoint.area.name}-{status}", about)
    return responses


class _Refusals:
    """Many endpoints refuse alike: what they answer is written once."""

    def __init__(self) -> None:
        self.found: dict[str, Document] = {}
        self._names: dict[tuple[str, str], str] = {}

    def take(self, name: str, about: str) -> Document:
        """A reference to the answer; the same name with another description gets a number."""
        known = self._names.get((name, about))
        if known is None:
            alike = sum(1 for other, _ in self._names if other == name)
            known = self._names[name, about] = f"{name}-{alike + 1}" if alike else name
            self.found[known] = {
                "description": about,
                "headers": _RATE_HEADERS,
                "content": {JSON: {"schema": {"$ref": REF.format(name="Refusal")}}},
            }
        return {"$ref": f"#/components/responses/{known}"}


_RATE_HEADERS: Final = {name: {"$ref": f"#/components/headers/{name}"} for name in _HEADERS}


def _failures(endpoint: Endpoint, row: Described) -> Mapping[int, Mapping[int, str]]:
    """HTTP status -> code -> when."""
    area, found = endpoint.area, dict[int, dict[int, str]]()

    def add(code: int, http_status: int | None = None, when: str = "") -> None:
        status, meaning = STATUS[code]
        found.setdefault(http_status or status, {})[code] = when or meaning

    for code in (
        area.missing,
        area.invalid,
        area.too_many,
        area.internal,
        area.unavailable,
        2002,
        *row.codes,
    ):
        add(code)
    add(area.invalid, 404, "what the path names is not there")
    add(1020)
    if endpoint.who != "anybody":
        add(area.no_credentials)
        add(area.bad_credentials)
        add(2004)
        add(area.bad_credentials, 403, f"the API key has not the scope {endpoint.needs}")
    if endpoint.max_body or row.upload:
        add(area.too_large, 413, "the body is too large")
        add(area.invalid, 408, "the body did not come in time")
    return found


def _security() -> Document:
    return {
        "app": {
            "type": "http",
            "scheme": "basic",
            "description": "User: the app key. Password: the master secret, or the secret of an API key with the "
            "scope in x-scope; the device key where an endpoint says so.",
        },
        "group": {
            "type": "http",
            "scheme": "basic",
            "description": "User: group- and the group's key. Password: the group's secret.",
        },
    }


def _header(about: str) -> Document:
    return {"description": about, "required": True, "schema": {"type": "integer", "minimum": 0}}
